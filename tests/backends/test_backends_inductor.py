"""AOTInductor packages; that they agree with eager is in test_backends_contract.py."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from workshop import Workshop

torch = pytest.importorskip("torch")

from deploytool.backends import inductor  # noqa: E402
from deploytool.backends.base import build_artifact, find_backend, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.inductor_kernels import Recorder  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.errors import BackendFailed, DeployError, EnvironmentLacking, InputRefused  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402
from deploytool.storage import read_json  # noqa: E402


def test_without_a_compiler_the_target_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where CXX names nothing, and where there is no g++, the probe must say so with the command to install."""
    target, backend = load_checked_target("inductor"), find_backend("inductor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    probe = backend.probe(target)
    assert (probe.available, probe.fix) == (False, "apt-get install g++")
    assert "no C++ compiler here: no-such-compiler" in probe.reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "g++" in backend.probe(target).reason


def test_steps_that_torch_fixes_are_refused(workshop: Workshop) -> None:
    """A recurrent layer over a free number of steps must be refused, and the target that takes it named."""
    with pytest.raises(InputRefused) as caught:
        build_artifact(workshop.request("lstm", load_checked_target("inductor")), {})
    assert caught.value.code == "DT310"
    assert "torchscript" in str(caught.value)


def test_a_failed_compilation_is_a_backend_failure(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler refuses must end as an error of ours, and Inductor's cache must not stay named."""
    request = workshop.request("mlp", load_checked_target("inductor"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    source = workshop.source("mlp")
    program = inductor.exported(source, inductor.example(request))
    with pytest.raises(BackendFailed) as caught:
        inductor.compile_package(program, request.out / "model.pt2", {"aot_inductor.compile_wrapper_opt_level": "Ox"})
    assert caught.value.code == "DT504"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_another_cpu_is_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package for instructions that this CPU lacks must not be run: it would end by a signal."""
    artifact = workshop.artifact("mlp", "inductor")
    assert set(artifact.settings["cpu"].split()) & set(inductor._FLAGS)
    monkeypatch.setattr(inductor, "_FLAGS", dict.fromkeys(inductor._FLAGS, "no_such_flag"))
    with pytest.raises(EnvironmentLacking) as caught:
        open_artifact(artifact)
    assert caught.value.code == "DT402"
    assert "no_such_flag" in str(caught.value)


def test_a_truncated_package_is_a_backend_failure(workshop: Workshop, tmp_path: Path) -> None:
    """A file that is no package must end as an error of ours that names it."""
    (tmp_path / "model.pt2").write_bytes((workshop.artifact("mlp", "inductor").main_file).read_bytes()[:200])
    with pytest.raises(DeployError) as caught:
        open_artifact(replace(workshop.artifact("mlp", "inductor"), folder=tmp_path))
    assert caught.value.code == "DT504"
    assert "model.pt2" in str(caught.value)


def test_what_ran_is_what_was_compiled(workshop: Workshop, tmp_path: Path) -> None:
    """The report must count the flops of the layers for the sizes that ran; a package without its list is unknown."""
    artifact, feeds = workshop.artifact("mlp", "inductor"), workshop.feeds("mlp")[1]
    with Asked(artifact) as engine:
        engine.run(feeds)
        ran = engine.ran(feeds) or {}
    assert ran["flops"] == 2 * 3 * (24 * 48 + 48 * 48 + 48 * 6)
    assert ran["compute_by_precision"] == {"fp32": 1.0}
    (tmp_path / "model.pt2").write_bytes(artifact.main_file.read_bytes())
    with Asked(replace(artifact, folder=tmp_path)) as engine:
        engine.run(feeds)
        assert "kernels.json" in (engine.ran(feeds) or {})["unknown"]


def test_a_package_is_frozen(workshop: Workshop) -> None:
    """Weights must be laid out for the kernels when the package is made: its linears are oneDNN's."""
    with Asked(workshop.artifact("mlp", "inductor")) as engine:
        engine.run(workshop.feeds("mlp")[0])
    calls = read_json(workshop.artifact("mlp", "inductor").folder / "kernels.json")["calls"]
    assert calls == {"linear_pointwise": 3}


def test_what_branches_compute_is_told_as_uncounted() -> None:
    """Products inside of torch.cond must not pass as none: which way runs is not known when it is compiled."""
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])

    class Branching(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.cond(x.sum() > 0, lambda y: layers[0](y), lambda y: layers[1](y), (x,))

    program = torch.export.export(Branching(), (torch.randn(2, 4),))
    recorder = Recorder(Signature((TensorSpec("x", "float32", (2, 4)),), (TensorSpec("y", "float32", (2, 4)),)))
    recorder.see(program.graph)
    assert recorder.products == [{"op": "cond", "precision": "fp32", "flops": None}]
