"""A tiny exported artifact: one matrix product in ONNX, its recorded cases and its report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact, Step
from deploytool.cases import Case
from deploytool.signature import Signature, TensorSpec

WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),),
    (TensorSpec("logits", "float32", ("batch", 3)), TensorSpec("label", "int64", ("batch",))),
)


def make(folder: Path, target: str = "ort", architecture: str = "x86_64", **changes: Any) -> Artifact:
    """An artifact for `target` with three cases and a report that says it passed."""
    folder.mkdir(parents=True)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"]),
             helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0)]  # fmt: skip
    graph = helper.make_graph(
        nodes, "tiny", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3]),
         helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    (folder / "tokenizer.json").write_text("{}")
    save_cases(folder)
    fields: dict[str, Any] = {
        "backend": "onnxruntime", "format": "onnx", "entry": "model.onnx", "precision": "fp32",
        "signature": SIGNATURE, "model": {"name": "tiny", "ref": "tiny.py", "fingerprint": "f" * 64},
        "target": {"name": target, "device": {"architecture": architecture}, "parity": {"cosine_min": 0.9999}},
        "settings": {"threads": 1}, "history": (Step("build", {}, {"onnxruntime": "1.31.1"}, 0.5),), **changes,
    }  # fmt: skip
    artifact = Artifact(folder, **fields).save()
    write_report(artifact)
    return artifact


def save_cases(folder: Path) -> None:
    """Three recorded cases of two samples each."""
    random = np.random.default_rng(1)
    for index in range(3):
        x = random.standard_normal((2, 4)).astype(np.float32)
        outputs = {"logits": x @ WEIGHT, "label": (x @ WEIGHT).argmax(axis=1)}
        Case({"x": x}, outputs, outputs).save(folder / "golden" / f"{index:03}.npz")


def write_report(artifact: Artifact, *, passed: bool = True) -> None:
    """A report that belongs to the artifact as it is now."""
    digest = hashlib.sha256((artifact.folder / "artifact.json").read_bytes()).hexdigest()
    report = {"schema_version": "1.0", "target": artifact.target["name"], "artifact_digest": digest,
              "status": "ok" if passed else "failed", "reason": None,
              "parity": {"passed": passed, "cases": 3, "outputs": {}}}  # fmt: skip
    (artifact.folder / "report.json").write_text(json.dumps(report))


def redo_sums(bundle: Path) -> None:
    """Make SHA256SUMS of a bundle folder right again: an attacker who can write can do that too."""
    files = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    lines = {p.relative_to(bundle).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (bundle / "SHA256SUMS").write_text("".join(f"{lines[n]}  {n}\n" for n in sorted(lines)))


def redo_all(bundle: Path) -> None:
    """Make every checksum of a bundle folder right again: the artifact's, the manifest's and SHA256SUMS."""
    manifest = json.loads((bundle / "deploytool.json").read_text())
    for variant in manifest["variants"]:
        artifact = Artifact.load(bundle / "variants" / variant["target"], check=False).save()
        write_report(artifact)
    for entry in manifest["files"]:
        data = (bundle / entry["path"]).read_bytes()
        entry["size"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (bundle / "deploytool.json").write_text(json.dumps(manifest))
    redo_sums(bundle)


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder and its checksum: to see that nothing changed."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip
