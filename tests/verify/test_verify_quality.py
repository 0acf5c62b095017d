"""The model's own measures, taken of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.errors import DeployError
from deploytool.load.predict import tensor_predict
from deploytool.signature import Feeds, Outputs, Signature, TensorSpec
from deploytool.verify import quality
from deploytool.verify.generation import greedy, rival
from deploytool.verify.quality import NEW_TOKENS, quality_job

IDS = Signature(
    (TensorSpec("input_ids", "int64", ("batch", "sequence")), TensorSpec("attention_mask", "int64", ("batch", "all"))),
    (TensorSpec("logits", "float32", ("batch", "sequence", 7)),),
)


class Counts:
    """A language model that says the next number of 0 to 6, and counts what it was fed."""

    signature = IDS

    def __init__(self) -> None:
        self.fed: list[tuple[int, int]] = []

    def run(self, feeds: Feeds) -> Outputs:
        self.fed.append((feeds["input_ids"].shape[1], feeds["attention_mask"].shape[1]))
        return {"logits": np.eye(7, dtype=np.float32)[(feeds["input_ids"] + 1) % 7]}

    def __enter__(self) -> Counts:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "engine").write_bytes(b"-")
    Artifact(folder, "eager", "source", "engine", "fp32", IDS).save()
    monkeypatch.setattr(quality, "open_as_used", lambda opened: Counts())
    return str(folder)


def ref(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "m.py"
    path.write_text("def build(): raise RuntimeError\ndef samples(): return []\n" + text)
    return {"kind": "python", "name": "m", "path": str(path)}


def test_greedy_decoding_without_a_cache() -> None:
    """A model without past tensors is fed the whole sequence each time; the tokens are the most likely ones."""
    runner = Counts()
    assert greedy(runner, [2, 3], 5)[0] == [4, 5, 6, 0, 1]
    assert runner.fed == [(n, n) for n in range(2, 7)]


def test_rivals_are_what_rounding_could_have_chosen() -> None:
    """Only the second, and only as near as fp32 engines may differ; masked scores do not count."""
    scores = np.array([3.0, 10.0, 10.0 - 1e-4, -np.inf, 9.0], np.float32)
    assert rival(scores) == 2
    assert rival(scores - np.float32([0, 0, 2e-3, 0, 0])) is None
    assert rival(np.array([5.0, 5.0], np.float32)) == 1
    assert rival(np.full(3, np.nan, np.float32)) is None and rival(np.array([1.0])) is None


def test_hooks_are_run_on_the_artifact(artifact: str, tmp_path: Path) -> None:
    """evaluate() must see the artifact's outputs as tensors, and every prompt be decoded; the model is not built."""
    got = quality_job(artifact, ref(tmp_path, """
import torch
def evaluate(predict):
    ids = torch.tensor([[1, 2, 6]])
    out = predict({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert isinstance(out["logits"], torch.Tensor)
    return {"right": (out["logits"].argmax(-1) == (ids + 1) % 7).double().mean(), "n": 3}
def prompts(): return [[0], [4, 5]]
"""))  # fmt: skip
    assert got["metrics"] == {"right": 1.0, "n": 3.0}
    assert got["tokens"][1][:3] == [6, 0, 1] and [len(t) for t in got["tokens"]] == [NEW_TOKENS] * 2


def test_without_hooks_nothing_is_measured(artifact: str, tmp_path: Path) -> None:
    """A model without measures has none, rather than made-up ones."""
    assert quality_job(artifact, ref(tmp_path, "")) == {"metrics": {}, "scores": {}, "tokens": [], "rivals": []}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def evaluate(p): return {}", "must return {metric: number}"),
        ("def evaluate(p): return 0.5", "must return {metric: number}"),
        ("def evaluate(p): return {'m': 'good'}", "every metric must be a number"),
        ("def evaluate(p): return {'m': None}", "every metric must be a number"),
        ("def evaluate(p): return {'m': float('nan')}", "every metric must be finite (got m = nan)"),
        ("def evaluate(p): return {'m': float('inf')}", "every metric must be finite (got m = inf)"),
        ("def evaluate(p): return {'m': 1}\nLOWER_IS_BETTER = ['n']", "must name metrics that evaluate() gives"),
        ("def prompts(): return []", "at least one prompt"),
        ("def prompts(): return [][0]", "prompts() of the model must run (got IndexError"),
        ("def evaluate(p):\n    return {'m': 1 / 0}", "m.py:4"),
    ],
)
def test_measures_that_say_nothing_are_refused(text: str, sentence: str, artifact: str, tmp_path: Path) -> None:
    """No metric, one that is no number, and no prompt must be refused: they could not fail."""
    with pytest.raises(DeployError) as caught:
        quality_job(artifact, ref(tmp_path, text))
    assert caught.value.code == "DT313" and sentence in str(caught.value)


def test_predict_takes_tensors_arrays_and_lists() -> None:
    """What an evaluate() passes may be a tensor of any layout, an array or a list."""
    torch = pytest.importorskip("torch")
    predict = tensor_predict(Counts())
    ids = torch.tensor([[1, 4], [2, 5]])
    values: list[Any] = [ids.T.contiguous(), ids.T, ids.T.numpy(), ids.T.tolist()]
    outputs = [predict({"input_ids": v, "attention_mask": torch.ones(2, 2)})["logits"] for v in values]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_scores_of_single_samples_are_recorded(tmp_path: Path, artifact: str) -> None:
    """An evaluate() that takes `record` has its scores kept in order; unknown names and NaN are refused."""
    text = "def evaluate(predict, record=None):\n    record('m', [1, 0.5])\n    record({!r}, [{}])\n"
    text += "    return {{'m': 0.5}}\n"
    assert quality_job(artifact, ref(tmp_path, text.format("m", "0")))["scores"] == {"m": [1.0, 0.5, 0.0]}
    for name, number in (("n", "0"), ("m", "float('nan')")):
        with pytest.raises(DeployError) as caught:
            quality_job(artifact, ref(tmp_path, text.format(name, number)))
        assert caught.value.code == "DT313"
    plain = "def evaluate(predict):\n    return {'m': 0.5}\n"
    assert quality_job(artifact, ref(tmp_path, plain))["scores"] == {}
