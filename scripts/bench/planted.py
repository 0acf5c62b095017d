"""Faults to plant in ONNX artifacts: each changes the graph in place and gives the names of the nodes to be blamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Plant = Callable[[ModelProto, ModelProto], list[str]]


@dataclass(frozen=True)
class Fault:
    """`plant(graph, reference)` changes the artifact's graph; the names are those of the reference's nodes.

    A mild one changes the outputs by less than their limit, and some by nothing: the list was made with the outputs
    seen, so these are counted apart and reported.
    """

    name: str
    kind: str
    model: str
    target: str
    plant: Plant
    mild: bool = False
    seed: int = 0


def nodes(graph: ModelProto, *kinds: str) -> list[NodeProto]:
    return [node for node in graph.graph.node if node.op_type in kinds]


def constant(graph: ModelProto, name: str) -> TensorProto | None:
    return next((t for t in graph.graph.initializer if t.name == name), None)


def put(graph: ModelProto, tensor: TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def fresh(graph: ModelProto, name: str, array: np.ndarray) -> str:
    graph.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return name


def products(graph: ModelProto) -> list[NodeProto]:
    """Products with a constant weight, in order."""
    return [n for n in nodes(graph, "MatMul", "Gemm", "Conv") if constant(graph, n.input[1]) is not None]


def owner(reference: ModelProto, tensor: str) -> list[str]:
    return [node.name for node in reference.graph.node if tensor in node.output]


def after(graph: ModelProto, tensor: str, *steps: tuple[str, Sequence[np.ndarray], dict[str, object]]) -> None:
    """Put operators between a tensor's maker and its readers; the last one's result has the tensor's name."""
    maker = next(node for node in graph.graph.node if tensor in node.output)
    at = list(graph.graph.node).index(maker) + 1
    last = f"{tensor}~0"
    maker.output[list(maker.output).index(tensor)] = last
    for index, (kind, arrays, attributes) in enumerate(steps):
        result = tensor if index == len(steps) - 1 else f"{tensor}~{index + 1}"
        given = [fresh(graph, f"{result}~{index}~{i}", a) for i, a in enumerate(arrays)]
        graph.graph.node.insert(at + index, helper.make_node(kind, [last, *given], [result],
                                                             name=f"{result}~{kind}", **attributes))  # fmt: skip
        last = result


def weight(change: Callable[[np.ndarray], np.ndarray], which: int, square: bool = False) -> Plant:
    """Change the weight of the which-th product."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        found = [(n, t) for n in products(graph) if (t := constant(graph, n.input[1])) is not None]
        node = [n for n, t in found if not square or len(set(t.dims)) == 1][which]
        tensor = constant(graph, node.input[1])
        assert tensor is not None
        old = numpy_helper.to_array(tensor)
        put(graph, tensor, change(old).astype(old.dtype))
        return owner(reference, node.output[0])

    return plant


def quantized(suffix: str, change: Callable[[np.ndarray], np.ndarray], which: int) -> Plant:
    """Change the which-th int8 weight, its scale or its zero point."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        stored = [n.input[1] for n in nodes(graph, "MatMulInteger")][which].removesuffix("_quantized")
        tensor = constant(graph, f"{stored}_{suffix}")
        assert tensor is not None
        old = numpy_helper.to_array(tensor)
        put(graph, tensor, change(old).astype(old.dtype))
        return [n.name for n in reference.graph.node if stored in n.input]

    return plant


def attribute(kind: str, name: str, value: object, which: int = 0) -> Plant:
    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = nodes(graph, kind)[which]
        for index in reversed([i for i, a in enumerate(node.attribute) if a.name == name]):
            del node.attribute[index]
        node.attribute.append(helper.make_attribute(name, value))
        return owner(reference, node.output[0])

    return plant


def swapped(kind: str, which: int = 0, a: int = 0, b: int = 1) -> Plant:
    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = nodes(graph, kind)[which]
        node.input[a], node.input[b] = node.input[b], node.input[a]
        return owner(reference, node.output[0])

    return plant


def dropped(pick: Callable[[ModelProto], NodeProto]) -> Plant:
    """Leave a node out: its readers get its first computed input."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = pick(graph)
        kept = next(name for name in node.input if constant(graph, name) is None)
        gone = node.output[0]
        names = owner(reference, gone)
        readers = [n for n in graph.graph.node if gone in n.input]
        graph.graph.node.remove(node)
        for reader in readers:
            for index, name in enumerate(reader.input):
                if name == gone:
                    reader.input[index] = kept
        return names

    return plant


def mask_add(graph: ModelProto) -> NodeProto:
    """The addition in front of the first softmax."""
    inside = nodes(graph, "Softmax")[0].input[0]
    return next(node for node in graph.graph.node if inside in node.output)


def bias_add(which: int) -> Callable[[ModelProto], NodeProto]:
    def pick(graph: ModelProto) -> NodeProto:
        adds = [n for n in nodes(graph, "Add") if any(constant(graph, name) is not None for name in n.input)]
        return adds[which]

    return pick


def inserted(kind: str, which: int, *steps: tuple[str, Sequence[np.ndarray], dict[str, object]]) -> Plant:
    """Operators behind the which-th node of a kind."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        known = {name for node in reference.graph.node for name in node.output}
        found = [n for n in nodes(graph, kind) if n.output[0] in known]
        tensor = found[which].output[0]
        after(graph, tensor, *steps)
        return owner(reference, tensor)

    return plant


def one_nan(kind: str, which: int) -> Plant:
    """x + 0 * sqrt(limit - max(x)): NaN in the one sample whose largest number is beyond the limit."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        tensor = nodes(graph, kind)[which].output[0]
        after(graph, tensor, ("Identity", (), {}))
        body = f"{tensor}~0"
        axes = fresh(graph, f"{tensor}~axes", np.array([-1, -2], np.int64))
        limit = fresh(graph, f"{tensor}~limit", np.float32(NAN_LIMIT))
        zero = fresh(graph, f"{tensor}~zero", np.float32(0))
        at = next(i for i, n in enumerate(graph.graph.node) if tensor in n.output)
        graph.graph.node.pop(at)
        chain = [("ReduceMax", [body, axes], "m"), ("Sub", [limit, f"{tensor}~m"], "s"), ("Sqrt", [f"{tensor}~s"], "r"),
                 ("Mul", [f"{tensor}~r", zero], "z")]  # fmt: skip
        for kind_, given, name in chain:
            graph.graph.node.insert(at, helper.make_node(kind_, given, [f"{tensor}~{name}"], name=f"{tensor}~{name}"))
            at += 1
        graph.graph.node.insert(at, helper.make_node("Add", [body, f"{tensor}~z"], [tensor], name=f"{tensor}~add"))
        return owner(reference, tensor)

    return plant


NAN_LIMIT = 2.4


def baked(kind: str, position: int, index: int, size: int, which: int = 0) -> Plant:
    """Fix a free dimension of a constant shape."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        fixable = [n for n in nodes(graph, kind) if len(n.input) > position
                   and (t := constant(graph, n.input[position])) is not None
                   and numpy_helper.to_array(t).reshape(-1)[index] in (0, -1, 1)]  # fmt: skip
        node = fixable[which]
        tensor = constant(graph, node.input[position])
        assert tensor is not None
        shape = numpy_helper.to_array(tensor).copy()
        shape[index] = size
        node.input[position] = fresh(graph, f"{node.name}~shape", shape)
        return owner(reference, node.output[0])

    return plant


def truncated(rows: int, clip: bool) -> Plant:
    """Fewer rows in the embedding; with `clip` ids beyond are turned to the last row."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = nodes(graph, "Gather")[0]
        tensor = constant(graph, node.input[0])
        assert tensor is not None
        put(graph, tensor, numpy_helper.to_array(tensor)[:rows])
        if clip:
            top = fresh(graph, "~top", np.array(rows - 1, np.int64))
            at = list(graph.graph.node).index(node)
            graph.graph.node.insert(at, helper.make_node("Min", [node.input[1], top], ["~ids"], name="~min"))
            node.input[1] = "~ids"
        return owner(reference, node.output[0])

    return plant


def blockwise(which: int, bits: int, level: int) -> Plant:
    """A product as MatMulNBits; accuracy level 4 also turns its inputs to int8."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = [n for n in products(graph) if n.op_type == "MatMul"][which]
        tensor = constant(graph, node.input[1])
        assert tensor is not None
        w = numpy_helper.to_array(tensor)
        k, n = w.shape
        block = 32
        padded = np.zeros((n, -(-k // block) * block), np.float32)
        padded[:, :k] = w.T
        groups = padded.reshape(n, -1, block)
        top, middle = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
        scale = np.maximum(np.abs(groups).max(-1, keepdims=True) / top, 1e-12)
        codes = (np.clip(np.round(groups / scale), -middle, top) + middle).astype(np.uint8)
        stored = codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)
        scales = scale.reshape(-1).astype(np.float32)
        names = [fresh(graph, f"{node.name}~q", stored), fresh(graph, f"{node.name}~s", scales)]
        index = list(graph.graph.node).index(node)
        graph.graph.node.insert(index, helper.make_node(
            "MatMulNBits", [node.input[0], *names], list(node.output), name=node.name, domain="com.microsoft",
            K=k, N=n, bits=bits, block_size=block, accuracy_level=level))  # fmt: skip
        graph.graph.node.remove(node)
        if not any(o.domain == "com.microsoft" for o in graph.opset_import):
            graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        return owner(reference, node.output[0])

    return plant


def level(which: int, to: int) -> Plant:
    """Another accuracy level in the which-th product of low-bit weights that the artifact was built with."""

    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = nodes(graph, "MatMulNBits")[which]
        next(a for a in node.attribute if a.name == "accuracy_level").i = to
        return owner(reference, node.output[0])

    return plant


def replaced(kind: str, other: str, which: int = 0) -> Plant:
    def plant(graph: ModelProto, reference: ModelProto) -> list[str]:
        node = nodes(graph, kind)[which]
        node.op_type = other
        return owner(reference, node.output[0])

    return plant


def stale(seed: int, share: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(old: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(seed)
        return np.where(random.random(old.shape) < share, old + random.normal(0, old.std(), old.shape), old)

    return change


def _f(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _h(value: float) -> np.ndarray:
    return np.array(value, np.float16)


def clip_at(limit: float) -> tuple[str, Sequence[np.ndarray], dict[str, object]]:
    return ("Clip", (_f(-limit), _f(limit)), {})


FAULTS = (
    *(Fault(f"transposed {m} {i}", "transposed weight", m, "ort", weight(np.transpose, i, square=True))
      for m, i in (("transformer", 0), ("transformer", 3), ("decoder", 2), ("mlp", 0))),
    *(Fault(f"stale {m} {t} {i}", "stale weights", m, t, weight(stale(i, s), i))
      for m, t, i, s in (("transformer", "ort", 1, 0.1), ("cnn", "ort", 0, 0.1), ("mixer", "ort", 2, 0.05),
                         ("residual", "ort", 1, 0.02), ("decoder", "ort", 4, 0.01))),
    *(Fault(f"stale int8 {m} {i}", "stale weights", m, "ort-int8", quantized("quantized", lambda q: q[::-1], i))
      for m, i in (("transformer", 3), ("decoder", 0))),
    *(Fault(f"zero point {m} {i} {s}", "wrong zero point", m, "ort-int8", quantized("zero_point", lambda z: z + 64, i),
            seed=s) for m, i, s in (("residual", 1, 0), ("mixer", 1, 0), ("residual", 1, 1), ("residual", 1, 2))),
    *(Fault(f"mild zero point {m} {i} by {by}", "wrong zero point", m, "ort-int8",
            quantized("zero_point", lambda z, by=by: z + by, i), mild=True)
      for m, i, by in (("transformer", 0, 12), ("transformer", 4, 12), ("transformer", 5, 12), ("transformer", 3, 64),
                       ("transformer", 4, 64), ("transformer", 5, 64), ("mixer", 0, 64))),
    Fault("mild range", "range too narrow", "transformer", "ort-int8",
          quantized("quantized", lambda q: np.clip(q, -16, 16), 1), mild=True),
    Fault("no bias of a key", "missing bias", "decoder", "ort", dropped(bias_add(1)), mild=True),
    *(Fault(f"scale {m} {i}", "wrong scale", m, "ort-int8", quantized("scale", lambda s: s * 2, i))
      for m, i in (("transformer", 2), ("decoder", 3), ("residual", 0))),
    *(Fault(f"int8 range {m} {i}", "range too narrow", m, "ort-int8",
            quantized("quantized", lambda q: np.clip(q, -16, 16), i)) for m, i in (("transformer", 3), ("mixer", 0))),
    *(Fault(f"saturation {m} {k} {i}", "saturation", m, t, inserted(k, i, clip_at(limit)))
      for m, t, k, i, limit in (("transformer", "ort-int8", "Mul", 3, 0.3), ("residual", "ort", "Gemm", 1, 0.5),
                                ("cnn", "ort", "Conv", 0, 0.4), ("decoder", "ort", "MatMul", 2, 0.5))),
    Fault("swapped matmul", "swapped inputs", "decoder", "ort", swapped("Sub")),
    Fault("swapped div", "swapped inputs", "transformer", "ort", swapped("Div", 0)),
    Fault("swapped norm", "swapped inputs", "transformer", "ort", swapped("LayerNormalization", 1, 1, 2)),
    Fault("swapped norm mixer", "swapped inputs", "mixer", "ort", swapped("LayerNormalization", 0, 1, 2)),
    Fault("no mask transformer", "missing mask", "transformer", "ort", dropped(mask_add)),
    Fault("no mask decoder", "missing mask", "decoder", "ort", dropped(mask_add)),
    *(Fault(f"no bias {m} {i}", "missing bias", m, "ort", dropped(bias_add(i)))
      for m, i in (("transformer", 2), ("mixer", 0), ("decoder", 2))),
    *(Fault(f"softmax axis {m}", "wrong softmax axis", m, t, attribute("Softmax", "axis", a))
      for m, t, a in (("transformer", "ort", 2), ("decoder", "ort", 1), ("mlp", "ort", 0),
                      ("transformer", "ort-int8", 2))),
    *(Fault(f"one nan {m} {k} {i}", "one NaN sample", m, "ort", one_nan(k, i))
      for m, k, i in (("transformer", "LayerNormalization", 0), ("mixer", "LayerNormalization", 1),
                      ("decoder", "LayerNormalization", 0))),
    *(Fault(f"batch {m}", "baked-in batch", m, "ort", baked("Reshape", 1, 0, 2, i))
      for m, i in (("transformer", 0), ("decoder", 1), ("transformer", 2))),
    *(Fault(f"length {m}", "baked-in sequence length", m, "ort", baked("Reshape", 1, 1, 5, i))
      for m, i in (("transformer", 0), ("decoder", 1))),
    *(Fault(f"denormals {m} {k}", "denormals", m, "ort",
            inserted(k, i, ("Mul", (_f(1e-38),), {}), ("Mul", (_f(1e-5),), {}), ("Mul", (_f(1e38),), {}),
                     ("Mul", (_f(1e5),), {})))
      for m, k, i in (("transformer", "LayerNormalization", 1), ("residual", "Gemm", 0))),
    *(Fault(f"vocabulary {m} {r} {c}", "truncated vocabulary", m, "ort", truncated(r, c))
      for m, r, c in (("transformer", 60, True), ("decoder", 90, True), ("transformer", 80, False),
                      ("recurrent", 70, True))),
    *(Fault(f"level {m} {b} {lv} {i}", "accuracy level", m, "ort", blockwise(i, b, lv))
      for m, i, b, lv in (("transformer", 0, 8, 4), ("decoder", 5, 4, 4), ("mixer", 0, 8, 4))),
    *(Fault(f"level flip {m} {t} {i}", "accuracy level", m, t, level(i, 1), mild=True)
      for m, t, i in (("transformer", "ort-int4", 1), ("mixer", "ort-int4", 0), ("residual", "ort-weight-int8", 0),
                      ("decoder", "ort-weight-int8", 3))),
    *(Fault(f"fp16 {m} {k}", "fp16 overflow", m, "trt",
            inserted(k, i, *(("Mul", (_h(6e4),), {}),) * 2, *(("Div", (_h(6e4),), {}),) * 2))
      for m, k, i in (("transformer", "MatMul", 1), ("residual", "Gemm", 0))),
    *(Fault(f"epsilon {m}", "wrong attribute", m, "ort", attribute("LayerNormalization", "epsilon", 0.1, i))
      for m, i in (("transformer", 0), ("mixer", 1))),
    *(Fault(f"activation {m} {k}", "wrong activation", m, "ort", replaced(k, o))
      for m, k, o in (("decoder", "Softmax", "LogSoftmax"), ("mlp", "Softmax", "Hardmax"))),
    *(Fault(f"weight range {m} {i}", "range too narrow", m, "ort",
            weight(lambda w: np.clip(w, -np.abs(w).max() * 0.6, np.abs(w).max() * 0.6), i))
      for m, i in (("cnn", 0), ("transformer", 2))),
)  # fmt: skip
