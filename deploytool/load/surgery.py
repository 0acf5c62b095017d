"""Structural changes to a module, named so that they can be written to a file and made again on a fresh module.

An edit is {"kind": a key of EDITS, "layer": the layer's dotted name, ...}. A compressed folder holds its edits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from deploytool.errors import InputRefused, nearest
from deploytool.load.attention_routing import Pattern, reroute
from deploytool.load.factors import embedding_pair, tucker_layers
from deploytool.load.flat import FlatModule
from deploytool.load.fourier import FourierMixing
from deploytool.load.input_grid import add_input_grid
from deploytool.load.plain_attention import plain
from deploytool.load.resize import resize, set_number
from deploytool.source import Source

Edit = Mapping[str, Any]
_NUMBER = "layer_idx"  # by which transformers' layers find their place in a cache


def with_module(source: Source, module: nn.Module, **changes: Any) -> Source:
    """The source with another module in eval mode, its flat form made anew; what the old one gave is forgotten."""
    module.eval().requires_grad_(False)
    names = source.signature.input_names, source.signature.output_names
    return dataclasses.replace(source, module=module, flat=FlatModule(module, *names), seen={}, **changes)


def shell(module: nn.Module) -> nn.Module:
    """A copy of the structure that shares every tensor: for steps that replace parameters and write into none."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def replace_layer(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place that the dotted `name` says, in eval mode."""
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent).register_module(child, layer.eval())


def replace_linear_by_pair(root: nn.Module, name: str, rank: int) -> nn.Sequential:
    """Replace Linear(n, m) by Linear(n, rank, no bias), Linear(rank, m); the new weights are not set yet."""
    old = root.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise ValueError(f"layer {name!r} must be a Linear, not a {type(old).__name__}")
    dtype = old.weight.dtype
    pair = nn.Sequential(  # made without memory first: initial values would cost time and random numbers
        nn.Linear(old.in_features, rank, bias=False, device="meta", dtype=dtype),
        nn.Linear(rank, old.out_features, bias=old.bias is not None, device="meta", dtype=dtype),
    ).to_empty(device=old.weight.device)
    replace_layer(root, name, pair)
    return pair


def replace_by_linear(root: nn.Module, name: str, inputs: int, outputs: int) -> None:
    """Replace a layer that holds as many weights by Linear(inputs, outputs); the new weights are not set yet."""
    old = root.get_submodule(name)
    weight, bias = old.get_parameter("weight"), dict(old.named_parameters(recurse=False)).get("bias")
    if sorted(weight.shape) != sorted((inputs, outputs)) or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"layer {name!r} must hold a weight of {inputs} x {outputs}, not {tuple(weight.shape)}")
    made = nn.Linear(inputs, outputs, bias=bias is not None, device="meta", dtype=weight.dtype)
    replace_layer(root, name, made.to_empty(device=weight.device).requires_grad_(False))


def keep_items(root: nn.Module, name: str, items: Sequence[int]) -> None:
    """Keep only the numbered layers of a list, in their order; layers that know their own number learn the new one."""
    old = root.get_submodule(name)
    if not isinstance(old, (nn.ModuleList, nn.Sequential)):
        raise ValueError(f"layer {name!r} must be a list of layers, not a {type(old).__name__}")
    if not items or max(items) >= len(old):
        raise ValueError(f"{name!r} has layers 0 to {len(old) - 1}, not {list(items)}")
    kept = [old[index] for index in items]
    for number, layer in enumerate(kept):
        for inner in layer.modules():
            if isinstance(getattr(inner, _NUMBER, None), int):
                setattr(inner, _NUMBER, number)
    old._modules.clear()
    for number, layer in enumerate(kept):
        old.add_module(str(number), layer)


EDITS: dict[str, Callable[[nn.Module, Edit], object]] = {
    "input_grid": add_input_grid,
    "keep_items": lambda root, edit: keep_items(root, edit["layer"], edit["items"]),
    "linear_pair": lambda root, edit: replace_linear_by_pair(root, edit["layer"], int(edit["rank"])),
    "attention_pattern": lambda root, edit: reroute(root, edit["layer"], Pattern(**edit["pattern"])),
    "linear": lambda root, edit: replace_by_linear(root, edit["layer"], edit["inputs"], edit["outputs"]),
    "number": lambda root, edit: set_number(root, edit["layer"], edit["attribute"], edit["value"]),
    "conv_tucker": lambda root, edit: replace_layer(
        root, edit["layer"], tucker_layers(root.get_submodule(edit["layer"]), edit["inputs"], edit["outputs"])
    ),
    "embedding_pair": lambda root, edit: replace_layer(
        root, edit["layer"], embedding_pair(root.get_submodule(edit["layer"]), edit["rank"])
    ),
    "fourier": lambda root, edit: replace_layer(
        root, edit["layer"], FourierMixing(edit["width"], edit["tokens"], edit["keyword"], edit["outputs"])
    ),
    "plain_attention": lambda root, edit: replace_layer(root, edit["layer"], plain(root.get_submodule(edit["layer"]))),
    "resize": lambda root, edit: resize(root, edit["layer"], edit["inputs"], edit["outputs"]),
}


def apply_edits(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Make the edits in their order; raises InputRefused when one does not fit the module."""
    for edit in edits:
        if edit.get("kind") not in EDITS:
            raise InputRefused("DT314", f"an edit must be of a known kind (got {edit.get('kind')!r})",
                               detail=[nearest(str(edit.get("kind")), EDITS)],
                               fix="a newer deploytool may have written the folder")  # fmt: skip
        try:
            EDITS[edit["kind"]](root, edit)
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise InputRefused("DT314", f"edit {dict(edit)} must fit the model (got: {error})",
                               fix="the model has changed: compress it again") from error  # fmt: skip
