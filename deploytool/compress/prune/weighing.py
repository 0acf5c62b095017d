"""How much an error in a layer's output matters: by what it changes in the model's outputs.

With g = d(r . o) / dy of random projections r of the model's outputs o, where y is a row of the layer's output, an
error e of that row changes the outputs by  E (g . e)^2  to first order. It is taken as  w |e R|^2  with one matrix for
all rows,  R R^T = E g g^T,  and the row's own weight  w = |g|: the square root of its share, so that rows which matter
little in the samples still have a say.

Source: the Kronecker-factored curvature of Martens and Grosse, "Optimizing neural networks with Kronecker-factored
approximate curvature", ICML 2015, section 3, here with the Gauss-Newton matrix of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import check_finite
from deploytool.compress.calls import plain_forward
from deploytool.compress.matrices import matrix, output_rows
from deploytool.compress.shelf import Shelf
from deploytool.errors import UsageProblem, nearest
from deploytool.source import Source

_DRAWS = 2  # random projections for each sample
_SHRINK = 1e-4  # of the mean diagonal, added to it: no direction is free of charge


@dataclass(frozen=True)
class Weighing:
    """root: R [out, out], float64; rows: for every sample the weights of the layer's output rows, 1 in the mean."""

    root: Tensor
    rows: Sequence[Tensor]


def weigh_errors(
    source: Source, layers: Iterable[str], samples: Sequence[dict[str, Tensor]], named: Sequence[str] = ()
) -> dict[str, Weighing]:
    """{layer: its Weighing}, by all floating-point outputs or the named; a layer runs at most once on each sample.

    One backward pass for each sample and draw.
    """
    floats = [spec.name for spec in source.signature.outputs if spec.dtype.startswith("float")]
    unknown = [name for name in named if name not in floats]
    if unknown:
        raise UsageProblem("DT204", f"errors must be weighed by floating-point outputs of the model (got "
                           f"{', '.join(unknown)})", detail=[nearest(name, floats) for name in unknown])  # fmt: skip
    chosen = [name in (named or floats) for name in source.signature.output_names]
    held = {name: source.module.get_submodule(name) for name in layers}
    squares = {name: torch.zeros(2 * (matrix(layer).shape[0],), dtype=torch.float64) for name, layer in held.items()}
    energies: dict[str, Shelf[Tensor]] = {name: Shelf(expected=len(samples)) for name in held}
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        found = _slopes(source, held, sample, chosen, generator)
        for name, slopes in found.items():
            squares[name] += torch.stack([(g.T @ g).double() for g in slopes]).sum(dim=0)
        for name, energy in energies.items():  # one entry for each sample, also for those that do not reach the layer
            each = [g.square().sum(dim=1) for g in found.get(name, [])]
            energy.append(torch.stack(each).mean(dim=0) if each else torch.zeros(0))
    check_finite(squares)
    flat = [name for name, square in squares.items() if not bool(square.any())]
    if flat:
        raise UsageProblem("DT204", "errors can be weighed by outputs only where these can be differentiated (got no "
                           f"slope at {flat[0]})", fix='set weigh = "alike"')  # fmt: skip
    return {name: Weighing(_root(squares[name]), _relative(energies[name])) for name in held}


def _slopes(
    source: Source, layers: dict[str, nn.Module], sample: dict[str, Tensor], chosen: Sequence[bool],
    generator: torch.Generator,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """For every layer the slopes [rows, out] of random projections of the chosen outputs."""
    added: dict[str, Tensor] = {}

    def probe(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        added[name] = torch.zeros_like(output, requires_grad=True)
        return output + added[name]

    handles = [layer.register_forward_hook(partial(probe, name)) for name, layer in layers.items()]
    try:
        with plain_forward(), torch.enable_grad():
            outputs = source.flat(*(sample[n] for n in source.signature.input_names))
            outputs = [output for output, wanted in zip(outputs, chosen, strict=True) if wanted]
            slopes: dict[str, list[Tensor]] = {name: [] for name in added}
            for draw in range(_DRAWS):
                value = _projected(outputs, generator)
                if not value.requires_grad:
                    return {name: [output_rows(layers[name], t)] for name, t in added.items()}
                found = torch.autograd.grad(value, list(added.values()), retain_graph=draw + 1 < _DRAWS,
                                            materialize_grads=True)  # fmt: skip
                for name, slope in zip(added, found, strict=True):
                    slopes[name].append(output_rows(layers[name], slope))
            return slopes
    finally:
        for handle in handles:
            handle.remove()


def _projected(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """A random projection of the outputs, in which each row of each output counts the same."""
    value = torch.zeros(())
    for output in outputs:
        rows = output.reshape(len(output), -1) if output.ndim else output.reshape(1, 1)
        noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
        value = value + (rows * noise / rows.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)).sum()
    return value


def _root(square: Tensor) -> Tensor:
    """The lower triangular R of R R^T, whose trace is 1."""
    even = square / square.trace()
    even.diagonal().add_(_SHRINK / len(even))
    root: Tensor = torch.linalg.cholesky(even)
    return root


def _relative(energies: Sequence[Tensor]) -> Shelf[Tensor]:
    mean = torch.cat([energy.sqrt() for energy in energies]).mean()  # one number for each row: little beside the rows
    return Shelf((energy.sqrt() / mean for energy in energies), expected=len(energies))
