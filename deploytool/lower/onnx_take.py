"""Takes a user's ONNX graph as the portable artifact: the same nodes, written as every other graph here is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploytool.artifact import Artifact, Step, versions
from deploytool.errors import InputRefused
from deploytool.lower.onnx import OPSET, SESSION
from deploytool.lower.onnx_write import EMBED_LIMIT_BYTES, ENTRY, save
from deploytool.source import Source
from deploytool.storage import writing

_OLDEST = 13  # quantizers and engines want per-axis scales and axes as inputs, which came with it
_NEWEST = 22  # as OPSET: later operators are refused by some engine
_PACKAGES = ("onnx", "onnx-ir")


def take_onnx(source: Source, out: Path) -> Artifact:
    """Write the graph of the file `source.ref.path` into the folder `out`.

    Weights that are listed as inputs too become weights only, the file's own functions are written out, free
    dimensions get the names of the signature, and an operator set that some engine is too old or too new for is
    converted. Raises InputRefused DT305 where that fails.
    """
    started = time.perf_counter()
    path = Path(source.ref.path)
    try:
        model = ir.load(path)
        was = model.opset_imports.get("", OPSET)
        if not _OLDEST <= was <= _NEWEST:
            model = _converted(path)
        passes.RemoveInitializersFromInputsPass()(model)
        passes.InlinePass()(model)
        _declare(source, model.graph)
        if sum(weight.nbytes for weight in _weights(model)) < EMBED_LIMIT_BYTES:
            model = ir.external_data.load_to_model(model)
        out.mkdir(parents=True, exist_ok=True)
        with writing(out):
            save(model, out)
    except (InputRefused, OSError):
        raise
    except Exception as error:  # onnx and onnx-ir raise ValueError, TypeError, ConvertError, their passes' own ...
        raise InputRefused("DT305", f"the graph of {path.name} must be one that can be rewritten (got "
                           f"{type(error).__name__}: {str(error)[:500]})",
                           fix=f"export it again with operator set {OPSET}") from error  # fmt: skip
    settings: dict[str, Any] = {"exporter": "none", "why": "the model is an ONNX file",
                                "opset": model.opset_imports.get("", OPSET), "opset_of_the_file": was}  # fmt: skip
    return Artifact(
        folder=out, backend="onnxruntime", format="onnx", entry=ENTRY, precision="fp32", signature=source.signature,
        settings=SESSION,
        history=(Step("lower", settings, versions(_PACKAGES), time.perf_counter() - started),),
    ).save()  # fmt: skip


def _converted(path: Path) -> ir.Model:
    return ir.from_proto(onnx.version_converter.convert_version(onnx.load(path), OPSET))


def _weights(model: ir.Model) -> list[ir.TensorProtocol]:
    return [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]


def _declare(source: Source, graph: ir.Graph) -> None:
    """Shapes of inputs as the signature names them; of outputs too, which some exporters leave out."""
    for specs, values in ((source.signature.inputs, graph.inputs), (source.signature.outputs, graph.outputs)):
        for spec, value in zip(specs, values, strict=True):
            value.shape = ir.Shape(spec.shape)
