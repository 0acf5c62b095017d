"""A Hugging Face causal language model as tensors in, tensors out, with its KV cache as flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from deploytool.errors import InputRefused
from deploytool.load.infer import Seen
from deploytool.load.texts import sentences

Shape = tuple[str | int, ...]
_NAME = "deploytool_attention"
_FORBIDDEN = -1e4  # added to a masked score: exp gives exactly 0, and it is still finite in half precision
# (batch, past, sequence) of the samples: a decoding step is timed, and what it comes after; then prefill, both at once,
# and padded batches.
_SAMPLES = ((1, 128, 1), (1, 0, 16), (2, 7, 9), (3, 0, 24), (4, 17, 1))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of [batch, heads, sequence, width] in the form that transformers calls; the mask is always given.

    Its own one takes another way for one query token than for several, and a trace freezes whichever it saw.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = (t.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
    mixed = scaled_dot_product_attention(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, eager_mask)  # for the model without its wrapper: a mask in full, always


class CausalLM(nn.Module):
    """Wraps a model with a language-model head; the cache goes in and out as one tensor per layer, key and value.

    Takes input_ids and position_ids [batch, sequence], attention_mask [batch, past + sequence], all int64, and
    past_key_values.N.key/value [batch, kv heads, past, head width]; `past` may be 0.
    Gives logits [batch, sequence, vocabulary] and present.N.key/value, which is the past with the new tokens appended.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.kinds = _attention_kinds(self.config)
        if model.config._attn_implementation == "sdpa":  # models that cannot use it keep their plain attention
            model.set_attn_implementation(_NAME)
        self.train(model.training)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **past: Tensor
    ) -> dict[str, Tensor]:
        pairs = [
            (past[f"past_key_values.{layer}.key"], past[f"past_key_values.{layer}.value"])
            for layer in range(self.config.num_hidden_layers)
        ]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=self._scores_mask(attention_mask, input_ids.shape[1], pairs[0][0].dtype),
            position_ids=position_ids,
            past_key_values=_cache(pairs),
            use_cache=True,
        )
        named = {"logits": outputs.logits}
        for layer, (key, value) in enumerate(_pairs(outputs.past_key_values)):
            named[f"present.{layer}.key"] = key
            named[f"present.{layer}.value"] = value
        return named

    def _scores_mask(self, attention_mask: Tensor, sequence: int, dtype: torch.dtype) -> Any:
        """What to add to the scores, [batch, 1, sequence, total], made here so that it follows every free dimension.

        The masks that transformers makes ask for lengths as Python numbers and branch on them, which a trace freezes.
        """
        key = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        query = torch.arange(sequence, device=key.device)[:, None] + (attention_mask.shape[1] - sequence)
        # A padding token sees itself: a row without any score would be NaN, or depend on the runtime's rounding.
        seen = ((key <= query) & attention_mask[:, None, None, :].bool()) | (key == query)
        masks = {"full_attention": seen, "sliding_attention": seen}
        if "sliding_attention" in self.kinds:
            masks["sliding_attention"] = seen & (key > query - self.config.sliding_window)
        added = {
            kind: torch.zeros_like(masks[kind], dtype=dtype).masked_fill(~masks[kind], _FORBIDDEN)
            for kind in self.kinds
        }
        return added if len(added) > 1 else added[self.kinds[0]]


def causal_inputs(config: Any) -> dict[str, Shape]:
    """Input names and shapes of a CausalLM, in order; the free dimensions by name."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes: dict[str, Shape] = {
        "input_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total_sequence"),
        "position_ids": ("batch", "sequence"),
    }
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            shapes[f"past_key_values.{layer}.{part}"] = ("batch", heads, "past_sequence", width)
    return shapes


def inputs_for(
    config: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    past: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Feeds of a CausalLM for the next tokens `input_ids` [batch, sequence].

    `attention_mask` [batch, past + sequence] is 0 at padding. `past` is the outputs of the step before, of which
    present.N.key/value are taken, or None for an empty cache of type `dtype`.
    """
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    for name, shape in causal_inputs(config).items():
        if not name.startswith("past_key_values."):
            continue
        if past is None:
            feeds[name] = torch.zeros(len(input_ids), int(shape[1]), 0, int(shape[3]), dtype=dtype)
        else:
            feeds[name] = past[name.replace("past_key_values", "present")]
    return feeds


def causal_samples(
    module: CausalLM, tokenize: Callable[[str], list[int]], seen: Seen | None = None
) -> list[dict[str, Tensor]]:
    """Feeds of real text: the first is one decoding step after 128 tokens; batches are padded at the left.

    The past is what `module` itself computes from the text before. The second sample is the
    text before the first, whose outputs `seen` gets.
    """
    needed = sum(batch * (past + sequence) for batch, past, sequence in _SAMPLES)
    ids = torch.tensor(_enough(tokenize, needed))
    samples: list[dict[str, Tensor]] = []
    for batch, past, sequence in _SAMPLES:
        rows, ids = ids[: batch * (past + sequence)].view(batch, -1), ids[batch * (past + sequence) :]
        padding = 2 * torch.arange(batch)[:, None]
        mask = (torch.arange(past + sequence) >= padding).long()
        before, filling = None, {}
        if past:
            filling = inputs_for(module.config, rows[:, :past], mask[:, :past], dtype=_dtype(module))
            with torch.inference_mode():
                before = module(**{name: value.clone() for name, value in filling.items()})
            before = {name: value.clone() for name, value in before.items()}
        samples.append(inputs_for(module.config, rows[:, past:], mask, before, _dtype(module)))
        if len(samples) == 1 and before is not None:
            samples.append(filling)
            if seen is not None:
                seen[1] = before
    return samples


def _dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def _enough(tokenize: Callable[[str], list[int]], count: int) -> list[int]:
    """The first `count` tokens of the texts."""
    texts = sentences()
    ids: list[int] = []
    while len(ids) < count:
        size = max(1, count // 20)
        ids += tokenize(" ".join(texts[:size]))
        texts = texts[size:] or sentences()
    return ids[:count]


def _attention_kinds(config: Any) -> tuple[str, ...]:
    """The kinds of attention that the layers use: full, sliding or both; any other is refused."""
    whole = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = tuple(sorted(set(getattr(config, "layer_types", None) or [whole])))
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise InputRefused(
            "DT306",
            f"every layer of a language model must have full or sliding attention (got {', '.join(unknown)})",
            fix="write a model file whose module takes and gives this model's own state as tensors",
        )
    return kinds


def _cache(pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """The cache object that transformers wants, holding the pairs themselves; how it is made changed over versions.

    Where it has layers they are filled here: its own way first appends each pair to an empty constant, which a trace
    keeps as one needless concatenation per tensor.
    """
    legacy = getattr(DynamicCache, "from_legacy_cache", None)
    if not hasattr(DynamicLayer, "lazy_initialization"):
        return legacy(tuple(pairs)) if legacy is not None else DynamicCache(pairs)
    cache = DynamicCache()
    cache.layers = []
    for key, value in pairs:
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layer.dtype, layer.device = key.dtype, key.device
        cache.layers.append(layer)
    return cache


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Key and value of every layer of a cache object."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(cache.to_legacy_cache())
