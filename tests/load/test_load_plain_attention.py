"""torch's fused attention as plain linears: the same outputs for every call, and quantizers reach the projections."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import InternalError
from deploytool.load import plain_attention
from deploytool.load.flat import no_fast_path
from deploytool.load.plain_attention import PlainAttention, PlainEncoder, fused_names, plain, unfuse, why_fused


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().eval()
        for parameter in module.parameters():  # torch starts biases at zero, which would hide a swap of them
            parameter.data += 0.1 * torch.randn_like(parameter)
        return module.requires_grad_(False)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "kdim", "no bias"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head", "padding", "both"])
def test_equals_multihead_attention(batch_first: bool, kind: str, mask: str) -> None:
    """Outputs and weights must be nn.MultiheadAttention's for every layout, kind of projection and mask."""
    options = {"kdim": 5, "vdim": 7} if kind == "kdim" else {"bias": kind != "no bias"}
    fused = _seeded(lambda: nn.MultiheadAttention(12, 3, batch_first=batch_first, **options))
    query = _random(2, 4, 12)
    key, value = (query, query) if kind == "self" else (_random(2, 6, fused.kdim), _random(2, 6, fused.vdim))
    tokens = key.shape[1]
    hidden = torch.arange(tokens)[None] > torch.arange(4)[:, None] + 1
    arguments: dict[str, Any] = {"average_attn_weights": kind == "cross"}
    if mask in ("bool", "both"):
        arguments["attn_mask"] = hidden
    elif mask == "float":
        arguments["attn_mask"] = _random(4, tokens)
    elif mask == "per head":
        arguments["attn_mask"] = _random(6, 4, tokens)
    if mask in ("padding", "both"):
        arguments["key_padding_mask"] = torch.tensor([[False] * tokens, [False] * (tokens - 1) + [True]])
    inputs = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    made = plain(fused)
    expected, weights = fused(*inputs, **arguments)
    got, seen = made(*inputs, **arguments)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen, weights, atol=1e-5, rtol=1e-5)
    without, none = made(*inputs, **arguments, need_weights=False)
    torch.testing.assert_close(without, expected, atol=1e-5, rtol=1e-5)
    assert none is None


def test_equals_without_a_batch() -> None:
    """One sequence [tokens, width] must be taken as torch takes it."""
    fused = _seeded(lambda: nn.MultiheadAttention(8, 2))
    x = _random(5, 8)
    torch.testing.assert_close(plain(fused)(x, x, x)[0], fused(x, x, x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_the_encoder(norm_first: bool, batch_first: bool) -> None:
    """A whole nn.TransformerEncoder must give the same with and without masks, where its tokens are not hidden."""
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=batch_first, norm_first=norm_first, activation="gelu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells when its nested path is off
        fused = _seeded(lambda: nn.TransformerEncoder(layer, 2, nn.LayerNorm(12)))
    made = plain(fused)
    assert isinstance(made, PlainEncoder) and not fused_names(made)
    x = _random(2, 5, 12) if batch_first else _random(5, 2, 12)
    torch.testing.assert_close(made(x), fused(x), atol=1e-5, rtol=1e-5)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(made(x, mask=causal), fused(x, mask=causal), atol=1e-5, rtol=1e-5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = [m(x, src_key_padding_mask=padding) for m in (made, fused)]
    first, second = (t if batch_first else t.transpose(0, 1) for t in seen)
    torch.testing.assert_close(first[~padding], second[~padding], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float", "soft"])
def test_equals_the_encoder_where_tokens_are_hidden(norm_first: bool, kind: str) -> None:
    """At hidden positions too, and in rows that are hidden as a whole, it must give what torch's plain way gives."""
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells when its nested path is off
        fused = _seeded(lambda: nn.TransformerEncoder(layer, 2, nn.LayerNorm(12)))
    hidden = torch.arange(5) >= torch.tensor([[5], [3], [0]])
    added = torch.zeros(3, 5).masked_fill(hidden, -2.0 if kind == "soft" else -torch.inf)
    mask, x = (hidden if kind == "bool" else added), _random(3, 5, 12)
    with no_fast_path():
        expected = fused(x, src_key_padding_mask=mask)
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(plain(fused)(x, src_key_padding_mask=mask), expected, atol=1e-5, rtol=1e-5)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.odd = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        for attention in (self.attention, self.odd):
            x = x + attention(x, x, x, need_weights=False)[0]
        return x


def test_quantizers_reach_every_projection() -> None:
    """After unfuse dynamic quantization must find all linears, run in eval mode and stay near fp32."""
    model = _seeded(_Model)
    x = _random(2, 5, 12)
    expected = model(x)
    assert set(unfuse(model)) == {"encoder", "attention"} and "add_bias_kv" in why_fused(model)["odd"]
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert type(model.attention) is PlainAttention
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        got = quantized(x)
    kinds = {n: type(m).__module__ for n, m in quantized.named_modules() if hasattr(m, "_packed_params")}
    assert {f"attention.{n}" for n in ("q", "k", "v", "out_proj")} <= set(kinds) and "encoder.linear1" in kinds
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.99


def test_a_trace_takes_other_sizes() -> None:
    """A trace of the plain form must be right at another batch and length."""
    made = plain(_seeded(lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(made, (_random(2, 5, 12),))
    x = _random(3, 9, 12)
    torch.testing.assert_close(script(x), made(x))


def test_an_unequal_replacement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted swap of keys and queries must be seen by the check that every replacement goes through."""
    made = plain_attention._projections
    monkeypatch.setattr(plain_attention, "_projections",
                        lambda fused: tuple([part[1], part[0], part[2]] for part in made(fused)))  # fmt: skip
    fused = _seeded(lambda: nn.MultiheadAttention(12, 3, batch_first=True))
    with pytest.raises(InternalError, match="must give the same outputs"):
        plain(fused)


@pytest.mark.parametrize("wrong", ["ignored", "zeros", "NaN"])
def test_a_padding_mask_is_part_of_the_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted form that ignores the padding mask, or clears what it hides, or gives NaN there, must be refused."""
    right = PlainEncoder.forward

    def planted(self: PlainEncoder, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None
                ) -> Tensor:  # fmt: skip
        if wrong == "ignored" or src_key_padding_mask is None or src_key_padding_mask.dtype != torch.bool:
            return right(self, src, mask, None if wrong == "ignored" else src_key_padding_mask)
        filled = 0.0 if wrong == "zeros" else torch.nan
        return right(self, src, mask, src_key_padding_mask).masked_fill(src_key_padding_mask[..., None], filled)

    monkeypatch.setattr(PlainEncoder, "forward", planted)
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    with pytest.raises(InternalError, match="must give the same outputs"):
        plain(_seeded(lambda: nn.TransformerEncoder(layer, 2)))
