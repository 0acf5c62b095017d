"""An ONNX file as MODEL. Its reference is the graph itself, run by ONNX Runtime with every optimization off."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor
from torch import Tensor, nn

from deploytool.errors import DeployError, InputRefused
from deploytool.load.flat import FlatModule
from deploytool.load.infer import infer_signature
from deploytool.load.made_samples import made_samples
from deploytool.load.npz_samples import read_samples
from deploytool.load.resolve import describe
from deploytool.signature import Dim, Outputs, TensorSpec
from deploytool.source import ModelRef, Source

_RUNTIME_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
_UNKNOWN = ("No Op registered for ", "No opset import for domain ")  # how the checker's complaints of these begin
_LOG_FATAL = 4


class OnnxModule(nn.Module):
    """Runs the graph of a file as it stands: no node fused, moved or folded. The session is made when first needed,
    with as many threads as torch has then."""

    def __init__(self, path: Path, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.path = path
        self.names = outputs
        self._session: ort.InferenceSession | None = None

    def forward(self, **feeds: Tensor) -> dict[str, Tensor]:
        """Named tensors in, named tensors out; raises InputRefused where ONNX Runtime does."""
        if self._session is None:
            self._session = _plain_session(self.path)
        try:
            arrays = self._session.run(list(self.names), {name: tensor.numpy() for name, tensor in feeds.items()})
        except Exception as error:  # the library raises a class of its own per status, without a common base
            raise InputRefused("DT308", f"ONNX Runtime must run {self.path.name} (got: {str(error)[:800]})",
                               detail=[f"{n}: {list(t.shape)}" for n, t in feeds.items()]) from error  # fmt: skip
        return {name: torch.from_numpy(np.array(array)) for name, array in zip(self.names, arrays, strict=True)}


def open_onnx(ref: ModelRef) -> Source:
    """The Source of an ONNX file; samples are `ref.samples`, else made from the inputs' types.

    Raises InputRefused: DT307 for what is no sound ONNX file, DT304 for weights with NaN, DT303 for samples that do
    not fit, DT310 for operators that ONNX Runtime does not have.
    """
    path = Path(ref.path)
    model, external, notes = read_onnx(path)
    inputs = _inputs(model.graph)
    module = OnnxModule(path, tuple(value.name for value in model.graph.output))
    module.eval()
    own = [] if ref.samples is None else read_samples(Path(ref.samples), inputs)
    if ref.samples is None:
        samples = [_tensors(feeds) for feeds in made_samples(model.graph, inputs, lambda feeds: _runs(module, feeds))]
    else:
        samples = [_tensors(feeds) for _, feeds in own]
    signature = infer_signature(module, samples, {spec.name: spec.shape for spec in inputs})
    return Source(
        ref=ref,
        module=module,
        flat=FlatModule(module, signature.input_names, signature.output_names),
        signature=signature,
        samples=lambda: iter(samples),
        dependencies=tuple(sorted({path, *external, *(file for file, _ in own)})),
        synthetic=ref.samples is None,
        notes=notes,
    )


def read_onnx(path: Path) -> tuple[ModelProto, set[Path], tuple[str, ...]]:
    """The model without its external data, the files that hold that, and what ONNX's checker has against it that
    ONNX Runtime has not; refuses what is broken, foreign or unsafe."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises a class of its own
        raise _refused(path, f"got {type(error).__name__}: {str(error)[:200]}", [describe(path)]) from error
    if not model.graph.node or not model.opset_import or not model.graph.output:
        raise _refused(path, "it holds no graph with nodes, outputs and an operator set", [describe(path)])
    external = _external_files(path, model)
    _refuse_custom(path, model)
    notes = _check(path, model)
    _refuse_nan(path, model)
    return model, external, notes


def _check(path: Path, model: ModelProto) -> tuple[str, ...]:
    """Refuse what ONNX's checker does, but for operators that it does not know and ONNX Runtime does; these are told.

    Graphs that ONNX Runtime has optimized and saved hold its own operators, some of them under the standard's domain
    or before the operator set that brings them.
    """
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError, or whatever the C++ side raises
        said = str(error).strip()
        if not said.startswith(_UNKNOWN):
            raise _refused(path, f"got: {said[:500]}") from error
        try:
            _plain_session(path)
        except InputRefused as also:
            raise _refused(path, f"got: {said[:500]}", [also.message]) from error
        if early := _early(model.graph, {""}):  # the checker stops at what it says first
            raise _refused(path, f"a node reads {early!r} before it is made") from error
        return (f"ONNX's checker does not know every operator of {path.name}, and ONNX Runtime does: "
                f"{said.splitlines()[0]}",)  # fmt: skip
    return ()


def _early(graph: GraphProto, known: Set[str]) -> str:
    """A value that a node reads and neither `known` ones nor earlier nodes give; "" where there is none."""
    known = {*known, *(value.name for value in (*graph.input, *graph.initializer)),
             *(sparse.values.name for sparse in graph.sparse_initializer)}  # fmt: skip
    for node in graph.node:
        inner = [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
        early = next((name for name in node.input if name not in known), "")
        if early := early or next(filter(None, (_early(body, known) for body in inner)), ""):
            return early
        known |= set(node.output)
    return ""


def _refused(path: Path, why: str, detail: Iterable[str] = ()) -> InputRefused:
    return InputRefused("DT307", f"{path.name} must be a sound ONNX file ({why})", detail=list(detail),
                        fix="export it again with the tool that wrote it, or copy it again")  # fmt: skip


def _tensors_of(graph: GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors_of(inner)


def _external_files(path: Path, model: ModelProto) -> set[Path]:
    """Files with weights beside the graph; they must lie in its folder, be no links, and be long enough."""
    found: set[Path] = set()
    for tensor in _tensors_of(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        place = Path(info.location)
        file = path.parent / place
        if place.is_absolute() or ".." in place.parts or not info.location:
            raise _refused(path, f"its weights must lie beside it, {tensor.name!r} names {info.location!r}")
        if file.is_symlink() or not file.is_file():
            raise _refused(path, f"its weights must lie in {info.location!r}, which is no regular file there")
        count = int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if (info.offset or 0) + (info.length or count) > file.stat().st_size:
            raise _refused(path, f"{info.location!r} ends before the weight {tensor.name!r}")
        found.add(file)
    return found


def _refuse_custom(path: Path, model: ModelProto) -> None:
    """Operators of other domains need a library that is not in the file; functions of the file itself are fine."""
    own = {(function.domain, function.name) for function in model.functions}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    foreign = sorted({f"{node.domain}::{node.op_type}" for body in bodies for node in _nodes(body)
                      if node.domain not in _RUNTIME_DOMAINS and (node.domain, node.op_type) not in own})  # fmt: skip
    if foreign:
        raise InputRefused("DT310", f"{path.name} must use operators that ONNX Runtime has (got custom ones of domain "
                           f"{', '.join(sorted({name.partition('::')[0] for name in foreign}))})", detail=foreign[:10],
                           fix="export the model with standard operators in their place")  # fmt: skip


def _nodes(body: Iterable[Any]) -> Iterable[Any]:
    for node in body:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(graph.node)


def _refuse_nan(path: Path, model: ModelProto) -> None:
    """NaN only: masks hold infinity."""
    bad = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16):
            continue
        copy = tensor
        if tensor.data_location == TensorProto.EXTERNAL:
            copy = TensorProto()
            copy.CopyFrom(tensor)
            load_external_data_for_tensor(copy, str(path.parent))
        if np.isnan(numpy_helper.to_array(copy)).any():
            bad.append(tensor.name)
    if bad:
        raise InputRefused("DT304", f"the weights of {path.name} must be numbers (got NaN in {len(bad)} tensors)",
                           detail=bad[:10], fix="train again or load a sound checkpoint")  # fmt: skip


def _inputs(graph: GraphProto) -> tuple[TensorSpec, ...]:
    """The graph's inputs that are no weights. A free dimension without a name is "batch" when it is the first axis."""
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    if not values:
        raise InputRefused("DT307", "an ONNX graph must have an input (got none)")
    return tuple(TensorSpec(value.name, _dtype(value), tuple(_dims(value))) for value in values)


def _dtype(value: ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value")
    code = value.type.tensor_type.elem_type
    name = helper.tensor_dtype_to_np_dtype(code).name if kind == "tensor_type" and code else str(kind)
    if kind != "tensor_type" or name not in _NUMBERS or not value.type.tensor_type.HasField("shape"):
        raise InputRefused("DT303", f"input {value.name!r} must be a tensor of numbers with a known rank (got {name})",
                           fix="export the model with tensors as its inputs")  # fmt: skip
    return str(name)


_NUMBERS = {"bool", "float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64",
            "int64"}  # fmt: skip


def _dims(value: ValueInfoProto) -> Iterable[Dim]:
    for axis, dim in enumerate(value.type.tensor_type.shape.dim):
        if dim.HasField("dim_value") and dim.dim_value >= 0:
            yield int(dim.dim_value)
        else:
            yield _plain_name(dim.dim_param) or ("batch" if axis == 0 else f"{value.name}_dim{axis}")


def _plain_name(text: str) -> str:
    """A dimension's name; blanks are taken out of formulas such as "past + 1", which some exporters write."""
    try:
        return ast.unparse(ast.parse(text, mode="eval")) if text else ""
    except SyntaxError:
        return text


def _tensors(feeds: Outputs) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}


def _runs(module: OnnxModule, feeds: Outputs) -> str:
    """What ONNX Runtime says against these feeds; "" when they run."""
    try:
        with torch.inference_mode():
            outputs = module(**_tensors(feeds))
    except DeployError as error:
        if error.code != "DT308":
            raise
        return error.message
    empty = [name for name, tensor in outputs.items() if not tensor.numel()]
    return f"output {empty[0]!r} is empty" if empty else ""


def _plain_session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see OnnxModule.forward
        raise InputRefused("DT310", f"ONNX Runtime must open {path.name} (got: {str(error)[:800]})",
                           fix="export the model again with an operator set that it has") from error  # fmt: skip
    bad = [f"{output.name}: {output.type}" for output in session.get_outputs() if not output.type.startswith("tensor(")]
    if bad:
        raise InputRefused("DT302", "every output of the graph must be a tensor", detail=bad)
    return session


def onnx_layers(path: Path) -> list[dict[str, Any]]:
    """The weights of a file as `load.describe` tells layers: name, the operator that reads it, shape, bytes, zeros."""
    model = onnx.load(path)
    users: dict[str, str] = {}
    for node, name in itertools.chain.from_iterable(((n, i) for i in n.input) for n in model.graph.node):
        users.setdefault(name, node.op_type)
    rows = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        rows.append({"name": tensor.name, "kind": users.get(tensor.name, "unused"), "shape": list(array.shape),
                     "parameters": int(array.size), "size_bytes": int(array.nbytes),
                     "sparsity": 1.0 - int(np.count_nonzero(array)) / max(array.size, 1), "tied_to": None})  # fmt: skip
    return rows
