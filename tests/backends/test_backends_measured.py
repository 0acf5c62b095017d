"""What ONNX Runtime's profiles choose by times of this machine: what stays fp32, and how weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop, cosine

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends import measured, ort_blocks, ort_mixed, ort_profile  # noqa: E402
from deploytool.backends.base import Request, build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.ort_profile import TURNS, Group, grouped_products, timed_groups  # noqa: E402
from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused, UsageProblem  # noqa: E402
from deploytool.processor import Processor  # noqa: E402
from deploytool.signature import Outputs, Signature, TensorSpec  # noqa: E402
from deploytool.target import Target  # noqa: E402

RANDOM = np.random.default_rng(0)
WIDE = 768


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of turns that are long enough for differences of several times."""
    monkeypatch.setattr(ort_profile, "_SLOT_SECONDS", 0.005)
    monkeypatch.setattr(ort_blocks, "_SLOT_SECONDS", 0.005)


def chain(*weights: np.ndarray) -> Any:
    """x -> a product and a ReLU for each weight -> y; the products are named p0, p1, ..."""
    nodes, at = [], "x"
    for index in range(len(weights)):
        end = "y" if index == len(weights) - 1 else f"r{index}"
        nodes += [helper.make_node("MatMul", [at, f"w{index}"], [f"h{index}"], name=f"p{index}"),
                  helper.make_node("Relu", [f"h{index}"], [end], name=f"relu{index}")]  # fmt: skip
        at = end
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", len(weights[0])])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weights[-1].shape[1]])
    constants = [numpy_helper.from_array(weight.astype(np.float32), f"w{i}") for i, weight in enumerate(weights)]
    return helper.make_model(helper.make_graph(nodes, "g", [given], [result], constants),
                             opset_imports=[helper.make_opsetid("", 17)], ir_version=9)  # fmt: skip


def request_of(workshop: Workshop, model: Any, target: Target, rows: int, **build: Any) -> Request:
    """A request for a graph of float input x and output y, with random feeds."""
    request = workshop.request("mlp", target, mixed="measured", **build)
    assert request.portable is not None
    folder = request.out / "portable"
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)]
    signature = Signature(*((TensorSpec(name, "float32", ("batch", shape[1])),)
                            for name, shape in zip("xy", shapes, strict=True)))  # fmt: skip
    feeds: list[Outputs] = [{"x": RANDOM.standard_normal((rows, shapes[0][1])).astype(np.float32)} for _ in range(3)]
    portable = replace(request.portable, folder=folder, files=(), signature=signature).save()
    return replace(request, portable=portable, signature=signature, calibration=lambda: feeds, cases=lambda: feeds,
                   kept=request.out / "measured")  # fmt: skip


def planted(times: Mapping[str, tuple[float, float]]) -> Callable[..., list[Group]]:
    """A profiler that says of each product these microseconds in fp32 and in int8."""

    def told(plain: Any, rounded: Any, products: Mapping[str, str], feeds: Any, settings: Any) -> list[Group]:
        return [Group((name,), (times[name][0],) * TURNS, (times[name][1],) * TURNS) for name in products]

    return told


def decisions(artifact: Artifact) -> dict[str, str]:
    return decisions_of(artifact.settings)


def decisions_of(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: row["decision"] for row in settings["measured"]["operators"] for name in row["names"]}


def spoilt() -> tuple[np.ndarray, np.ndarray]:
    """Two weights of which int8 ruins the second: the first makes a channel so large that the others round to nothing,
    and the second does not read it."""
    first, second = even(), even()
    first[:, 0] *= 300
    second[0] = 0
    return first, second


def even(width: int = 64) -> np.ndarray:
    return RANDOM.standard_normal((width, width)) / np.sqrt(width)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_a_product_that_int8_slows_down_stays_fp32(
    workshop: Workshop, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of planted times the product that is slower in int8 must stay fp32, and the others become int8.

    The slower one would lose too much: what stays fp32 anyway must not let others be given back for it.
    """
    monkeypatch.setattr(ort_mixed, "timed_groups", planted({"p0": (90, 30), "p1": (20, 25), "p2": (90, 30)}))
    target = load_checked_target("ort-int8")
    target = target.model_copy(update={"parity": target.parity.model_copy(update={"cosine_min": 0.998})})
    request = request_of(workshop, chain(*spoilt(), even()), target, 16, scheme=scheme)
    artifact = build_artifact(request, {})
    assert decisions(artifact) == {"p0": measured.INT8, "p1": measured.SLOWER, "p2": measured.INT8}
    assert artifact.settings["kept_fp32"] == ["p1"] and sum(artifact.settings["int8"].values()) == 2
    floats = {t.name for t in onnx.load(artifact.main_file).graph.initializer if t.data_type == TensorProto.FLOAT}
    assert "w1" in floats and not floats & {"w0", "w2"}


def test_the_profiler_finds_what_int8_slows_down(workshop: Workshop) -> None:
    """Really timed, a wide product must become int8, and one of 4 x 4, which takes less than its rounding, not."""
    model = chain(even(WIDE), np.ones((WIDE, 4)), np.ones((4, 4)))
    artifact = build_artifact(request_of(workshop, model, load_checked_target("ort-int8"), 64), {})
    rows = {row["names"][0]: row for row in artifact.settings["measured"]["operators"]}
    assert (rows["p0"]["decision"], rows["p2"]["decision"]) == (measured.INT8, measured.SLOWER)
    assert rows["p0"]["gain_us"] > 0 >= rows["p2"]["gain_us"] and rows["p0"]["fp32_us"] > rows["p2"]["fp32_us"]


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_the_least_gain_for_its_cost_is_given_back_first(
    workshop: Workshop, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted sensitive product must go back to fp32, alone, although it gains most; then the limit must hold."""
    monkeypatch.setattr(ort_mixed, "timed_groups", planted({"p0": (90, 60), "p1": (99, 30), "p2": (90, 60)}))
    target = load_checked_target("ort-int8")
    target = target.model_copy(update={"parity": target.parity.model_copy(update={"cosine_min": 0.998})})
    request = request_of(workshop, chain(*spoilt(), even()), target, 16, scheme=scheme)
    artifact = build_artifact(request, {})
    assert decisions(artifact) == {"p0": measured.INT8, "p1": measured.GIVEN_BACK, "p2": measured.INT8}
    table = artifact.settings["measured"]
    assert table["loss"] <= table["loss_allowed"] == pytest.approx(0.0015)
    costs = {row["names"][0]: row["sensitivity"] for row in table["operators"]}
    assert costs["p1"] > 10 * max(costs["p0"], costs["p2"])


def test_gain_decides_between_products_that_cost_the_same(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Of two products that cost about as much, the one that gains a tenth must be given back, and the other not."""
    target = load_checked_target("ort-int8")
    for little, other in (("p0", "p1"), ("p1", "p0")):
        model = chain(even(), even(), even())
        monkeypatch.setattr("deploytool.backends.ort_int8.all_effects", lambda *a: {"p0": 0.01, "p1": 0.01})
        monkeypatch.setattr(ort_mixed, "_fewest", lambda loss, most, allowed: 1)
        times = {little: (21.0, 20.0), other: (3000.0, 20.0), "p2": (1.0, 2.0)}
        monkeypatch.setattr(ort_mixed, "timed_groups", planted(times))
        found = decisions(build_artifact(request_of(workshop, model, target, 16), {}))
        assert found == {little: measured.GIVEN_BACK, other: measured.INT8, "p2": measured.SLOWER}


def test_no_gain_at_all_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int8 artifact in which nothing is int8 must not be made; the error must hold the times."""
    monkeypatch.setattr(ort_mixed, "timed_groups", planted({"p0": (20, 25), "p1": (20, 25)}))
    for scheme in ("dynamic", "static"):
        request = request_of(workshop, chain(even(), even()), load_checked_target("ort-int8"), 4, scheme=scheme)
        with pytest.raises(InputRefused, match="2 are not faster") as caught:
            build_artifact(request, {})
        assert caught.value.code == "DT310" and caught.value.detail[0] == "p0: 20.0 us in fp32, 25.0 us in int8"


def test_a_second_build_is_the_same(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change nothing must be measured again; another limit, or another processor, must be."""
    request = request_of(workshop, chain(even(WIDE), even(WIDE)), load_checked_target("ort-int8"), 16)
    first = build_artifact(request, {})
    bytes_before = first.main_file.read_bytes()
    monkeypatch.setattr(ort_mixed, "timed_groups", lambda *given: pytest.fail("it was measured again"))
    second = build_artifact(request, {})
    assert second.settings == first.settings and second.main_file.read_bytes() == bytes_before
    changed = request.target.parity.model_copy(update={"cosine_min": 0.9})
    with pytest.raises(pytest.fail.Exception, match="again"):
        build_artifact(replace(request, target=request.target.model_copy(update={"parity": changed})), {})
    monkeypatch.setattr(measured, "processor", lambda: Processor("another", "", frozenset()))
    with pytest.raises(pytest.fail.Exception, match="again"):
        build_artifact(request, {})


def test_other_processors_cannot_be_measured_here(workshop: Workshop) -> None:
    """A profile for another kind of processor must be refused; the times of this one say nothing about it."""
    target = load_checked_target("ort-int8")
    target = target.model_copy(update={"device": target.device.model_copy(update={"architecture": "riscv64"})})
    with pytest.raises(EnvironmentLacking, match="riscv64") as caught:
        build_artifact(request_of(workshop, chain(even(), even()), target, 4), {})
    assert caught.value.code == "DT402"


def test_a_number_of_products_cannot_be_asked_for_too(tmp_path: Path) -> None:
    """A profile that measures and names a number must be refused."""
    profile = tmp_path / "own.toml"
    profile.write_text('name="own"\ndescription=""\nbackend="onnxruntime"\nprecision="int8"\n[parity]\ncosine_min=0.9\n'
                       '[build]\nmixed="measured"\nkeep_fp32=2\n', encoding="utf-8")  # fmt: skip
    with pytest.raises(UsageProblem, match="keep_fp32") as caught:
        load_checked_target(str(profile))
    assert caught.value.code == "DT202"


def test_what_is_not_weighed_may_lose_too_much(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an int8 LSTM alone loses more than is allowed, that must be said, not left to parity; where it loses more
    than is aimed at, a finding must say so."""
    target = load_checked_target("ort-int8")

    def built(cosine_min: float, int8_us: float) -> Mapping[str, Any]:
        def told(plain: Any, rounded: Any, products: Mapping[str, str], *_: Any) -> list[Group]:
            return [Group((name,), (60.0,) * TURNS, (int8_us,) * TURNS) for name in products]

        monkeypatch.setattr(ort_mixed, "timed_groups", told)
        limits = target.parity.model_copy(update={"cosine_min": cosine_min})
        own = target.model_copy(update={"parity": limits})
        return build_artifact(workshop.request("lstm", own, mixed="measured"), {}).settings

    with pytest.raises(InputRefused, match="with every product back in fp32: by operators that are not") as caught:
        built(1 - 1e-9, 30.0)
    assert caught.value.code == "DT310" and "op_types" in str(caught.value)
    alone = built(0.98, 90.0)
    assert set(decisions_of(alone).values()) == {measured.SLOWER} and len(measured.told(alone)) == 1
    between = built(1 - 1.1 * alone["measured"]["loss"], 30.0)
    assert set(decisions_of(between).values()) == {measured.GIVEN_BACK}
    assert between["measured"]["loss"] > between["measured"]["loss_allowed"]
    assert "still lose" in measured.told(between)[1]


@pytest.mark.parametrize("name", ["ort-int8", "ort-static-int8"])
def test_real_models_keep_to_their_limits(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product must be in the table once, its decision must be the artifact's, and that near eager.

    The model is so small that its products gain nothing: half of the groups are said to, the others keep their times.
    """

    def every_other(*given: Any) -> list[Group]:
        groups = timed_groups(*given)
        return [replace(group, int8_us=(0.0,) * len(group.int8_us)) if index % 2 else group
                for index, group in enumerate(groups)]  # fmt: skip

    monkeypatch.setattr(ort_mixed, "timed_groups", every_other)
    target = load_checked_target(name)
    artifact = build_artifact(workshop.request("attention", target, mixed="measured"), {})
    table = artifact.settings["measured"]
    names = [name for row in table["operators"] for name in row["names"]]
    kept = [name for row in table["operators"] if row["decision"] != measured.INT8 for name in row["names"]]
    assert len(names) == len(set(names)) and artifact.settings["kept_fp32"] == kept
    assert len(names) - len(kept) == sum(artifact.settings["int8"].values()) > 0
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("attention"):
            for key, array in runner.run(feeds).items():
                assert cosine(array, workshop.reference("attention", feeds)[key]) >= target.parity.cosine_min


def test_equal_layers_pool_their_times() -> None:
    """Products of the same operators and shapes must share all their turns; one of another shape must not."""
    model = chain(even(64), even(64), RANDOM.standard_normal((64, 8)))
    feeds = [{"x": RANDOM.standard_normal((4, 64)).astype(np.float32)}]
    tensors = {"p0": "h0", "p1": "h1", "p2": "h2"}
    groups = {g.products[0]: g for g in timed_groups(model, model, tensors, feeds, {"threads": 1})}
    assert groups["p0"].fp32_us == groups["p1"].fp32_us and len(groups["p0"].fp32_us) == 2 * TURNS
    assert len(groups["p2"].fp32_us) == TURNS


def _graph(*nodes: tuple[str, str, Sequence[str], str]) -> Any:
    """Nodes as (name, operator, inputs, output)."""
    return helper.make_graph([helper.make_node(op, list(given), [out], name=name) for name, op, given, out in nodes],
                             "g", [], [])  # fmt: skip


def test_nodes_are_matched_by_the_tensors_between_them() -> None:
    """Products that share a rounded input must be one group; names of nodes must decide nothing."""
    plain = _graph(("q", "MatMul", ("x", "wq"), "q0"), ("qb", "Add", ("q0", "b"), "q1"),
                   ("k", "MatMul", ("x", "wk"), "k1"), ("o", "MatMul", ("q1", "wo"), "y"))  # fmt: skip
    floats = _graph(("swapped", "Gemm", ("x", "wq", "b"), "q1"), ("k", "MatMul", ("x", "wk"), "k1"),
                    ("q", "MatMul", ("q1", "wo"), "y"))  # fmt: skip
    codes = _graph(("round", "QuantizeLinear", ("x",), "xc"), ("k", "MatMulIntegerToFloat", ("xc", "w"), "q1"),
                   ("q", "MatMulIntegerToFloat", ("xc", "v"), "k1"), ("last", "MatMul", ("q1", "wo"), "y"))  # fmt: skip
    found = grouped_products(plain, [floats, codes], {"q": "q0", "k": "k1", "o": "y"})
    assert found == [(("q", "k"), [["swapped", "k"], ["round", "k", "q"]]), (("o",), [["q"], ["last"]])]


def test_nothing_is_guessed() -> None:
    """A product behind which the graphs have no tensor in common must be refused."""
    plain = _graph(("p", "MatMul", ("x", "w"), "y"))
    with pytest.raises(BackendFailed, match="in common"):
        grouped_products(plain, [plain, _graph(("p", "MatMul", ("x", "w"), "z"))], {"p": "y"})


def test_noise_is_no_gain() -> None:
    """Turns that fall to either side must count as no gain; a clear gain must count although turns were disturbed."""
    noisy = Group(("p",), (10.0,) * TURNS, tuple(9.0 if turn % 2 else 11.0 for turn in range(TURNS)))
    clear = Group(("p",), (10.0,) * TURNS, (4.0,) * (TURNS - 2) + (500.0, 30.0))
    assert not noisy.faster and clear.faster and clear.gain_us == 6.0


def test_times_are_those_of_the_profiler() -> None:
    """The same graph on both sides must take about as long, and a wide product longer than a narrow one."""
    model = chain(even(256), RANDOM.standard_normal((256, 8)))
    feeds = [{"x": RANDOM.standard_normal((rows, 256)).astype(np.float32)} for rows in (64, 16)]
    groups = {g.products[0]: g for g in timed_groups(model, model, {"p0": "h0", "p1": "h1"}, feeds, {"threads": 1})}
    assert np.median(groups["p0"].fp32_us) > 3 * np.median(groups["p1"].fp32_us) > 0
    assert 0.5 < np.median(groups["p0"].fp32_us) / np.median(groups["p0"].int8_us) < 2


def test_a_profile_that_lacks_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that the profiler names otherwise than the graph must not be passed over."""
    load = ort_profile.json.loads

    def renamed(text: str) -> Any:
        return [{**e, "name": "x_kernel_time"} if e.get("cat") == "Node" else e for e in load(text)]

    monkeypatch.setattr(ort_profile.json, "loads", renamed)
    model = chain(even(8), even(8))
    with pytest.raises(BackendFailed, match="name each node"):
        timed_groups(model, model, {"p0": "h0"}, [{"x": np.ones((2, 8), np.float32)}], {"threads": 1})


# Weights alone


def weights(workshop: Workshop, name: str, **build: Any) -> Artifact:
    request = workshop.request("decoder", load_checked_target(name), **build)
    return build_artifact(replace(request, kept=request.out / "measured"), {})


def attributes(artifact: Artifact) -> set[tuple[int, int]]:
    """(block size, accuracy level) of the products."""
    nodes = [node for node in onnx.load(artifact.main_file).graph.node if node.op_type == "MatMulNBits"]
    found = [{a.name: a.i for a in node.attribute} for node in nodes]
    return {(one["block_size"], one["accuracy_level"]) for one in found}


@pytest.mark.parametrize("name", ["ort-weight-int8", "ort-int4"])
def test_every_candidate_is_measured(workshop: Workshop, name: str) -> None:
    """All groups and activations must be in the table with times and errors, and the artifact hold the one taken."""
    artifact = weights(workshop, name, group="measured", activations="measured", int8_share=0.0)
    table = artifact.settings["measured"]
    pairs = {(row["group"], row["activations"]) for row in table["candidates"]}
    assert pairs == {(group, way) for group in (16, 32, 64, 128) for way in ("int8", "fp32")}
    assert all(row["ms"] > 0 and row["speed"] > 0 for row in table["candidates"])
    taken = next(row for row in table["candidates"] if row["decision"] == ort_blocks.TAKEN)
    assert taken["beyond"] == [] and table["taken"] == {key: taken[key] for key in ("group", "activations")}
    assert {level for _, level in attributes(artifact)} == {{"fp32": 1, "int8": 4}[taken["activations"]]}
    within = [row for row in table["candidates"] if row["beyond"] == []]
    quickest = max(within, key=lambda row: float(row["speed"]))
    assert taken["speed_high"] * 1.02 >= quickest["speed_low"]


def test_the_quickest_within_the_limits_is_taken(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of planted times the quickest must be taken; where its error is outside the limits, the next."""
    speeds = iter({"ms": 1.0, "speed": speed, "speed_low": speed, "speed_high": speed}
                  for speed in (1.0, 1.5, 2.0, 1.2) * 2)  # fmt: skip
    monkeypatch.setattr(ort_blocks, "_times", lambda *given: next(speeds))
    monkeypatch.setattr(ort_blocks, "GROUPS", (32, 16))
    first = weights(workshop, "ort-int4", group="measured", activations="measured", int8_share=0.0)
    assert first.settings["measured"]["taken"] == {"group": 16, "activations": "int8"}
    assert attributes(first) == {(16, 4)}
    figures = ort_blocks._figures

    def worse(request: Request, runner: Any) -> dict[str, Any]:
        found = figures(request, runner)
        worse.calls += 1  # type: ignore[attr-defined]
        return found | {"beyond": ["planted"]} if worse.calls == 3 else found  # type: ignore[attr-defined]

    worse.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(ort_blocks, "_figures", worse)
    second = weights(workshop, "ort-int4", group="measured", activations="measured", int8_share=0.0)
    assert second.settings["measured"]["taken"] == {"group": 32, "activations": "fp32"}
    assert [row["decision"] for row in second.settings["measured"]["candidates"]] == [
        ort_blocks.SLOWER, ort_blocks.TAKEN, ort_blocks.OUTSIDE, ort_blocks.SLOWER]  # fmt: skip


def test_of_those_as_quick_the_most_exact_is_taken() -> None:
    """A lead of 1 %, and one that the turns do not agree on, must not be bought with precision."""
    for spread, taken in ((0.001, 64), (0.1, 32)):
        rows = [{"group": group, "activations": "int8", "speed": speed, "speed_low": speed - spread,
                 "speed_high": speed + spread, "sqnr_db": sqnr, "beyond": []}
                for group, speed, sqnr in ((32, 1.0, 30.0), (64, 1.09, 25.0), (128, 1.1, 20.0))]  # fmt: skip
        assert ort_blocks._decided(rows)["taken"]["group"] == taken
    assert [row["decision"] for row in rows] == [ort_blocks.TAKEN, ort_blocks.NO_QUICKER, ort_blocks.NO_QUICKER]


def test_errors_are_taken_against_the_recorded_outputs(workshop: Workshop) -> None:
    """Fewer bits must show a larger error, and limits that none holds must be refused with each one's reason."""
    eight = weights(workshop, "ort-weight-int8", group="measured").settings["measured"]["candidates"]
    four = weights(workshop, "ort-int4", group="measured", int8_share=0.0).settings["measured"]["candidates"]
    assert min(row["sqnr_db"] for row in eight) > max(row["sqnr_db"] for row in four) + 10
    target = load_checked_target("ort-int4")
    tight = target.model_copy(update={"parity": target.parity.model_copy(update={"cosine_min": 0.999999})})
    with pytest.raises(InputRefused, match="none does") as caught:
        build_artifact(workshop.request("decoder", tight, group="measured", int8_share=0.0), {})
    assert caught.value.code == "DT310" and len(caught.value.detail) == 4 and "cosine" in caught.value.detail[0]


def test_nothing_to_choose_by_is_refused(workshop: Workshop) -> None:
    """Without recorded outputs no error is known, and nothing may be chosen."""
    request = workshop.request("decoder", load_checked_target("ort-int4"), group="measured")
    with pytest.raises(InputRefused) as caught:
        build_artifact(replace(request, references=tuple), {})
    assert caught.value.code == "DT303"
