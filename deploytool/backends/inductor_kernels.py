"""What AOTInductor compiled, written down while it compiles: a package's own kernels cannot be asked any more.

The products are read from the graph that goes to the code generator, and counted in the code that it wrote. A pair of
Q and DQ that no pattern took is there as elementwise code around a product in fp32, and counts as such.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from deploytool.signature import Signature

_LINEAR = ("qlinear_pointwise", "_linear_pointwise", "_mkl_linear")
_MATRIX = ("mm", "addmm", "bmm", "baddbmm")
_CONVOLUTION = ("qconv_pointwise", "qconv2d_pointwise", "convolution", "_convolution_pointwise",
                "_convolution_transpose_pointwise")  # fmt: skip
_ATTENTION = "_scaled_dot_product"
_UNCOUNTED = ("cond", "while_loop", "scan", "_trilinear")  # ways and steps that inputs decide, products of three
_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
# Calls of the written code: of a library's kernel, of a loop that was compiled.
_CALLED = re.compile(r"aoti_torch_cpu_(?:mkldnn_)?_?([a-z0-9_]+)\(")
_LOOPS = re.compile(r"^\s+(?:call_)?(cpp_fused_\w+)\(", re.MULTILINE)


class Recorder:
    """Keeps the products of the graph that Inductor shows it."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.products: list[dict[str, Any]] = []

    def see(self, graph: Graph) -> None:
        """A pass of Inductor's, after freezing and before code is written, that changes nothing."""
        sizes = dict(_sizes(graph, self.signature))
        self.products = [product for node in graph.nodes if (product := _product(node, sizes))]

    def told(self, package: Path) -> dict[str, Any]:
        """The products, and how many kernels of which name the package's code calls."""
        code = _code(package)
        return {"products": self.products, "calls": dict(sorted(Counter(_CALLED.findall(code)).items())),
                "loops": len(_LOOPS.findall(code))}  # fmt: skip


def _sizes(graph: Graph, signature: Signature) -> Iterator[tuple[Any, str]]:
    """Torch's symbols and the signature's names of them."""
    fed = [node for node in graph.nodes if node.op == "placeholder" and isinstance(_value(node), torch.Tensor)]
    for node, spec in zip(fed, signature.inputs, strict=False):
        for size, dim in zip(_value(node).shape, spec.shape, strict=False):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                yield size.node.expr, dim


def _product(node: Node, sizes: dict[Any, str]) -> dict[str, Any] | None:
    name = getattr(node.target, "__name__", "").partition(".")[0]
    known = name in (*_LINEAR, *_MATRIX, *_CONVOLUTION, *_UNCOUNTED) or name.startswith(_ATTENTION)
    if node.op != "call_function" or not known:
        return None
    if name in _UNCOUNTED:
        return {"op": name, "precision": _precision(node), "flops": None}
    precision = "int8" if name.startswith("q") else _precision(node)
    return {"op": name, "precision": precision, "flops": _terms(_flops(name, node), sizes)}


def _flops(name: str, node: Node) -> Any:
    tensors = [_value(given) for given in node.all_input_nodes]
    shapes = [tensor.shape for tensor in tensors if isinstance(tensor, torch.Tensor)]
    out = _output(node)
    if name.startswith(_ATTENTION):  # query, key, value
        query, key, value = (_value(given).shape for given in node.args[:3])
        return 2 * _count(query[:-1]) * _expr(key[-2]) * (_expr(query[-1]) + _expr(value[-1]))
    if name in _CONVOLUTION:
        weight = next(shape for shape in shapes[1:] if len(shape) == len(out))
        transposed = "transpose" in name or (name == "convolution" and bool(node.args[6]))
        return 2 * _count(shapes[0] if transposed else out) * _count(weight[1:])
    left = next(shape for shape in shapes[name in ("addmm", "baddbmm") :] if len(shape) == len(out) or name in _LINEAR)
    return 2 * _count(out) * _expr(left[-1])


def _terms(flops: Any, sizes: dict[Any, str]) -> list[list[Any]] | None:
    """A polynomial of the free dimensions as [factor, {dimension: power}, ...]; None for what is none."""
    try:
        named = sympy.sympify(flops).subs({symbol: sympy.Symbol(dim) for symbol, dim in sizes.items()})
        poly = sympy.Poly(named, *(sympy.Symbol(dim) for dim in sorted({*sizes.values()}) or ["none"]))
        names = [str(symbol) for symbol in poly.gens]
        return [[int(factor), {name: int(power) for name, power in zip(names, powers, strict=True) if power}]
                for powers, factor in poly.terms()]  # fmt: skip
    except (sympy.PolynomialError, TypeError, ValueError, StopIteration):
        return None


def _count(shape: Any) -> Any:
    total: Any = sympy.Integer(1)
    for size in shape:
        total = total * _expr(size)
    return total


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def _output(node: Node) -> Any:
    value = _value(node)
    return (value[0] if isinstance(value, tuple | list) else value).shape


def _precision(node: Node) -> str:
    value = _value(node)
    dtype = (value[0] if isinstance(value, tuple | list) else value).dtype
    return _PRECISIONS.get(dtype, "int8" if dtype in (torch.int8, torch.uint8) else "other")


def _code(package: Path) -> str:
    """The code of the wrapper that calls the kernels."""
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.endswith(".wrapper.cpp")]
        return "\n".join(archive.read(name).decode("utf-8", "replace") for name in names)
