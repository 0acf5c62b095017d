"""Every shipped target on tiny sources: what a backend promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from workshop import Workshop, cosine, need, profiles

from deploytool.artifact import Artifact
from deploytool.backends.base import BACKENDS, build_artifact, find_backend, load_checked_target, open_artifact
from deploytool.errors import DeployError, EnvironmentLacking, InputRefused, UsageProblem
from deploytool.runner import Runner
from deploytool.target import Target

TARGETS = pytest.mark.parametrize("target", profiles(), ids=lambda t: t.name)
REFUSED = {("lstm", "executorch"), ("lstm", "executorch-int8")}  # test_backends_executorch.py
NOTHING_TO_QUANTIZE = {("conv", "ort-int8"), ("conv", "ort-int4"), ("conv", "ort-weight-int8")}
# Compiling takes a quarter of a minute, and recurrent layers are refused (test_backends_inductor.py).
LEFT_OUT = {(source, target) for source in ("conv", "lstm") for target in ("inductor", "inductor-int8")}
CASES = [
    (source, target.name)
    for source in ("mlp", "conv", "lstm", "attention")
    for target in profiles()
    if (source, target.name) not in NOTHING_TO_QUANTIZE | LEFT_OUT | REFUSED
]


@contextmanager
def opened(workshop: Workshop, source: str, target: str) -> Iterator[tuple[Artifact, Runner]]:
    artifact = workshop.artifact(source, target)
    with open_artifact(artifact) as runner:
        yield artifact, runner


@pytest.mark.parametrize(("source", "name"), CASES)
def test_agrees_with_eager_at_every_shape(workshop: Workshop, source: str, name: str) -> None:
    """Every output, at every sample's shape, must be within the profile's cosine of the live module's, same dtype."""
    target = load_checked_target(name)
    with opened(workshop, source, name) as (artifact, runner):
        assert artifact.precision == target.precision
        for feeds in workshop.feeds(source):
            reference, outputs = workshop.reference(source, feeds), runner.run(feeds)
            assert list(outputs) == list(reference)
            for key, array in outputs.items():
                assert (array.shape, array.dtype) == (reference[key].shape, reference[key].dtype)
                assert cosine(array, reference[key]) >= target.parity.cosine_min


@TARGETS
def test_outputs_own_their_memory(workshop: Workshop, target: Target) -> None:
    """A later run must not change an earlier result, nor may changing a result reach the engine."""
    with opened(workshop, "mlp", target.name) as (_, runner):
        small, large = workshop.feeds("mlp")[0], workshop.feeds("mlp")[-1]
        first = runner.run(small)["output"]
        kept = first.copy()
        runner.run({"input": small["input"] + 1})
        runner.run(large)
        assert np.array_equal(first, kept)
        first[:] = np.nan
        assert np.array_equal(runner.run(small)["output"], kept)


@TARGETS
def test_an_artifact_from_disk_gives_the_same(workshop: Workshop, target: Target) -> None:
    """Loading the folder again, checksums and all, must open to the same outputs."""
    with opened(workshop, "attention", target.name) as (artifact, runner):
        feeds = workshop.feeds("attention")[1]
        with open_artifact(Artifact.load(artifact.folder)) as again:
            for key, array in again.run(feeds).items():
                np.testing.assert_allclose(array, runner.run(feeds)[key], rtol=1e-5, atol=1e-6)


@TARGETS
@pytest.mark.parametrize(
    "change",
    [
        lambda f: {},
        lambda f: {**f, "extra": f["input"]},
        lambda f: {"Input": f["input"]},
        lambda f: {"input": f["input"].astype(np.float64)},
        lambda f: {"input": f["input"][0]},
        lambda f: {"input": f["input"][:, :-1]},
    ],
    ids=["none", "extra", "renamed", "dtype", "rank", "size"],
)
def test_wrong_feeds_are_refused(workshop: Workshop, target: Target, change) -> None:  # type: ignore[no-untyped-def]
    """Feeds that do not fit the signature must be refused before the engine sees them."""
    with opened(workshop, "mlp", target.name) as (_, runner), pytest.raises(InputRefused) as caught:
        runner.run(change(workshop.feeds("mlp")[0]))
    assert caught.value.code == "DT308"


@pytest.mark.parametrize(("source", "name"), sorted(NOTHING_TO_QUANTIZE))
def test_nothing_to_quantize_is_refused(workshop: Workshop, source: str, name: str) -> None:
    """A model without anything that the target makes int8 must not pass as an int8 artifact."""
    target = load_checked_target(name)
    with pytest.raises(InputRefused) as caught:
        build_artifact(workshop.request(source, target), {})
    assert caught.value.code == "DT310"
    assert "openvino-int8" in str(caught.value)


@pytest.mark.parametrize("name", ["fbgemm", "inductor-int8", "ort-int8", "openvino-int8"])
def test_excluded_layers_must_exist(workshop: Workshop, name: str) -> None:
    """A misspelt layer in `exclude` must be an error that names the nearest one."""
    torch_name, node = "module.0", "/module/module/0/Gemm"
    layer = {"ort-int8": f"{node}_MatMul", "openvino-int8": node}.get(name, torch_name)
    request = workshop.request("mlp", load_checked_target(name), exclude=[layer.replace("0", "0x")])
    with pytest.raises(UsageProblem) as caught:
        build_artifact(request, {})
    assert caught.value.code == "DT202"


@pytest.mark.parametrize("name", ["fbgemm", "ort-int8", "openvino-int8"])
def test_kept_layers_make_int8_closer(workshop: Workshop, name: str) -> None:
    """Keeping more products fp32 must be recorded and must not make the outputs worse; keeping all is refused."""
    losses = []
    for keep in (0, 4):
        artifact = build_artifact(workshop.request("attention", load_checked_target(name), keep_fp32=keep), {})
        assert len(artifact.settings["kept_fp32"]) == keep
        with open_artifact(artifact) as runner:
            feeds = workshop.feeds("attention")[2]
            losses.append(1 - cosine(runner.run(feeds)["hidden"], workshop.reference("attention", feeds)["hidden"]))
    assert losses[1] < losses[0]


def test_the_source_is_left_as_it_was(workshop: Workshop) -> None:
    """Quantizing must work on a copy: the reference must give the same bits afterwards."""
    feeds = workshop.feeds("attention")[0]
    before = workshop.reference("attention", feeds)
    build_artifact(workshop.request("attention", load_checked_target("fbgemm")), {})
    after = workshop.reference("attention", feeds)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_broken_engine_is_a_backend_failure(workshop: Workshop) -> None:
    """A truncated engine file must end as an error of ours that names the file."""
    for name, file in (("ort", "model.onnx"), ("torchscript", "model.pt"), ("openvino", "model.xml")):
        artifact = build_artifact(workshop.request("mlp", load_checked_target(name)), {})
        path = artifact.folder / file
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(DeployError) as caught:
            open_artifact(artifact)
        assert caught.value.code == "DT504"
        assert file in str(caught.value)


def test_renamed_outputs_are_a_backend_failure(workshop: Workshop) -> None:
    """An engine without an output of the signature must fail, not give something else under its name."""
    for name in ("ort", "openvino"):
        artifact = workshop.artifact("mlp", name)
        wrong = replace(artifact.signature.outputs[0], name="logits")
        changed = replace(artifact, signature=replace(artifact.signature, outputs=(wrong,)))
        with pytest.raises(DeployError) as caught, open_artifact(changed) as runner:
            runner.run(workshop.feeds("mlp")[0])
        assert caught.value.code == "DT504"


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda b: b.name)
def test_a_missing_package_says_what_to_install(backend, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Without its packages a backend must say so from probe and from build, with the exact command."""
    import sys

    target = next(t for t in profiles() if t.backend == backend.name)
    need(target)
    for entry in backend.modules:
        for name in entry.split("|"):
            monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
            for loaded in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
                monkeypatch.setitem(sys.modules, loaded, None)
            owner, _, part = name.rpartition(".")
            if owner in sys.modules:  # `from owner import part` asks it first
                monkeypatch.delattr(sys.modules[owner], part, raising=False)
    monkeypatch.delitem(sys.modules, f"deploytool.backends.{backend.name}", raising=False)
    command = f"pip install 'deploytool[{backend.extra}]'"
    probe = find_backend(backend.name).probe(target)
    assert (probe.available, probe.fix) == (False, command)
    with pytest.raises(EnvironmentLacking) as caught:
        find_backend(backend.name)._engine()
    assert (caught.value.code, caught.value.fix) == ("DT401", command)
