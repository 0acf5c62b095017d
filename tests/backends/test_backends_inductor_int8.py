"""int8 packages of AOTInductor's; that they agree with eager is in test_backends_contract.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop, cosine, need

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

from deploytool.backends import inductor, inductor_int8, pt2e, tables  # noqa: E402
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.exported import export_module  # noqa: E402
from deploytool.backends.inductor_quantizer import OBSERVERS, InductorQuantizer, Plan  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.backends.torchscript_make import example  # noqa: E402
from deploytool.encoding import Encoding  # noqa: E402
from deploytool.errors import EnvironmentLacking, InputRefused  # noqa: E402
from deploytool.load.grid import snap  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402

TARGET = load_checked_target("inductor-int8")


def searched(workshop: Workshop, name: str, **build: Any) -> tuple[Any, Mapping[str, Any]]:
    """The quantized program of a tiny source, before it is compiled, and what the artifact would say of it."""
    request = workshop.request(name, TARGET, **build)
    options = tables.InductorInt8Build(**request.target.build)
    program, settings = inductor_int8._Search(workshop.source(name), request, options).best()
    return program, settings


def losses(workshop: Workshop, name: str, program: Any) -> list[float]:
    """What a program gives against the live module: 1 - cosine of each feed's first output."""
    found, module = [], program.module(check_guards=False)
    for feeds in workshop.feeds(name):
        got = pt2e.run_module(module, workshop.source(name).signature, feeds)[0].numpy()
        found.append(1 - cosine(got, next(iter(workshop.reference(name, feeds).values()))))
    return found


def test_one_channel_is_computed_right_and_in_int8(workshop: Workshop) -> None:
    """A convolution over one channel with a free batch, which torch compiles to nonsense, must agree, all in int8."""
    artifact = workshop.artifact("onechannel", "inductor-int8")
    with Asked(artifact) as engine:
        for feeds in workshop.feeds("onechannel"):
            got, wanted = engine.run(feeds)["output"], workshop.reference("onechannel", feeds)["output"]
            assert cosine(got, wanted) > 0.999
        ran = engine.ran(workshop.feeds("onechannel")[0])
    assert ran is not None and ran["compute_by_precision"] == {"int8": 1.0}
    assert artifact.settings["int8_kernels"] == 3 and artifact.settings["rounded_but_fp32"] == 0


def test_code_that_calls_other_kernels_than_the_graph_is_not_believed(workshop: Workshop, tmp_path: Path) -> None:
    """Where the package's code calls fewer int8 kernels than were written down, what ran must be unknown."""
    artifact = workshop.artifact("onechannel", "inductor-int8")
    text = (artifact.folder / "kernels.json").read_text()
    (tmp_path / "model.pt2").write_bytes(artifact.main_file.read_bytes())
    (tmp_path / "kernels.json").write_text(text.replace('"qlinear_pointwise_tensor": 1', '"addmm": 1'))
    with Asked(replace(artifact, folder=tmp_path)) as engine:
        engine.run(workshop.feeds("onechannel")[0])
        told = engine.ran(workshop.feeds("onechannel")[0])
    assert told is not None and "3 whole-number products, and its code calls 2" in told["unknown"]


def test_a_package_that_computes_in_fp32_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose rounding no kernel took must not pass as an int8 artifact."""
    monkeypatch.setattr(inductor_int8, "write_package", lambda *_: {"calls": {"addmm_out": 3}})
    with pytest.raises(InputRefused) as caught:
        build_artifact(workshop.request("mlp", TARGET), {})
    assert caught.value.code == "DT310"
    assert "none" in str(caught.value)


def test_eight_bits_need_vnni(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with weights that could saturate must not open on a CPU without VNNI; one of 7 bits must."""
    eight, seven = (searched(workshop, "mlp", weight_bits=bits)[1] for bits in (8, 7))
    assert "needs_vnni" not in seven and eight["needs_vnni"]["weights"] > 0
    artifact = workshop.artifact("mlp", "inductor-int8")
    monkeypatch.setattr(inductor.saturation, "has_vnni", lambda flags: False)
    open_artifact(artifact)
    with pytest.raises(EnvironmentLacking) as caught:
        open_artifact(replace(artifact, settings={**artifact.settings, "needs_vnni": eight["needs_vnni"]}))
    assert caught.value.code == "DT402" and "weight_bits = 7" in str(caught.value)


def test_the_calibration_that_loses_least_is_taken(workshop: Workshop) -> None:
    """By itself the target must take the method whose program is nearest to the model on the feeds."""
    each = {method: searched(workshop, "conv", calibration=method) for method in OBSERVERS}
    best, settings = searched(workshop, "conv")
    worst = {method: max(losses(workshop, "conv", program)) for method, (program, _) in each.items()}
    assert settings["calibration"] == min(worst, key=lambda method: each[method][1]["calibration_loss"])
    assert max(losses(workshop, "conv", best)) == min(worst.values()) < max(worst.values())


def test_layers_that_stay(workshop: Workshop) -> None:
    """Excluded layers and the most sensitive ones must stay fp32; a block's name stands for all that is in it."""
    _, settings = searched(workshop, "attention", keep_fp32=2)
    assert settings["int8"] == {"Linear": 11} and len(settings["kept_fp32"]) == 2
    _, settings = searched(workshop, "attention", exclude=["module.blocks.0"], keep_fp32=0)
    assert settings["int8"] == {"Linear": 7} and settings["kept_fp32"] == ["module.blocks.0"]
    with pytest.raises(InputRefused) as caught:
        searched(workshop, "conv", scheme="dynamic")
    assert caught.value.code == "DT310"


def test_free_sizes_stay_free(workshop: Workshop) -> None:
    """Every size that the signature calls free must be free in the quantized program too."""
    program, _ = searched(workshop, "attention")
    fed = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"][-2:]
    assert all(isinstance(size, torch.SymInt) for shape in fed for size in shape)


def test_a_shared_weight_is_read_once_by_each(workshop: Workshop) -> None:
    """Two calls of one linear must each have their own codes, which is what Inductor has kernels for."""
    program, _ = searched(workshop, "attention", keep_fp32=0)
    nodes = [node for node in program.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert len(nodes) == 14 and all(len(node.users) == 1 for node in nodes)


def test_a_convolution_called_twice_is_rounded_at_both_calls(workshop: Workshop) -> None:
    """Two calls of one convolution, with the norm and ReLU behind, must both be int8, and the numbers near eager's."""
    program, settings = searched(workshop, "twice")
    assert settings["int8"] == {"Conv": 3, "Linear": 1} and settings["scheme"] == "static"
    calls = [node for node in program.graph.nodes if str(node.target).startswith("aten.conv2d")]
    assert len(calls) == 4
    assert all("dequantize" in str(given.target) for node in calls for given in node.args[:2])
    assert max(losses(workshop, "twice", program)) < 1e-3
    artifact = workshop.artifact("twice", "inductor-int8")
    assert (artifact.settings["int8_kernels"], artifact.settings["rounded_but_fp32"]) == (5, 0)
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("twice"):
            got, wanted = runner.run(feeds)["output"], workshop.reference("twice", feeds)["output"]
            assert cosine(got, wanted) > 0.999


def quantized(workshop: Workshop, quantizer: Any, feeds: list[Any], encodings: Mapping[str, Encoding]) -> Any:
    need(TARGET)
    source = workshop.source("mlp")
    program = export_module(source.flat, source.signature, example(workshop.request("mlp", TARGET)))
    return pt2e.quantize(program, quantizer, feeds, source.signature, encodings)


@pytest.mark.parametrize(
    ("module", "shape", "channels"),
    [
        (torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ConvTranspose2d(4, 1, 2)), ("n", 1, 8, 8), [2, 1]),
        (torch.nn.Conv2d(3, 3, 3, groups=3), ("n", 3, 8, 8), [1]),
        (torch.nn.Sequential(*[torch.nn.Conv1d(1, 1, 3)] * 2), (1, "n"), [1, 2]),  # nothing reads the first name
    ],
    ids=["transposed", "depthwise", "twice"],
)
def test_only_convolutions_over_one_channel_are_widened(
    module: Any, shape: tuple[int | str, ...], channels: list[int]
) -> None:
    """A second channel of zeros must change no number; transposed and depthwise layers must stay as they are."""
    given = torch.randn([8 if size == "n" else int(size) for size in shape])
    signature = Signature((TensorSpec("input", "float32", shape),), (TensorSpec("output", "float32", shape),))
    program = inductor_int8.widened(export_module(module.eval(), signature, (given,)), signature)
    torch.testing.assert_close(program.module(check_guards=False)(given), module(given))
    assert [tensor.shape[1] for name, tensor in program.state_dict.items() if name.endswith("weight")] == channels


def test_torchaos_errors_are_ours(workshop: Workshop) -> None:
    """What a quantizer raises must end as a refusal that says so; no feeds must be refused too."""

    class Broken(InductorQuantizer):
        def annotate(self, model: Any) -> Any:
            raise IndexError("list index out of range")

    plan = Plan(["0"], [], False, "min-max", 7)
    with pytest.raises(InputRefused) as caught:
        quantized(workshop, Broken(plan), workshop.feeds("mlp"), {})
    assert caught.value.code == "DT310" and "IndexError" in str(caught.value)
    with pytest.raises(InputRefused) as caught:
        quantized(workshop, InductorQuantizer(plan), [], {})
    assert caught.value.code == "DT303"


def test_encodings_are_kept_or_told(workshop: Workshop) -> None:
    """Weights on a grid per channel must keep their codes; those in groups, and those of fp32 layers, are told."""
    source = workshop.source("mlp")
    weights = dict(source.module.named_parameters())

    def grid(name: str, groups: int) -> Encoding:
        rows, columns = weights[name].shape
        scale = weights[name].detach().reshape(rows, groups, -1).abs().amax(2) / 7 * 1.5  # not what is observed
        return Encoding(4, 0, columns // groups, scale, torch.full_like(scale, 8.0))

    encodings = {"0.weight": grid("0.weight", 1), "2.weight": grid("2.weight", 4), "4.weight": grid("4.weight", 1)}
    plan = Plan(["0", "2"], [], False, "min-max", 7)
    result = quantized(workshop, InductorQuantizer(plan), workshop.feeds("mlp"), encodings)
    assert result.learned.weights == ["0"] and sorted(result.learned.not_taken) == ["2", "4"]
    assert "groups of 12" in result.learned.not_taken["2"] and "floating point" in result.learned.not_taken["4"]
    kept = (t for t in result.program.state_dict.values() if t.dtype == torch.int8)
    codes = next(t for t in kept if t.shape == weights["0.weight"].shape)
    wanted = snap(weights["0.weight"], encodings["0.weight"]) / encodings["0.weight"].scale
    np.testing.assert_array_equal(codes.numpy(), wanted.detach().round().numpy())
