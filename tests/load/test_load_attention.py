"""Attention kernels: exact by blocks, sparse patterns equal to masked attention; routing, traces and ONNX graphs."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deploytool.load.attention_kernels import allowed, blockwise, sparse
from deploytool.load.attention_routing import Pattern, Rerouted, attention_sites, reroute
from deploytool.load.plain_attention import plain

MASKS = ("none", "padding", "full", "per head")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _qkv(tokens: int) -> list[Tensor]:
    return [_random(2, 3, tokens, 5, seed=i) for i in range(3)]


def _mask(kind: str, tokens: int) -> Tensor | None:
    shape = {"padding": (2, 1, 1, tokens), "full": (2, 1, tokens, tokens), "per head": (1, 3, tokens, tokens)}
    if kind == "none":
        return None
    seen = _random(*shape[kind], seed=7) > -0.5
    seen[..., 0] = True
    return seen


def _added(seen: Tensor | None) -> Tensor | None:
    return None if seen is None else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_blockwise_is_exact(kind: str, causal: bool) -> None:
    """At every length and block, with every mask, outputs must be torch's to 1e-5."""
    for tokens, block in itertools.product((1, 16, 33), (1, 4, 64)):
        q, k, v = _qkv(tokens)
        mask = _mask(kind, tokens)
        seen = allowed(tokens, tokens, 0, 0, causal) & (True if mask is None else mask)
        got = blockwise(q, k, v, _added(mask), 5**-0.5, block, causal)
        torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, seen), atol=1e-5, rtol=0)


def test_blockwise_takes_other_keys_and_extreme_scores() -> None:
    """Keys of another length, and scores whose exponentials overflow, must give torch's outputs."""
    q, k, v = _random(1, 2, 5, 4), _random(1, 2, 9, 4, seed=1), _random(1, 2, 9, 6, seed=2)
    for scale in (0.5, 300.0):
        got = blockwise(q, k, v, None, scale, 2, False)
        torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, scale=scale), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_sparse_is_masked_attention(kind: str, causal: bool) -> None:
    """Window, strided blocks and global tokens must equal full attention under the pattern's mask."""
    for tokens, window, stride, first in itertools.product((1, 7, 21), (1, 4), (0, 3), (0, 2)):
        if first > tokens:
            continue
        q, k, v = _qkv(tokens)
        mask = _mask(kind, tokens)
        seen = allowed(tokens, window, stride, first, causal) & (True if mask is None else mask)
        got = sparse(q, k, v, _added(mask), 5**-0.5, window, stride, first, causal)
        some = seen.any(dim=-1).expand(2, 3, tokens)
        expected = scaled_dot_product_attention(q, k, v, seen)
        torch.testing.assert_close(got[some], expected[some], atol=1e-5, rtol=0)
        assert bool(torch.isfinite(got).all())


def test_allowed_is_what_the_words_say() -> None:
    """The pattern itself, written out by hand: window 1, every second block of 1, one global token, causal."""
    assert allowed(5, 1, 2, 1, True).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 1, 1, 1],
    ]  # fmt: skip


def _largest_elements(run: Any) -> int:
    """Elements of the largest tensor that torch makes while `run()` runs."""
    sizes = [0]

    class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor))
            return out

    with _Watch():
        run()
    return max(sizes)


def test_no_matrix_of_scores_is_made() -> None:
    """Blocks must make no tensor beyond a block's scores or the inputs; a window's must grow with the length only."""
    small, large = ([_random(1, 1, n, 8, seed=i) for i in range(3)] for n in (128, 512))
    assert _largest_elements(lambda: blockwise(*large, None, 1.0, 32, False)) <= 512 * 8
    sizes = [_largest_elements(lambda x=x: sparse(*x, None, 1.0, 16, 0, 2, False)) for x in (small, large)]
    assert sizes[1] == 4 * sizes[0]


class _Twice(nn.Module):
    """Two modules of attention, one below the other, and one that asks with keys of another length."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        self.inner = plain(layer.eval())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + scaled_dot_product_attention(x[:, None], x[:, None, :2], x[:, None, :2])[:, 0]


def _twice() -> _Twice:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Twice().eval().requires_grad_(False)


def test_sites_are_the_modules_that_ask() -> None:
    """Attention must be laid to the innermost module that asks for it, with its lengths; nothing may stay hooked."""
    model = _twice()
    found = {site.name: site.shapes for site in attention_sites(model, lambda: model(_random(2, 5, 12)))}
    assert found == {"inner.self_attn": ((5, 5),), "": ((5, 2),)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_rerouted_module_keeps_its_names_and_traces() -> None:
    """Parameters must keep their names, a copy its pattern, and a trace must be right at other lengths and batches."""
    model, before = _twice(), _twice()
    reroute(model, "inner.self_attn", Pattern(block=4))
    assert isinstance(model.inner.self_attn, Rerouted) and set(model.state_dict()) == set(before.state_dict())
    x = _random(2, 9, 12)
    torch.testing.assert_close(model(x), before(x), atol=1e-5, rtol=0)
    for pattern in (Pattern(block=4), Pattern(window=2, stride=2, globals_=1)):
        reroute(model, "inner.self_attn", pattern)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            script = torch.jit.trace(model, (x,), check_trace=False)
        for batch, tokens in ((1, 3), (3, 17), (2, 9)):
            y = _random(batch, tokens, 12, seed=tokens)
            torch.testing.assert_close(script(y), model(y), atol=1e-5, rtol=0)
    assert (model(x) - before(x)).abs().max() > 1e-3  # the window is really one


@pytest.mark.parametrize("wrong", [{}, {"block": 4, "window": 4}, {"window": -1}, {"stride": 2}])
def test_patterns_that_mean_nothing_are_refused(wrong: dict[str, int]) -> None:
    """A pattern must have a block or a window."""
    with pytest.raises(ValueError, match="must have a block or a window"):
        Pattern(**wrong)


def test_a_window_over_other_keys_is_refused() -> None:
    """Sparse attention between two sequences has no meaning here and must be an error."""
    q, k = _random(1, 1, 5, 4), _random(1, 1, 3, 4)
    with pytest.raises(ValueError, match="of a sequence to itself"):
        Pattern(window=2).attend(q, k, k, None, 1.0, False)
