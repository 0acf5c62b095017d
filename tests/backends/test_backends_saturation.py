"""int8 products must not overflow 16-bit sums, on this CPU and on those without VNNI."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from workshop import Workshop, cosine

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.saturation import counted, pair_sums, told

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


@pytest.mark.parametrize(
    ("codes", "excess"),
    [
        ([[127, 1, 127, 1]], 0),  # 255 * 128 is 32640
        ([[127, 2, 0, 0]], 255 * 129 - 32767),
        ([[0, -127, -127, 0]], 255 * 254 - 32768),  # of an odd k too
        ([[127, -127, 127, -127]], 0),  # of either sign one alone counts
        ([[127, 0, 127, 0], [1, 1, 64, 65]], 255 * 129 - 32767),
        ([[64] * 4, [-64] * 4], 0),  # 7 bits
        ([[-128]], 0),
    ],
)  # fmt: skip
def test_the_bound_is_the_worst_pair_of_neighbours(codes: list[list[int]], excess: int) -> None:
    """The excess must be that of the largest sum of one sign of two neighbours, along the inner dimension alone."""
    rows = np.array(codes, np.int8)
    for array, axis in ((rows, 0), (rows.T, 1)):
        assert pair_sums(array, axis).excess == excess
        assert pair_sums(array, axis).can_saturate is (excess > 0)


def test_the_bound_is_what_brute_force_finds() -> None:
    """No activations may give a pair of products outside the bound, and some must reach it."""
    codes = np.random.default_rng(0).integers(-128, 128, (3, 6), np.int8)
    ends = np.array([(a, b) for a in (0, 255) for b in (0, 255)])
    sums = [int(a * row[k] + b * row[k + 1]) for row in codes.astype(int) for k in range(5) for a, b in ends]
    found = pair_sums(codes, 0)
    assert (found.lowest, found.highest) == (min(sums), max(sums))


def test_convolutions_are_bounded_in_both_orders() -> None:
    """Neighbours in a kernel's row and neighbours among its channels must both count."""
    beside, behind = np.zeros((2, 1, 3, 3, 3), np.int8)
    beside[0, 0, 0, :2] = behind[0, :2, 0, 0] = 100
    assert pair_sums(beside, 0).can_saturate and pair_sums(behind, 0).can_saturate


@pytest.mark.parametrize("name", ["ort-int8", "ort-static-int8"])
def test_weights_that_cannot_saturate_keep_eight_bits(workshop: Workshop, name: str) -> None:
    """Of two linears, that without a pair of neighbours must have 8 bits and the other 7, and none may saturate."""
    artifact = build_artifact(workshop.request("unpaired", load_checked_target(name)), {})
    assert sorted(_onnx_largest(artifact.folder).values()) in ([63, 127], [64, 127])
    assert len(artifact.settings["weights_in_8_bits"]) == 1
    assert artifact.settings["can_saturate"] == {"weights": 0, "of": 2}
    assert told(artifact.settings, []) == []
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("unpaired"):
            (exact,), (got,) = workshop.reference("unpaired", feeds).values(), runner.run(feeds).values()
            assert cosine(exact, got) > 0.999


@pytest.mark.parametrize("name", ["ort-int8", "ort-static-int8"])
def test_what_can_saturate_is_counted_and_told(workshop: Workshop, name: str) -> None:
    """With 8 bits for all, the weight of full rows alone must be counted, and the report's sentence must name it.

    It says of the CPU here whether it has VNNI.
    """
    artifact = build_artifact(workshop.request("unpaired", load_checked_target(name), reduce_range=False), {})
    found = artifact.settings["can_saturate"]
    assert (found["weights"], found["of"]) == (1, 2) and found["excess"] > 0
    assert artifact.settings["weights_in_8_bits"] == []  # none beside those that were asked for
    for flags, here in (([], "has none"), (["avx2", "avx_vnni"], "has it"), (["avx512_vnni"], "has it")):
        (sentence,) = told(artifact.settings, flags)
        assert "1 of 2" in sentence and found["worst"] in sentence
        assert f"without VNNI (that of this machine {here})" in sentence


def test_recurrent_weights_are_counted(workshop: Workshop) -> None:
    """The weights of recurrent layers must be counted: in 7 bits none can saturate, in 8 some can."""
    seven, eight = (build_artifact(workshop.request("lstm", load_checked_target("ort-int8"), reduce_range=reduced), {})
                    .settings["can_saturate"] for reduced in (True, False))  # fmt: skip
    assert seven["of"] == eight["of"] >= 2
    assert seven["weights"] == 0 < eight["weights"]


def test_nothing_counted_is_nothing_told() -> None:
    """Without weights, and for artifacts that count none, there must be no sentence."""
    assert counted([]) == {"weights": 0, "of": 0}
    assert told({}, []) == told({"can_saturate": counted([])}, []) == []


def _fbgemm(folder):  # type: ignore[no-untyped-def]
    """Largest integer weight of the packed linears in the script."""
    import torch

    from deploytool.backends.torchscript_make import quiet_jit

    with quiet_jit():
        script = torch.jit.load(str(folder / "model.pt"))
    graph = script.graph
    packed = [node.output().toIValue() for node in graph.nodes() if node.kind() == "prim::Constant"]
    weights = [torch.ops.quantized.linear_unpack(p)[0] for p in packed if "LinearPackedParams" in str(type(p)) + str(p)]
    return max(int(w.int_repr().abs().max()) for w in weights)


def _onnx(folder: Path) -> int:
    return max(_onnx_largest(folder).values())


def _onnx_largest(folder: Path) -> dict[str, int]:
    """The largest integer of every int8 weight."""
    onnx = pytest.importorskip("onnx")
    tensors = onnx.load(folder / "model.onnx").graph.initializer
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8}
    return {name: int(np.abs(array.astype(int)).max()) for name, array in arrays.items() if array.ndim > 1}


def _openvino(folder):  # type: ignore[no-untyped-def]
    ov = pytest.importorskip("openvino")
    constants = [op for op in ov.Core().read_model(folder / "model.xml").get_ops() if op.get_type_name() == "Constant"]
    arrays = [op.get_data() for op in constants if op.get_element_type() == ov.Type.i8]
    return max(int(np.abs(array.astype(int)).max()) for array in arrays)
