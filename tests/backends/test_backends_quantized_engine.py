"""torch's engine for int8: one rule for building, opening and the self-test of bundles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from workshop import Workshop, cosine

torch = pytest.importorskip("torch")

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends import quantized_engine  # noqa: E402
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.bundle import selftest  # noqa: E402
from deploytool.errors import EnvironmentLacking  # noqa: E402
from deploytool.processor import Processor  # noqa: E402

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
X86 = pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="not an x86 CPU")


@pytest.fixture(autouse=True)
def engine_restored() -> Iterator[None]:
    before = torch.backends.quantized.engine
    yield
    torch.backends.quantized.engine = before


def supporting(monkeypatch: pytest.MonkeyPatch, *engines: str) -> None:
    """As if torch were built for another processor."""
    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", list(engines))


def smallest_cosine(workshop: Workshop, name: str, artifact: Artifact) -> float:
    with open_artifact(artifact) as runner:
        pairs = [(runner.run(feeds), workshop.reference(name, feeds)) for feeds in workshop.feeds(name)]
    return min(cosine(got[k], right[k]) for got, right in pairs for k in right)


@X86
@pytest.mark.parametrize("name", ["conv", "lstm", "encoder"])
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_right(name: str, engine: str, workshop: Workshop) -> None:
    """The engine that the profile names must be the one that packs and computes, and be as right as fbgemm."""
    target = load_checked_target("fbgemm")
    artifact = build_artifact(workshop.request(name, target, engine=engine), {})
    torch.backends.quantized.engine = "onednn" if engine != "onednn" else "fbgemm"
    assert artifact.settings["engine"] == engine
    assert smallest_cosine(workshop, name, artifact) > target.parity.cosine_min
    assert torch.backends.quantized.engine == engine
    assert artifact.size_bytes < 1.15 * workshop.artifact(name, "fbgemm").size_bytes


@X86
def test_arm_takes_qnnpack(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no fbgemm, a file that fbgemm was to compute opens on QNNPACK, and new ones are built for it."""
    artifact = workshop.artifact("conv", "fbgemm")
    assert artifact.settings["engine"] == "fbgemm"
    supporting(monkeypatch, "qnnpack")
    assert smallest_cosine(workshop, "conv", artifact) > 0.99
    assert torch.backends.quantized.engine == "qnnpack"
    built = build_artifact(workshop.request("conv", load_checked_target("fbgemm")), {})
    assert built.settings["engine"] == "qnnpack"


def test_an_engine_that_is_not_here_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile's own engine is not silently another, and no engine at all is told."""
    supporting(monkeypatch, "none", "qnnpack")
    with pytest.raises(EnvironmentLacking, match=r"must have the engine x86 \(got none, qnnpack\)"):
        build_artifact(workshop.request("conv", load_checked_target("fbgemm"), engine="x86"), {})
    supporting(monkeypatch, "none")
    with pytest.raises(EnvironmentLacking, match=r"must have the engine fbgemm or qnnpack \(got none\)"):
        quantized_engine.use_engine_of({})


@X86
@pytest.mark.parametrize("engine", ["x86", "onednn"])
def test_eight_bits_need_vnni(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's sums of 8-bit weights are cut off without VNNI: refused at build and open; 7 bits are not."""
    monkeypatch.setattr(quantized_engine, "processor", lambda: Processor("", "", frozenset({"avx2"})))
    for use in (lambda: quantized_engine.use_engine(engine, 8),
                lambda: quantized_engine.use_engine_of({"engine": engine, "weight_bits": 8})):  # fmt: skip
        with pytest.raises(EnvironmentLacking, match="must have VNNI"):
            use()
    assert quantized_engine.use_engine_of({"engine": engine, "weight_bits": 7}) == engine
    monkeypatch.setattr(quantized_engine, "processor", lambda: Processor("", "", frozenset({"avx512_vnni"})))
    assert quantized_engine.use_engine(engine, 8) == engine


@X86
def test_the_self_test_of_bundles_has_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every engine of a release and every processor, the self-test must compute with what deploytool does."""
    machines = [few for size in (1, 2, 4) for few in itertools.combinations(ENGINES, size)]
    for built, here in itertools.product((*ENGINES, None), machines):
        supporting(monkeypatch, *here)
        settings = {} if built is None else {"engine": built}
        try:
            expected = quantized_engine.use_engine_of(settings)
        except EnvironmentLacking:
            with pytest.raises(selftest.Lacking):
                selftest.choose_kernels({"backend": "fbgemm", "settings": settings})
            continue
        torch.backends.quantized.engine = "onednn" if expected != "onednn" else "fbgemm"
        selftest.choose_kernels({"backend": "fbgemm", "settings": settings})
        assert torch.backends.quantized.engine == expected
