"""What a user's language model is measured with: real perplexity, on text that no sample holds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tiny_lm  # noqa: E402
from tiny_lm import CONFIG, SIZE, characters  # noqa: E402

from deploytool.load.held_out import HeldOut, held_out  # noqa: E402
from deploytool.load.model import open_hooks, open_source  # noqa: E402
from deploytool.load.texts import sentences  # noqa: E402
from deploytool.source import ModelRef  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("lm") / "lm")


def ref(path: Path) -> ModelRef:
    return ModelRef("huggingface", path.name, str(path))


def text(begins: bool = False, **config: Any) -> HeldOut:
    tokenizer = characters(begins)
    return HeldOut(transformers.LlamaConfig(**{**CONFIG, **config}), lambda text: list(tokenizer.encode(text).ids))


def test_perplexity_is_that_of_the_scores() -> None:
    """Equal scores must give the vocabulary's size, certain ones 1, and each window's loss must be recorded."""
    seen: dict[str, list[float]] = {}

    def equal(feeds: dict[str, Any]) -> dict[str, Any]:
        assert feeds["past_key_values.0.key"].shape[2] == 0 and feeds["attention_mask"].all()
        return {"logits": torch.zeros(*feeds["input_ids"].shape, SIZE)}

    def certain(feeds: dict[str, Any]) -> dict[str, Any]:
        following = feeds["input_ids"].roll(-1, dims=1)
        return {"logits": 100.0 * torch.nn.functional.one_hot(following, SIZE)}

    figures = text().evaluate(equal, lambda name, losses: seen.update({name: list(losses)}))
    assert figures == {"perplexity": pytest.approx(SIZE)} and len(seen["perplexity"]) == 16
    assert text().evaluate(certain) == {"perplexity": pytest.approx(1.0)}


@pytest.mark.parametrize("begins", [False, True])
def test_the_text_is_held_out(begins: bool) -> None:
    """No window may hold text that samples are made of, none may repeat, and each begins as the tokenizer begins."""
    windows = text(begins)._windows
    assert windows.shape == (16, 256) and (windows[:, 0] == 1).all() == begins
    rows = ["".join(chr(code) for code in row[begins:]) for row in windows.tolist()]
    shown = " ".join(sentences()[:400]).encode("ascii", "replace").decode()
    assert len(set(rows)) == 16 and not any(row[:40] in shown or row[-40:] in shown for row in rows)


def test_few_positions_are_enough() -> None:
    """Windows must fit the model's positions, and prompts must leave room for what is decoded."""
    small = text(max_position_embeddings=48)
    assert small._windows.shape == (16, 48)
    assert [len(prompt) for prompt in small.prompts()] == [12, 16, 16, 16, 16]
    assert [len(prompt) for prompt in text().prompts()] == [12, 20, 28, 33, 40]


def test_a_folder_with_its_tokenizer_is_measured(folder: Path, tmp_path: Path) -> None:
    """The hooks must be there without the weights being read; without a tokenizer there are none."""
    source = open_source(ref(folder))
    assert source.evaluate is not None and source.prompts is not None and source.lower_is_better == ("perplexity",)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "model.safetensors").unlink()
    hooks = open_hooks(ref(bare))

    def predict(feeds: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            outputs = source.flat(*(feeds[name] for name in source.signature.input_names))
        return dict(zip(source.signature.output_names, outputs, strict=True))

    assert hooks.evaluate is not None and hooks.prompts is not None
    figures = hooks.evaluate(predict)
    assert figures == source.evaluate(predict) and 1 < figures["perplexity"] < 1e6
    assert figures["perplexity"] != pytest.approx(SIZE, rel=0.01) and hooks.prompts() == source.prompts()
    (bare / "tokenizer.json").unlink()
    assert held_out(None, bare) is None and open_hooks(ref(bare)).evaluate is None
