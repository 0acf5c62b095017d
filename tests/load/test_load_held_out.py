"""What a user's language model is measured with: real perplexity, on text that no sample holds."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(("positions", "measured", "decoded"), [
    (1, False, False), (2, True, False), (32, True, False), (33, True, True),
])  # fmt: skip
def test_what_has_no_positions_is_left_out(begins: bool, positions: int, measured: bool, decoded: bool) -> None:
    """Nothing may be fed beyond the last position, nor a window without a loss; what is left out is told."""
    hooks = text(begins, max_position_embeddings=positions).hooks()
    assert (hooks.evaluate is not None, hooks.prompts is not None) == (measured, decoded)
    assert len(hooks.notes) == (not decoded) and all("positions" in note for note in hooks.notes)
    if hooks.prompts is not None:
        assert max(map(len, hooks.prompts())) + 32 <= positions

    def equal(feeds: dict[str, Any]) -> dict[str, Any]:
        assert feeds["input_ids"].shape[1] <= positions
        return {"logits": torch.zeros(*feeds["input_ids"].shape, SIZE)}

    if hooks.evaluate is not None:
        assert hooks.evaluate(equal) == {"perplexity": pytest.approx(SIZE)}


def test_a_short_models_folder_tells_what_is_left_out(folder: Path, tmp_path: Path) -> None:
    """The source of a folder whose model has few positions must carry the note, and no prompts."""
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 24}))
    source = open_source(ref(short))
    assert source.evaluate is not None and source.prompts is None and "24 positions" in source.notes[0]


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
