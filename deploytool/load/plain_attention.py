"""torch's fused attention modules as equal modules of plain linears, which quantizers and factorizations reach.

nn.MultiheadAttention keeps its projections in one parameter, and nn.TransformerEncoderLayer reads the weights of its
children itself, so neither can be quantized layer by layer. The replacements take the same calls. Parameters keep
their names, but for the projections: `q`, `k`, `v` and `out_proj`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from deploytool.errors import InternalError
from deploytool.load.flat import no_fast_path

FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_TOLERANCE = 1e-4  # of the largest output: other order of additions, in float32


class PlainAttention(nn.Module):
    """nn.MultiheadAttention: softmax(Q K^T / sqrt(d)) V per head (Vaswani et al. 2017, equation 1 and section 3.2.2).

    Inputs [batch, tokens, width] with `batch_first`, else [tokens, batch, width], or [tokens, width]; returns the
    outputs and, with `need_weights`, the weights [batch, (heads,) tokens, tokens]. True in a bool mask means "hidden".
    """

    def __init__(self, fused: nn.MultiheadAttention):
        super().__init__()
        self.head_dim = fused.head_dim
        self.dropout = fused.dropout
        self.batch_first = fused.batch_first
        weights, biases = _projections(fused)
        self.q, self.k, self.v = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(fused.out_proj.weight, fused.out_proj.bias)
        self.train(fused.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given where is_causal is")
        swap = query.ndim == 3 and not self.batch_first
        inputs = [x.transpose(0, 1) if swap else x for x in (query, key, value)]
        q, k, v = (self._split(layer(x)) for layer, x in zip((self.q, self.k, self.v), inputs, strict=True))
        mask = _mask(attn_mask, key_padding_mask, q)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + _additive(mask, q)).softmax(dim=-1)
            weights = dropout(weights, self.dropout, self.training)
            mixed = weights @ v
            weights = weights.mean(dim=-3) if average_attn_weights else weights
        else:
            mixed = scaled_dot_product_attention(q, k, v, _visible(mask), self.dropout if self.training else 0.0)
        out: Tensor = self.out_proj(mixed.transpose(-3, -2).flatten(-2))
        out = out.transpose(0, 1) if swap else out
        return out, weights

    def _split(self, x: Tensor) -> Tensor:
        """[..., tokens, heads * head_dim] -> [..., heads, tokens, head_dim]."""
        # not unflatten: torch's exporter to ONNX takes the sizes behind it for constants
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(-3, -2)


class PlainEncoderLayer(nn.Module):
    """nn.TransformerEncoderLayer without its fused path: attention, then two linears, each added to its input."""

    def __init__(self, fused: nn.TransformerEncoderLayer):
        super().__init__()
        fused = copy.deepcopy(fused)
        self.self_attn = PlainAttention(fused.self_attn)
        self.linear1, self.linear2 = fused.linear1, fused.linear2
        self.norm1, self.norm2, self.norm_first = fused.norm1, fused.norm2, fused.norm_first
        self.dropout, self.dropout1, self.dropout2 = fused.dropout, fused.dropout1, fused.dropout2
        self.activation = fused.activation
        self.train(fused.training)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Shapes as of PlainAttention; `is_causal` is a hint that `src_mask` makes needless."""

        def attend(x: Tensor) -> Tensor:
            mixed, _ = self.self_attn(x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask)
            dropped: Tensor = self.dropout1(mixed)
            return dropped

        if self.norm_first:
            src = src + attend(self.norm1(src))
            src = src + self._feed(self.norm2(src))
        else:
            src = self.norm1(src + attend(src))
            src = self.norm2(src + self._feed(src))
        return src

    def _feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return fed


class PlainEncoder(nn.Module):
    """nn.TransformerEncoder: the layers one after the other, then the norm.

    torch's fast path leaves zeros where a padding mask hides tokens; on its plain way, and here, they have values.
    """

    def __init__(self, fused: nn.TransformerEncoder):
        super().__init__()
        self.layers = nn.ModuleList(plain(layer) if isinstance(layer, FUSED) else copy.deepcopy(layer)
                                    for layer in fused.layers)  # fmt: skip
        self.norm = copy.deepcopy(fused.norm)
        self.train(fused.training)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Shapes as of PlainAttention."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        if self.norm is not None:
            src = self.norm(src)
        return src


def fused_names(root: nn.Module) -> list[str]:
    """Names of the outermost fused modules that can be replaced; subclasses may do something else and stay."""
    found: list[str] = []
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if type(module) in FUSED and not inside and not _why_not(module):
            found.append(name)
    return found


def why_fused(root: nn.Module) -> dict[str, str]:
    """{name: reason} of the fused modules that have no plain form."""
    reasons = {name: _why_not(module) for name, module in root.named_modules() if isinstance(module, FUSED)}
    return {name: reason for name, reason in reasons.items() if reason}


def unfuse(root: nn.Module) -> dict[str, nn.Module]:
    """Replace every fused module below `root` that has a plain form, in place; the new modules by name."""
    made = {name: plain(root.get_submodule(name)) for name in fused_names(root) if name}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        root.get_submodule(parent).register_module(child, module)
    return made


def plain(fused: nn.Module) -> nn.Module:
    """The plain module that equals a fused one; raises ValueError where there is none, InternalError where unequal."""
    kinds: dict[type[nn.Module], type[PlainAttention | PlainEncoderLayer | PlainEncoder]] = {
        nn.MultiheadAttention: PlainAttention, nn.TransformerEncoderLayer: PlainEncoderLayer,
        nn.TransformerEncoder: PlainEncoder,
    }  # fmt: skip
    reason = _why_not(fused) if type(fused) in kinds else f"a {type(fused).__name__} is not one of torch's own"
    if reason:
        raise ValueError(reason)
    made = kinds[type(fused)](fused)  # type: ignore[arg-type]
    made.requires_grad_(False)
    difference = largest_difference(fused, made)
    if not difference <= _TOLERANCE:  # NaN fails too
        raise InternalError("DT900", f"the plain form of {type(fused).__name__} must give the same outputs "
                            f"(got a relative difference of {difference:.2g})")  # fmt: skip
    return made


def largest_difference(fused: nn.Module, made: nn.Module) -> float:
    """The largest difference of the two modules' outputs, over the largest output, hidden positions included.

    Without masks, with a causal one, with padding masks of every kind, and with both; on torch's plain way.
    """
    attention = next(m for m in fused.modules() if isinstance(m, nn.MultiheadAttention))
    random = torch.Generator().manual_seed(0)
    like = attention.out_proj.weight
    widths = (attention.embed_dim, attention.kdim, attention.vdim)
    drawn = [torch.randn(3, 3, width, generator=random).to(like) for width in widths]
    arguments = drawn if isinstance(fused, nn.MultiheadAttention) else drawn[:1]
    before, after = _evaluated(fused), _evaluated(made)
    found = []
    with torch.no_grad(), no_fast_path():
        for masks in _masks(fused, like):
            expected, got = (_first(module(*arguments, **masks)) for module in (before, after))
            found.append((expected - got).abs().max() / expected.abs().max().clamp(min=1e-30))
    return float(torch.stack(found).max())  # NaN where one is


def _masks(fused: nn.Module, like: Tensor) -> Iterator[dict[str, Tensor]]:
    """Masks for a batch of 3 sequences of 3 tokens, by the names that a fused module gives them."""
    padding_name = "key_padding_mask" if isinstance(fused, nn.MultiheadAttention) else "src_key_padding_mask"
    name = {nn.MultiheadAttention: "attn_mask", nn.TransformerEncoder: "mask"}.get(type(fused), "src_mask")
    causal = torch.ones(3, 3, dtype=torch.bool, device=like.device).triu(1)
    padding = torch.tensor([[False, False, False], [False, True, True], [False, False, True]], device=like.device)
    added = torch.zeros(3, 3).to(like).masked_fill(padding, -math.inf)
    soft = torch.arange(9.0).view(3, 3).to(like) / -4
    yield {}
    yield {name: causal}
    for hidden in (padding, added, soft):
        yield {padding_name: hidden}
    yield {name: causal, padding_name: padding}
    yield {name: torch.zeros_like(soft).masked_fill(causal, -math.inf), padding_name: soft}


def _evaluated(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _why_not(module: nn.Module) -> str | None:
    if type(module) not in FUSED:
        return f"{type(module).__name__} may do more than the class that it is made from"
    for inner in module.modules():
        if isinstance(inner, nn.MultiheadAttention) and (inner.bias_k is not None or inner.add_zero_attn):
            return "add_bias_kv and add_zero_attn have no form of plain linears"
        if inner is not module and isinstance(inner, FUSED) and type(inner) not in FUSED:
            return f"{type(inner).__name__} inside may do more than the class that it is made from"
    return None


def _projections(fused: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    joined: Tensor | None = fused.in_proj_weight
    bias: Tensor | None = fused.in_proj_bias
    apart = (fused.q_proj_weight, fused.k_proj_weight, fused.v_proj_weight)
    weights = list(apart if joined is None else joined.chunk(3))
    return weights, [None] * 3 if bias is None else list(bias.chunk(3))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear with copies of the tensors; made without memory first, so that no random numbers are drawn."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one [..., heads, tokens, tokens]: where both are bool the hidden, else what to add to scores."""
    parts = []
    if attn_mask is not None:
        apart = attn_mask.ndim == 3 and q.ndim == 4  # [batch * heads, ...] -> [batch, heads, ...]
        parts.append(attn_mask.unflatten(0, (-1, q.shape[1])) if apart else attn_mask)
    if padding is not None:
        parts.append(padding[..., None, None, :])
    if len(parts) < 2:
        return parts[0] if parts else None
    first, second = parts
    together = first.dtype == torch.bool == second.dtype
    return first | second if together else _additive(first, q) + _additive(second, q)


def _visible(mask: Tensor | None) -> Tensor | None:
    """A mask as torch's attention takes it: True in a bool one means "seen". Rows that see nothing are zeros then."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
