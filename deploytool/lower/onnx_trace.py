"""Traces a module to an ONNX graph with TorchScript, keeping the weights out of the graph while torch works on it.

torch's exporter copies every weight several times and compares them pairwise. Here the weights are lent to the traced
call as ordinary inputs, so its passes see names and shapes only, and are attached as initializers when it is done:
SmolLM2-135M exports in a fifth of the time, and no weight is held twice.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from deploytool.load.flat import no_fast_path
from deploytool.lower.onnx_attention import own_attention
from deploytool.signature import Signature
from deploytool.source import Source

Places = list[tuple[nn.Module, str]]


def trace(source: Source, example: tuple[Tensor, ...], opset: int) -> ir.Model:
    """The ONNX graph of `source.flat`, with the weights as initializers named as in the module's state dict.

    Raises whatever torch raises when it cannot trace or translate the module.
    """
    weights = weight_places(source.flat)
    names = weight_names(source, [tensor for tensor, _ in weights])
    lent = _Lent(source.flat, weights, len(example)).eval()
    buffer = io.BytesIO()
    with torch.no_grad(), _quiet(), no_fast_path(), own_attention(opset):
        torch.onnx.export(
            lent, (*example, *(tensor for tensor, _ in weights)), buffer,  # type: ignore[arg-type]  # files are taken
            dynamo=False, opset_version=opset,
            input_names=[*source.signature.input_names, *names], output_names=list(source.signature.output_names),
            dynamic_axes=dynamic_axes(source.signature), export_params=False, do_constant_folding=False,
        )  # fmt: skip
    model = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
    _attach(model.graph, dict(zip(names, (tensor for tensor, _ in weights), strict=True)))
    return model


def weight_places(module: nn.Module) -> list[tuple[Tensor, Places]]:
    """Every parameter and buffer once, with all the places where it is registered: tied weights have several."""
    found: dict[int, tuple[Tensor, Places]] = {}
    for owner in module.modules():
        own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in own:
            found.setdefault(id(tensor), (tensor, []))[1].append((owner, name))
    return list(found.values())


def weight_names(source: Source, tensors: list[Tensor]) -> list[str]:
    """Unique names of the weights: those of the user's module, of the flat one for what only that has."""
    known: dict[int, str] = {}
    for module in (source.module, source.flat):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            known.setdefault(id(tensor), name)
    taken = {*source.signature.input_names, *source.signature.output_names}
    names = []
    for tensor in tensors:
        name = known[id(tensor)]
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def dynamic_axes(signature: Signature) -> dict[str, dict[int, str]]:
    """The free dimensions by tensor name and axis, as torch's exporter wants them."""
    return {
        spec.name: {axis: dim for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in (*signature.inputs, *signature.outputs)
    }


class _Lent(nn.Module):
    """Calls `module` with its weights replaced by the last of the given tensors, and has no state of its own."""

    def __init__(self, module: nn.Module, weights: list[tuple[Tensor, Places]], inputs: int):
        super().__init__()
        self.module = module
        self.weights = weights
        self.inputs = inputs

    def forward(self, *tensors: Tensor) -> Any:
        with _replaced(self.weights, tensors[self.inputs :]):
            return self.module(*tensors[: self.inputs])

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: what is in the state dict becomes a parameter of the traced graph."""
        return {} if destination is None else destination


@contextmanager
def _replaced(weights: list[tuple[Tensor, Places]], tensors: tuple[Tensor, ...]) -> Iterator[None]:
    # A parameter must be deleted before a plain tensor may take its name; setattr then also updates the flat
    # weights that recurrent modules keep beside their parameters.
    try:
        for (_, places), tensor in zip(weights, tensors, strict=True):
            _put(places, tensor)
        yield
    finally:
        for tensor, places in weights:
            _put(places, tensor)


def _put(places: Places, tensor: Tensor) -> None:
    for owner, name in places:
        if name in dict(owner.named_parameters(recurse=False)) or name in vars(owner):
            delattr(owner, name)
        setattr(owner, name, tensor)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter is deprecated as a whole, and each number that a trace fixes is told of; parity judges both."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _attach(graph: ir.Graph, weights: dict[str, Tensor]) -> None:
    """Turn the graph inputs that are weights into initializers; those that nothing uses are dropped."""
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            tensor = weights[str(value.name)]
            value.const_value = TorchTensor(tensor, name=value.name)
            value.shape = ir.Shape(tensor.shape)
            graph.register_initializer(value)
