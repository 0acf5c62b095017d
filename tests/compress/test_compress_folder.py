"""The whole of compress: report, folder, and the model that comes back from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress, compress_job, judge
from deploytool.errors import CheckFailed, DeployError, InputRefused, IntegrityBroken, UsageProblem
from deploytool.load.compressed import save_compressed
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import apply_edits
from deploytool.source import ModelRef, Source

RECIPE = """
[[compress]]
step = "magnitude"
sparsity = 0.5
include = ["up"]
[[compress]]
step = "svd"
rank = 4
include = ["down"]
[[compress]]
step = "distill"
epochs = 2
"""

FRESH = """
import sys, numpy, torch
torch.set_num_threads(1)
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
source = open_source(resolve(sys.argv[1]))
outputs = [t.numpy() for s in source.samples() for t in source.flat(*(s[n] for n in source.signature.input_names))]
numpy.savez(sys.argv[2], *outputs)
"""


def _job(ref: ModelRef, folder: Path, text: str = RECIPE, name: str = "out", **options: Any) -> dict[str, Any]:
    recipe = folder / f"{name}.toml"
    recipe.write_text(text)
    return compress_job(dataclasses.asdict(ref), str(recipe), str(folder / name), **options)


def _outputs(source: Source) -> list[np.ndarray]:
    return [t.numpy() for s in source.samples() for t in source.flat(*(s[n] for n in source.signature.input_names))]


def test_report_counts_what_was_done(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Before and after must be countable by hand, every step must say its name, seconds and layers; all of it JSON."""
    report = _job(tiny_ref, tmp_path)
    json.dumps(report, allow_nan=False)
    assert [step["step"] for step in report["steps"]] == ["magnitude", "svd", "distill"]
    assert all(step["seconds"] > 0 for step in report["steps"])
    nonzeros = [report["before"]["nonzeros"], *(step["after"]["nonzeros"] for step in report["steps"])]
    assert nonzeros[1] < nonzeros[0], "every step's own figures stand in the report"
    assert report["steps"][-1]["after"] == report["after"]
    before = 11 * 12 + 24 + (12 * 40 + 40) + (40 * 12 + 12)  # the tied head counts once
    assert report["before"]["parameters"] == before
    assert report["before"]["nonzeros"] == before - 12  # a fresh norm's biases are zero
    after = before - 480 + 4 * 52
    assert report["after"]["parameters"] == after and report["after"]["nonzeros"] == after - 240
    assert report["before"]["size_bytes"] == 4 * before and report["after"]["size_bytes"] == 4 * after
    assert set(report["before"]["metrics"]) == set(report["after"]["metrics"]) == {"share"}


def test_a_fresh_process_gives_the_same_bits(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """The folder, opened in another process, must give exactly the outputs of the module that was compressed."""
    source = open_source(tiny_ref)
    recipe = parse_recipe({"compress": [{"step": "magnitude", "sparsity": 0.5, "include": ["up"]},
                                        {"step": "svd", "rank": 4, "include": ["down"]},
                                        {"step": "distill"}]}, "", where="recipe")  # fmt: skip
    compressed, report = compress(source, recipe)
    save_compressed(compressed, source, report, tmp_path / "out", overwrite=False)
    arguments = [str(tmp_path / "out"), str(tmp_path / "fresh.npz")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True)
    with np.load(tmp_path / "fresh.npz") as fresh:
        expected = _outputs(compressed)
        assert len(expected) == len(fresh.files) == 6
        for a, b in zip(expected, fresh.values(), strict=True):
            assert a.tobytes() == b.tobytes()


def test_two_runs_are_identical(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """The same recipe and seed must write the same weights, byte for byte; another seed must not."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        _job(tiny_ref, tmp_path, name=name, seed=seed)
    a, b, c = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_what_comes_back_is_a_source(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Reference, edits, masks, ties, hooks and dependencies must all be there after reading the folder."""
    _job(tiny_ref, tmp_path)
    ref = resolve(str(tmp_path / "out"))
    source = open_source(ref)
    assert ref.kind == "compressed" and source.ref == ref and source.original == tiny_ref
    assert [edit["layer"] for edit in source.edits] == ["down"]
    assert int((~source.masks["up.weight"]).sum()) == 240
    assert source.module.head.weight is source.module.embed.weight
    assert source.evaluate and source.train_batches and source.loss
    assert {"compressed.json", "weights.safetensors", "tiny.py"} <= {p.name for p in source.dependencies}
    assert isinstance(source.module.down, nn.Sequential) and not source.module.training


def test_compressing_again_adds_up(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """A compressed folder must be a model for compress: edits and masks grow, the reference stays the first model."""
    _job(tiny_ref, tmp_path, name="first")
    again = '[[compress]]\nstep = "svd"\nrank = 3\ninclude = ["up"]\n[[compress]]\nstep = "distill"\n'
    report = _job(resolve(str(tmp_path / "first")), tmp_path, again, name="second")
    source = open_source(resolve(str(tmp_path / "second")))
    assert [edit["layer"] for edit in source.edits] == ["down", "up"]
    assert source.original == tiny_ref
    assert report["before"]["parameters"] == 1168 and report["after"]["parameters"] == 1168 - 2 * 480 + 52 * 7


def test_zeros_stay_when_a_folder_is_trained_again(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Pruned weights must stay zero when the folder that was read back is distilled further."""
    _job(tiny_ref, tmp_path, name="first")
    _job(resolve(str(tmp_path / "first")), tmp_path, '[[compress]]\nstep = "distill"\n', name="second")
    first, second = (open_source(resolve(str(tmp_path / name))).module.up.weight for name in ("first", "second"))
    assert torch.equal(first == 0, second == 0) and not torch.equal(first, second)


def test_scaled_and_rounded_weights_are_written(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """A folder with grids that were searched by the layers' outputs must be written and give the same outputs."""
    _job(tiny_ref, tmp_path, '[[compress]]\nstep = "awq"\nbits = 4\ngroup = 4\n', evaluate=False)
    back = open_source(resolve(str(tmp_path / "out")))
    assert len(back.encodings) == 2 and all(lies_on(back.module.state_dict()[n], e) for n, e in back.encodings.items())


def _refused(folder: Path) -> DeployError:
    with pytest.raises(DeployError) as caught:
        open_source(resolve(str(folder)))
    return caught.value


def test_a_changed_original_is_refused(tiny_ref: ModelRef, tmp_path: Path, write_tiny: Callable[..., ModelRef]) -> None:
    """Other weights in the original, other layers, or no file at all must be refused with a clear error."""
    _job(tiny_ref, tmp_path)
    text = Path(tiny_ref.path).read_text()
    write_tiny(tmp_path, seed=1)
    assert "weights are not those" in str(_refused(tmp_path / "out"))
    Path(tiny_ref.path).write_text(text.replace("40", "41"))
    error = _refused(tmp_path / "out")
    assert isinstance(error, InputRefused) and error.code == "DT314"
    Path(tiny_ref.path).unlink()
    assert _refused(tmp_path / "out").code == "DT301"


def _edit_json(folder: Path, **changes: Any) -> None:
    path = folder / "compressed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_damaged_folder_is_refused(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """A changed byte, a newer schema, an unknown field and an unknown edit must each be refused."""
    _job(tiny_ref, tmp_path)
    folder = tmp_path / "out"
    document = json.loads((folder / "compressed.json").read_text())
    for changes, code in (({"schema_version": "2.0"}, "DT314"), ({"surprise": 1}, "DT314"),
                          ({"edits": [{"kind": "pickle", "layer": "up"}]}, "DT314"),
                          ({"edits": [{"kind": "linear_pair", "layer": "norm", "rank": 2}]}, "DT314"),
                          ({"edits": [{"kind": "linear_pair", "layer": "nope.x", "rank": 2}]}, "DT314"),
                          ({"edits": []}, "DT314"), ({"masked": ["none.weight"]}, "DT314"),
                          ({"ties": {"head.weight": "gone"}}, "DT314")):  # fmt: skip
        _edit_json(folder, **{**document, **changes})
        assert _refused(folder).code == code, changes
        (folder / "compressed.json").write_text(json.dumps(document))
    open_source(resolve(str(folder)))
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)
    assert isinstance(_refused(folder), IntegrityBroken)


def test_quality_stops_a_bad_compression(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """A metric that drops below the recipe's limit must fail and leave no folder; within the limit it must pass."""
    broken = '[[compress]]\nstep = "magnitude"\nsparsity = 0.99\n[[compress]]\nstep = "distill"\nalpha = 0.0\n' \
             "epochs = 20\nlearning_rate = 0.05\n[quality]\nmax_drop = 0.01\n"  # fmt: skip
    with pytest.raises(CheckFailed, match="may drop") as caught:
        _job(tiny_ref, tmp_path, broken)
    assert caught.value.code == "DT104" and not (tmp_path / "out").exists()
    assert _job(tiny_ref, tmp_path, RECIPE + "[quality]\nmax_drop = 1.0\n")["quality"]["passed"] is True
    assert _job(tiny_ref, tmp_path, broken, name="free", evaluate=False)["quality"]["passed"] is None


def test_judge_knows_the_direction() -> None:
    """A rise must be a loss where lower is better, and a metric that vanished must fail."""
    up, down = {"perplexity": 10.0}, {"perplexity": 11.0}
    assert judge(up, down, ("perplexity",), 0.05)["passed"] is False
    assert judge(up, down, (), 0.05)["passed"] is True
    assert judge(up, down, ("perplexity",), 0.2)["drops"]["perplexity"] == pytest.approx(0.1)
    assert judge(up, {}, (), 0.5) == {"max_drop": 0.5, "passed": False, "drops": {}, "missing": ["perplexity"]}


def test_quality_needs_a_metric(tmp_path: Path, write_tiny: Callable[..., ModelRef]) -> None:
    """A limit on metrics that the model does not have must be refused, not passed."""
    ref = write_tiny(tmp_path, hooks=False)
    with pytest.raises(InputRefused) as caught:
        _job(ref, tmp_path, '[[compress]]\nstep = "svd"\nrank = 2\n[quality]\nmax_drop = 0.1\n')
    assert caught.value.code == "DT313"


def test_no_metrics_are_no_quality(tiny: Source) -> None:
    """A limit must not pass because evaluate() gave nothing to compare."""
    recipe = {"compress": [{"step": "svd", "rank": 2}], "quality": {"max_drop": 0.1}}
    with pytest.raises(InputRefused, match="at least one metric"):
        compress(dataclasses.replace(tiny, evaluate=lambda predict: {}), parse_recipe(recipe, "", where="recipe"))


def test_an_existing_output_is_kept(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Nothing may be overwritten unless asked, and an empty recipe is an error."""
    _job(tiny_ref, tmp_path)
    with pytest.raises(UsageProblem) as caught:
        _job(tiny_ref, tmp_path)
    assert caught.value.code == "DT203"
    _job(tiny_ref, tmp_path, overwrite=True)
    with pytest.raises(UsageProblem, match="at least one"):
        _job(tiny_ref, tmp_path, 'model = "digits"\n', name="empty")


def test_a_step_that_breaks_the_model_is_caught(tiny: Source) -> None:
    """A module whose own code reads the weight of a factored layer must end as a clear error after that step."""

    class Reads(type(tiny.module)):  # type: ignore[misc]
        def forward(self, ids: torch.Tensor) -> Any:
            return {"logits": self.up.weight.sum() + super().forward(ids)["logits"]}

    module = copy.deepcopy(tiny.module)
    module.__class__ = Reads
    from deploytool.load.surgery import with_module

    recipe = parse_recipe({"compress": [{"step": "svd", "rank": 2}]}, "", where="recipe")
    with pytest.raises(UsageProblem, match="must still run after step 'svd'"):
        compress(with_module(tiny, module), recipe, evaluate=False)


def test_edits_rebuild_nested_layers() -> None:
    """An edit of a part of an earlier pair must apply in order, on a fresh module."""
    module = nn.Sequential(nn.Linear(32, 32))
    apply_edits(module, [{"kind": "linear_pair", "layer": "0", "rank": 12},
                         {"kind": "linear_pair", "layer": "0.1", "rank": 5}])  # fmt: skip
    assert module[0][1][0].out_features == 5 and module[0][1][0].bias is None and module[0][1][1].bias is not None


def test_pruned_digits_keep_their_accuracy(tmp_path: Path) -> None:
    """Half of the digits model's block weights pruned and one pass of distillation must cost at most one point."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    text = '[[compress]]\nstep = "magnitude"\nsparsity = 0.5\nexclude = ["patch", "head"]\n' \
           '[[compress]]\nstep = "distill"\ntemperature = 4.0\nlearning_rate = 0.0005\n'  # fmt: skip
    report = _job(resolve("digits"), tmp_path, text)
    before, after = report["before"], report["after"]
    assert after["metrics"]["accuracy"] >= before["metrics"]["accuracy"] - 0.01
    pruned = sum(layer["zeros"] for layer in report["steps"][0]["layers"])
    assert after["nonzeros"] == before["nonzeros"] - pruned and pruned == 98304
