"""Layers with fewer inputs or outputs, as an edit that a compressed folder can hold; the weights come afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# How a layer calls its sizes: (inputs, outputs).
_SIZES = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: ("in_channels", "out_channels"),
    nn.Conv2d: ("in_channels", "out_channels"),
    nn.BatchNorm1d: ("num_features", "num_features"),
    nn.BatchNorm2d: ("num_features", "num_features"),
}
RESIZABLE = tuple(_SIZES)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer, convolution or batch normalization; ValueError for any other layer."""
    names = _SIZES.get(type(layer))
    if names is None:
        raise ValueError(f"a {type(layer).__name__} cannot be resized")
    return getattr(layer, names[0]), getattr(layer, names[1])


def resize(root: nn.Module, name: str, inputs: int, outputs: int) -> None:
    """Give the named layer tensors of fewer inputs and outputs; which ones stay, the weights say that are put in."""
    layer = root.get_submodule(name)
    old = sizes(layer)
    if not (0 < inputs <= old[0] and 0 < outputs <= old[1]):
        raise ValueError(f"layer {name!r} has {old[0]} inputs and {old[1]} outputs, not {inputs} and {outputs} or more")
    keep(layer, torch.arange(inputs), torch.arange(outputs))


def keep(layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Keep the numbered inputs and outputs of a layer, in the given order, in tensors of its own."""
    tensors = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    for key, tensor in tensors:
        if not tensor.ndim:
            continue
        small = tensor.detach().index_select(0, outputs)
        if tensor.ndim > 1:
            small = small.index_select(1, inputs)
        small = small.contiguous()
        setattr(layer, key, nn.Parameter(small, requires_grad=False) if isinstance(tensor, nn.Parameter) else small)
    names = _SIZES[type(layer)]
    setattr(layer, names[0], len(inputs))
    setattr(layer, names[1], len(outputs))


def set_number(root: nn.Module, name: str, attribute: str, value: int) -> None:
    """Tell a module another whole number of its own, such as how many heads it has; it must have one of that name."""
    module = root.get_submodule(name)
    old = vars(module).get(attribute)
    if type(old) is not int or value < 1:
        raise ValueError(f"{name!r} must have a whole number called {attribute!r}, and {value} be above zero")
    setattr(module, attribute, value)
