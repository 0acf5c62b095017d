"""int8 products must not overflow 16-bit sums, on this CPU and on those without VNNI."""

from __future__ import annotations

import numpy as np
import pytest
from workshop import Workshop

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact

INT8 = ("fbgemm", "ort-int8", "ort-static-int8", "openvino-int8")


@pytest.mark.parametrize("name", INT8)
def test_the_exact_answer_is_given(workshop: Workshop, name: str) -> None:
    """64 products of the largest weight and the largest activation must sum to 63, not to the 32 of a saturated sum."""
    artifact = build_artifact(workshop.request("saturating", load_checked_target(name)), {})
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("saturating"):
            np.testing.assert_allclose(runner.run(feeds)["sum"], 63, atol=0.6)


@pytest.mark.parametrize("name", INT8)
def test_weights_keep_to_seven_bits(workshop: Workshop, name: str) -> None:
    """No stored weight may exceed 64: with VNNI the exact answer comes either way, so a run alone proves little."""
    artifact = build_artifact(workshop.request("saturating", load_checked_target(name)), {})
    largest = {"fbgemm": _fbgemm, "openvino-int8": _openvino}.get(name, _onnx)(artifact.folder)
    assert 32 <= largest <= 64


@pytest.mark.parametrize(("name", "setting"), [("fbgemm", {"weight_bits": 8}), ("ort-int8", {"reduce_range": False})])
def test_the_unsafe_setting_is_seen(workshop: Workshop, name: str, setting: dict[str, int]) -> None:
    """With 8-bit weights, which can saturate, the check above must find the larger ones."""
    artifact = build_artifact(workshop.request("saturating", load_checked_target(name), **setting), {})
    assert {"fbgemm": _fbgemm, "ort-int8": _onnx}[name](artifact.folder) > 64


def _fbgemm(folder):  # type: ignore[no-untyped-def]
    """Largest integer weight of the packed linears in the script."""
    import torch

    from deploytool.backends.torchscript import torch_jit

    with torch_jit():
        script = torch.jit.load(str(folder / "model.pt"))
    graph = script.graph
    packed = [node.output().toIValue() for node in graph.nodes() if node.kind() == "prim::Constant"]
    weights = [torch.ops.quantized.linear_unpack(p)[0] for p in packed if "LinearPackedParams" in str(type(p)) + str(p)]
    return max(int(w.int_repr().abs().max()) for w in weights)


def _onnx(folder):  # type: ignore[no-untyped-def]
    onnx = pytest.importorskip("onnx")
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    arrays = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
    return max(int(np.abs(array.astype(int)).max()) for array in arrays if array.size > 8)


def _openvino(folder):  # type: ignore[no-untyped-def]
    ov = pytest.importorskip("openvino")
    constants = [op for op in ov.Core().read_model(folder / "model.xml").get_ops() if op.get_type_name() == "Constant"]
    arrays = [op.get_data() for op in constants if op.get_element_type() == ov.Type.i8]
    return max(int(np.abs(array.astype(int)).max()) for array in arrays)
