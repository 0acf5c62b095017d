"""Packages of AOTInductor's, searched for the first wrong layer: faults in the model, in the compiler and in files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import TINY, Workshop

torch = pytest.importorskip("torch")

from deploytool.artifact import KEPT, Artifact  # noqa: E402
from deploytool.backends import inductor_cut, inductor_int8  # noqa: E402
from deploytool.backends.base import build_artifact, load_checked_target  # noqa: E402
from deploytool.cases import Case  # noqa: E402
from deploytool.errors import DeployError, InputRefused  # noqa: E402
from deploytool.load.flat import FlatModule  # noqa: E402
from deploytool.source import ModelRef  # noqa: E402
from deploytool.verify.bisect import bisect_job  # noqa: E402
from deploytool.verify.nodes import unjudged  # noqa: E402


def spoilt(workshop: Workshop, name: str, target: str, change: Callable[[Any], None]) -> Artifact:
    """A package of a tiny source with one fault in its module."""
    request, source = workshop.request(name, load_checked_target(target)), workshop.source(name)
    module = copy.deepcopy(source.module)
    with torch.no_grad():
        change(module)
    flat = FlatModule(module, source.signature.input_names, source.signature.output_names)
    return build_artifact(replace(request, source=replace(source, module=module, flat=flat)), {})


def prepared(workshop: Workshop, name: str, folder: Path) -> Path:
    """What `lower.prepare` leaves of a model, as far as a search reads it."""
    for index, feeds in enumerate(workshop.feeds(name)):
        case = Case(feeds, reference=workshop.reference(name, feeds))
        case.save(folder / "cases" / f"{index:03d}.npz")
        case.save(folder / "calibration" / f"{index:03d}.npz")
    return folder


def bisected(workshop: Workshop, artifact: Artifact, name: str, folder: Path) -> dict[str, Any]:
    """What is found; it must be JSON."""
    ref = ModelRef("python", name, str(TINY / f"{name}.py"))
    found = bisect_job(str(artifact.folder), str(prepared(workshop, name, folder)), asdict(ref))
    json.dumps(found, allow_nan=False)
    return found


def _louder(module: Any) -> None:
    module.blocks[1].up.weight[5] *= 3


def _forgetful(module: Any) -> None:
    module.blocks[0].out.weight.copy_(module.blocks[0].out.weight.T.clone())


def test_a_spoilt_layer_is_named(workshop: Workshop, tmp_path: Path) -> None:
    """A package whose model had one wrong weight must have that layer named, and how it is wrong."""
    artifact = spoilt(workshop, "attention", "inductor", _forgetful)
    found = bisected(workshop, artifact, "attention", tmp_path)
    assert (found["found"], found["module"]) == ("node", "blocks.0.out")
    assert found["cause"] == "transposed weight" and found["error_before"] < 1e-5 < found["error_after"]
    assert found["others"] == []


def test_a_spoilt_layer_in_int8_is_named(workshop: Workshop, tmp_path: Path) -> None:
    """The same among int8 layers, whose own rounding is no fault."""
    artifact = spoilt(workshop, "attention", "inductor-int8", _louder)
    found = bisected(workshop, artifact, "attention", tmp_path)
    assert (found["found"], found["module"]) == ("node", "blocks.1.up")
    assert found["weight_steps"] > 1 and found["others"] == []


def test_what_the_compiler_spoils_is_named(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that is right and compiled to nonsense must have the first piece named that is wrong when compiled."""
    monkeypatch.setattr(inductor_int8, "widened", lambda program, signature: program)
    artifact = build_artifact(workshop.request("onechannel", load_checked_target("inductor-int8")), {})
    found = bisected(workshop, artifact, "onechannel", tmp_path)
    assert found["output_error"] > 0.1
    assert (found["found"], found["cause"]) == ("fusion", "fusion")
    assert found["module"] in ("0", "1", "2", "3") and found["error_before"] < 0.05 < found["error_after"]


@contextmanager
def refused(word: str) -> Iterator[None]:
    with pytest.raises(DeployError) as caught:
        yield
    assert isinstance(caught.value, InputRefused) and word in str(caught.value)


def test_what_cannot_be_searched_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """Without its program, with another's, with another package, and without the model, a search must be refused."""
    artifact = workshop.artifact("mlp", "inductor")
    folder, kept = tmp_path / "artifact", Path(KEPT) / "program.pt2"
    (folder / KEPT).mkdir(parents=True)
    for name in ("artifact.json", "model.pt2", "kernels.json", str(kept)):
        (folder / name).write_bytes((artifact.folder / name).read_bytes())
    moved = replace(artifact, folder=folder)
    assert "compiled library" in (unjudged(moved) or "")
    assert all(not file.path.startswith(KEPT) for file in Artifact.load(folder).files)
    with refused("must run"):
        bisect_job(str(folder), str(prepared(workshop, "mlp", tmp_path / "a")),
                   asdict(ModelRef("python", "mlp", str(tmp_path / "gone.py"))))  # fmt: skip
    other = workshop.artifact("attention", "inductor")
    (folder / kept).write_bytes((other.folder / kept).read_bytes())
    with refused("keep_program"):
        bisected(workshop, moved, "mlp", tmp_path / "b")
    (folder / kept).unlink()
    with refused("keep_program"):
        bisected(workshop, moved, "mlp", tmp_path / "c")


def test_a_package_of_another_program_is_refused(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that gives what its program does not, not even compiled anew, must be refused."""
    from deploytool.backends.inductor import PackageRunner

    plain = PackageRunner.infer
    monkeypatch.setattr(PackageRunner, "infer", lambda self, feeds: [np.asarray(a) * 1.5 for a in plain(self, feeds)])
    with refused("compiled by another torch"):
        bisected(workshop, workshop.artifact("mlp", "inductor"), "mlp", tmp_path)


@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_norms_are_folded_into_the_convolutions_before_them(kind: Any) -> None:
    """A convolution of either kind must compute with its norm folded in what both did."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(kind(4, 6, 3), torch.nn.BatchNorm2d(6)).eval()
    with torch.no_grad():
        module[1].running_var.uniform_(0.5, 2)
        module[1].running_mean.normal_()
    image = torch.randn(2, 4, 8, 8)
    graph = torch.export.export(module, (image,)).module()
    inductor_cut._fold(graph)
    assert "batch_norm" not in str(graph.graph)
    torch.testing.assert_close(graph(image), module(image))


def test_norms_behind_computed_weights_stay() -> None:
    """A convolution whose weight the graph computes, as weight_norm's, must be left as it is."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(4, 6, 3))
    module, image = torch.nn.Sequential(layer, torch.nn.BatchNorm2d(6)).eval(), torch.randn(2, 4, 8, 8)
    graph = torch.export.export(module, (image,)).module()
    inductor_cut._fold(graph)
    assert "batch_norm" in str(graph.graph)
    torch.testing.assert_close(graph(image), module(image))
