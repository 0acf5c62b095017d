"""torchao's PT2E: an exported program, calibrated and converted to one that rounds where a quantizer says so.

What comes out computes with pairs of Q and DQ; it is for a backend to make them whole-number kernels. A quantizer knows
its backend's kernels; what is the same for all is here: the free dimensions stay free, scales that the model has
learned take the place of observed ones, and torchao's errors become ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.exported import export_module, quiet
from deploytool.encoding import Encoding
from deploytool.errors import DeployError, InputRefused
from deploytool.load.grid import check_encoding
from deploytool.signature import Feeds, Signature

_FAKE = torch.ops.aten.fake_quantize_per_tensor_affine.tensor_qparams
_ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default
_PREFIX = "module."  # of what FlatModule wraps


@dataclass
class Learned:
    """What became of the scales that a model has learned: layers by the name that the source gives them.

    inputs      layers whose input is rounded on the grid that it learned
    weights     layers whose weight keeps the codes that it learned
    not_taken   why others are not
    """

    inputs: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    not_taken: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Quantized:
    """The converted program, its arguments the example of the one that it was made of."""

    program: ExportedProgram
    learned: Learned


def quantize(
    program: ExportedProgram, quantizer: Quantizer, feeds: Iterable[Feeds], signature: Signature,
    encodings: Mapping[str, Encoding], largest: Mapping[str, int] | None = None,
) -> Quantized:  # fmt: skip
    """Round a program as a quantizer says, in ranges of `feeds`, or in those that the model has learned.

    program     of `Source.flat`, by `exported.export_module`; it is not changed
    feeds       NumPy, at least one; dynamic schemes take the ranges of weights from the first
    encodings   `Source.encodings`
    largest     sizes that the free dimensions go up to, as for `export_module`

    Raises InputRefused DT310 where torchao fails, DT303 without feeds.
    """
    learned, feeds = Learned(), list(feeds)
    if not feeds:
        raise InputRefused("DT303", "calibration must have at least one sample (got none)")
    try:
        with torch.no_grad(), quiet():
            module: GraphModule = program.module(check_guards=False)
            module.graph.eliminate_dead_code()  # a quantizer that looks for layers fails at those that nothing reads
            module.recompile()
            prepared = prepare_pt2e(module, _with_learned(quantizer, encodings, learned))
            for one in feeds:
                prepared(*positional(signature, one))
            converted = convert_pt2e(prepared)
        _drop_simulated(converted)
    except DeployError:
        raise
    except Exception as error:  # what torchao raises has no common base
        raise InputRefused("DT310", "torchao must quantize the exported program "
                                    f"(got {type(error).__name__}: {error})"[:2000],
                           fix="name the layer in exclude, or choose an fp32 target") from error  # fmt: skip
    arguments, _ = program.example_inputs or ((), {})
    return Quantized(export_module(converted, signature, tuple(arguments), largest), learned)


def layer_of(node: Node) -> str:
    """The layer whose weight a node of an exported program reads, by its own name in the source; "" for other nodes."""
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return ""
    return str(weight.target).removeprefix(_PREFIX).rpartition(".")[0]


def layers_with_grids(program: ExportedProgram) -> list[str]:
    """Layers whose input the program rounds on a learned grid."""
    nodes = program.module(check_guards=False).graph.nodes
    found = [layer_of(node) for node in nodes if node.args and getattr(node.args[0], "target", None) is _FAKE]
    return [layer for layer in dict.fromkeys(found) if layer]


def run_module(module: Any, signature: Signature, feeds: Feeds) -> tuple[Tensor, ...]:
    """The outputs of a program's module."""
    with torch.inference_mode():
        return as_tuple(module(*positional(signature, feeds)))


class _Fixed(FixedQParamsObserver):  # type: ignore[misc]
    """A grid that is known beforehand, one for the tensor or one for each entry of `ch_axis`."""

    def __init__(self, scale: Tensor, zero_point: Tensor, like: Any, low: int, high: int, axis: int | None):
        scheme = torch.per_tensor_affine if axis is None else torch.per_channel_symmetric
        super().__init__(1.0, 0, dtype=like.dtype, qscheme=scheme, quant_min=low, quant_max=high)
        self.scale, self.zero_point, self.ch_axis = scale.float(), zero_point.int(), 0 if axis is None else axis


def _with_learned(quantizer: Quantizer, encodings: Mapping[str, Encoding], learned: Learned) -> Quantizer:
    """A copy of a quantizer that puts learned grids in the place of observers, and leaves constants as they are."""
    changed: Any = copy.copy(quantizer)
    before = quantizer.prepare_obs_or_fq_callback

    def fix(model: GraphModule, observers: dict[Any, Any]) -> None:
        before(model, observers)
        _fix_observers(model, observers, encodings, learned)

    changed.prepare_obs_or_fq_callback = fix
    # XNNPACK's makes whole numbers that are indices to floats (torchao 0.18), which no graph with a mask survives.
    changed.transform_for_annotation = lambda model: model
    return changed


def _fix_observers(
    model: GraphModule, observers: dict[Any, Any], encodings: Mapping[str, Encoding], learned: Learned
) -> None:
    for node in model.graph.nodes:
        layer = layer_of(node)
        if not layer:
            continue
        given, weight = node.args[0], node.args[1]
        encoding = encodings.get(str(weight.target).removeprefix(_PREFIX))
        if encoding is not None:
            why = _fix_weight(observers, (weight, node), check_encoding(layer, encoding))
            _record(learned.weights, learned.not_taken, layer, why)
        if isinstance(given, Node) and given.target is _FAKE:
            why = _fix_input(model, observers, (given, node))
            _record(learned.inputs, learned.not_taken, layer, why)


def _record(done: list[str], not_taken: dict[str, str], layer: str, why: str) -> None:
    if why:
        not_taken[layer] = why
    elif layer not in done:  # a layer may be called twice
        done.append(layer)


def _fix_weight(observers: dict[Any, Any], edge: tuple[Node, Node], encoding: Encoding) -> str:
    """Why the weight's own codes cannot be kept; "" where they are."""
    observer = observers.get(edge)
    if observer is None:
        return "stays in floating point"
    if encoding.axis != 0 or encoding.scale.shape[1] > 1:
        return f"kernels have one scale per output channel (got groups of {encoding.group})"
    if not encoding.symmetric:
        return "its weight's grid is not symmetric"
    half = encoding.levels // 2
    scale = encoding.scale[:, 0]
    observers[edge] = _Fixed(scale, torch.zeros(len(scale)), observer, -half, half - 1, axis=0)
    return ""


def _fix_input(model: GraphModule, observers: dict[Any, Any], edge: tuple[Node, Node]) -> str:
    """Why the input's own grid cannot be kept; "" where it is. Signed codes have the zero point moved with them."""
    observer, (given, _) = observers.get(edge), edge
    if observer is None:
        return "stays in floating point, its grid simulated"
    scale, zero, low, high = _grid(model, given)
    shift = -128 if observer.dtype is torch.int8 else 0
    if high - low > 255 or low < 0:
        return f"its grid has codes of {low} to {high}, not of 8 bits"
    observers[edge] = _Fixed(scale.reshape(1), zero.reshape(1) + shift, observer, low + shift, high + shift, None)
    return ""


def _grid(model: GraphModule, fake: Node) -> tuple[Tensor, Tensor, int, int]:
    scale, zero = (_constant(model, node) for node in fake.args[1:3])
    return scale, zero, int(fake.args[3]), int(fake.args[4])  # type: ignore[arg-type]


def _constant(model: GraphModule, node: Any) -> Tensor:
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    tensor: Tensor = value.detach()
    return tensor


def _drop_simulated(model: GraphModule) -> None:
    """Take out simulated rounding that is followed by the same rounding."""
    for node in list(model.graph.nodes):
        if node.target is _ROUND and isinstance(node.args[0], Node) and node.args[0].target is _FAKE:
            scale, zero, low, _ = _grid(model, node.args[0])
            same = (float(scale), int(zero) - low) == (node.args[1], int(node.args[2]) - int(node.args[3]))
            if same:
                node.replace_input_with(node.args[0], node.args[0].args[0])
    model.graph.eliminate_dead_code()
    model.recompile()
