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
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import FixedQParamsObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import Quantizer

from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.exported import export_module, quiet
from deploytool.encoding import MOST_BITS, Encoding
from deploytool.errors import DeployError, InputRefused
from deploytool.load.grid import check_encoding
from deploytool.signature import Feeds, Signature

_ROUND = torch.ops.quantized_decomposed.quantize_per_tensor.default
_BACK = torch.ops.quantized_decomposed.dequantize_per_tensor.default
_PREFIX = "module."  # of what FlatModule wraps
# Arguments that each call of a layer must have for itself.
_OWN = {torch.ops.aten.conv1d.default: (1, 2), torch.ops.aten.conv2d.default: (1, 2),
        torch.ops.aten.conv_transpose1d.default: (1, 2), torch.ops.aten.conv_transpose2d.input: (1, 2),
        torch.ops.aten.linear.default: (2,)}  # fmt: skip


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
            _tell_calls_apart(module)
            coded = _by_attribute(program, encodings)
            coded |= {own: coded[name] for own, name in _part_calls(module).items() if name in coded}
            prepared = prepare_pt2e(module, _with_learned(quantizer, coded, learned))
            for one in feeds:
                prepared(*positional(signature, one))
            converted = convert_pt2e(prepared)
        _drop_doubled(converted)
    except DeployError:
        raise
    except Exception as error:  # what torchao raises has no common base
        raise InputRefused("DT310", "torchao must quantize the exported program "
                                    f"(got {type(error).__name__}: {error})"[:2000],
                           fix="name the layer in exclude, or choose an fp32 target") from error  # fmt: skip
    arguments, _ = program.example_inputs or ((), {})
    return Quantized(export_module(converted, signature, tuple(arguments), largest), learned)


def _tell_calls_apart(module: GraphModule) -> None:
    """Give the nodes of a module's second call a name of their own for it, as torch.export's keys have it ("head@1").

    Quantizers divide a graph by the names alone, so that both calls would be one part with two results (torch 2.13,
    fx/passes/utils/source_matcher_utils.py).
    """
    for node in module.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (f"{name}@{call}" if (call := key.partition("@")[2]) else name, kind)
                for key, (name, kind) in stack.items()
            }


def _part_calls(module: GraphModule) -> dict[str, str]:
    """Give each call of a layer a bias of its own, and a convolution's a weight too: {its name: the layer's}.

    XNNPACK's quantizer passes over a convolution whose weight it has met, and its kernels refuse a bias that is scaled
    for the input of another call. Linears' weights may be many times shared and large: they are rounded as they are.
    """
    seen: set[str] = set()
    own: dict[str, str] = {}
    for node in list(module.graph.nodes):
        for place in (place for place in _OWN.get(node.target, ()) if place < len(node.args)):
            given = node.args[place]
            if not isinstance(given, Node) or given.op != "get_attr":
                continue
            if (name := str(given.target)) in seen:
                owner, _, last = name.rpartition(".")
                copied = nn.Parameter(_constant(module, given).clone(), requires_grad=False)
                module.get_submodule(owner).register_parameter(f"{last}_{node.name}", copied)
                with module.graph.inserting_before(node):
                    parted = module.graph.get_attr(f"{name}_{node.name}")
                parted.meta = dict(given.meta)
                node.update_arg(place, parted)
                own[str(parted.target)] = name
            seen.add(name)
    module.recompile()
    return own


def layer_of(node: Node) -> str:
    """The layer whose weight a node of an exported program reads, by its own name in the source; "" for other nodes."""
    weight = node.args[1] if len(node.args) > 1 else None
    if not isinstance(weight, Node) or weight.op != "get_attr":
        return ""
    return str(weight.target).removeprefix(_PREFIX).rpartition(".")[0]


def layers_with_grids(program: ExportedProgram) -> list[str]:
    """Layers whose input the program rounds on a learned grid."""
    nodes = program.module(check_guards=False).graph.nodes
    found = [layer_of(node) for node in nodes if node.args and _has_grid(node.args[0])]
    return [layer for layer in dict.fromkeys(found) if layer]


def run_module(module: Any, signature: Signature, feeds: Feeds) -> tuple[Tensor, ...]:
    """The outputs of a program's module."""
    with torch.inference_mode():
        return as_tuple(module(*positional(signature, feeds)))


@dataclass(frozen=True)
class _Coded:
    """A weight as the model has it, and its grid."""

    encoding: Encoding
    weight: Tensor


class _Fixed(FixedQParamsObserver):  # type: ignore[misc]
    """A grid that is known beforehand, one for the tensor or one for each entry of `ch_axis`."""

    def __init__(self, scale: Tensor, zero_point: Tensor, like: Any, low: int, high: int, axis: int | None):
        scheme = torch.per_tensor_affine if axis is None else torch.per_channel_symmetric
        super().__init__(1.0, 0, dtype=like.dtype, qscheme=scheme, quant_min=low, quant_max=high)
        self.scale, self.zero_point, self.ch_axis = scale.float(), zero_point.int(), 0 if axis is None else axis


def _with_learned(quantizer: Quantizer, encodings: Mapping[str, _Coded], learned: Learned) -> Quantizer:
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


def _by_attribute(program: ExportedProgram, encodings: Mapping[str, Encoding]) -> dict[str, _Coded]:
    """Encoded weights by the names that the program has for them: torch picks one for a layer at two places."""
    state = program.state_dict
    owned = {state[f"{_PREFIX}{name}"].data_ptr(): encoding for name, encoding in encodings.items()
             if f"{_PREFIX}{name}" in state}  # fmt: skip
    return {name: _Coded(owned[tensor.data_ptr()], tensor.detach()) for name, tensor in state.items()
            if tensor.data_ptr() in owned}  # fmt: skip


def _fix_observers(
    model: GraphModule, observers: dict[Any, Any], coded: Mapping[str, _Coded], learned: Learned
) -> None:
    for node in model.graph.nodes:
        layer = layer_of(node)
        if not layer:
            continue
        given, weight = node.args[0], node.args[1]
        own = coded.get(str(weight.target))
        if own is not None:
            why = _fix_weight(observers, (weight, node), own, _constant(model, weight))
            _record(learned.weights, learned.not_taken, layer, why)
        if _has_grid(given):
            why = _fix_input(observers, (given, node))
            _record(learned.inputs, learned.not_taken, layer, why)


def _record(done: list[str], not_taken: dict[str, str], layer: str, why: str) -> None:
    if why:
        not_taken[layer] = why
    elif layer not in done:  # a layer may be called twice
        done.append(layer)


def _fix_weight(observers: dict[Any, Any], edge: tuple[Node, Node], own: _Coded, weight: Tensor) -> str:
    """Why the weight's own codes cannot be kept; "" where they are. `weight` has the normalization after it inside."""
    observer, encoding = observers.get(edge), check_encoding(str(edge[0].target), own.encoding)
    if observer is None:
        return "stays in floating point"
    if encoding.axis != 0 or encoding.scale.shape[1] > 1:
        return f"kernels have one scale per output channel (got groups of {encoding.group})"
    if not encoding.symmetric:
        return "its weight's grid is not symmetric"
    half, factors = encoding.levels // 2, _factors(own.weight, weight)
    lowest = (own.weight.flatten(1) <= -(half - 0.5) * encoding.scale).any(1)
    if encoding.bits == MOST_BITS and (lowest & (factors < 0)).any():
        return "a normalization turns the sign of its lowest code, which has no counterpart"
    scale = encoding.scale[:, 0] * factors.abs()
    observers[edge] = _Fixed(scale, torch.zeros(len(scale)), observer, -half, min(half, 127), axis=0)
    return ""


def _factors(before: Tensor, after: Tensor) -> Tensor:
    """By what each output channel [outputs] was multiplied."""
    rows, changed = before.flatten(1), after.flatten(1)[:, : before[0].numel()]
    if torch.equal(rows, changed):
        return torch.ones(len(rows))
    squares = rows.square().sum(1)
    return torch.where(squares > 0, (rows * changed).sum(1) / squares, 1.0)


def _fix_input(observers: dict[Any, Any], edge: tuple[Node, Node]) -> str:
    """Why the input's own grid cannot be kept; "" where it is. Signed codes have the zero point moved with them."""
    observer, (given, _) = observers.get(edge), edge
    if observer is None:
        return "stays in floating point, its grid simulated"
    scale, zero, low, high = _grid(given)
    shift = -128 if observer.dtype is torch.int8 else 0
    numbers = torch.tensor([scale]), torch.tensor([zero + shift])
    observers[edge] = _Fixed(*numbers, observer, low + shift, high + shift, None)
    return ""


def _constant(model: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), name).detach()
    return tensor


def _has_grid(node: Any) -> bool:
    """Whether a node gives what was just rounded, as the program has it where a model has learned the grid."""
    return isinstance(node, Node) and node.target is _BACK


def _grid(back: Node) -> tuple[float, int, int, int]:
    """Scale, zero point, first and last code."""
    scale, zero, low, high = back.args[1:5]
    return float(scale), int(zero), int(low), int(high)  # type: ignore[arg-type]


def _drop_doubled(model: GraphModule) -> None:
    """Take out rounding to a learned grid where the same rounding follows."""
    for node in list(model.graph.nodes):
        if node.target is _ROUND and _has_grid(node.args[0]):
            scale, zero, low, high = _grid(node.args[0])
            shift = node.args[3] - low
            if (scale, zero + shift, high + shift) == (node.args[1], node.args[2], node.args[4]):
                node.replace_input_with(node.args[0], node.args[0].args[0].args[0])
    model.graph.eliminate_dead_code()
    model.recompile()
