"""Linear and convolution layers as what calibrated algorithms see: a matrix W [out, in] that multiplies rows X [n, in].

A convolution is the same with its patches as rows (im2col; Chellapilla, Puri, Simard, "High performance convolutional
neural networks for document processing", 2006).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from deploytool.compress.select import shared_names

Measure = Callable[[Tensor], Tensor]
_TILE = 256
# Their forward reads `child.weight` itself: a hook on the child would see nothing.
_READ_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def matrix_layers(module: nn.Module) -> tuple[dict[str, nn.Module], list[dict[str, str]]]:
    """{name: layer} of layers that are matrices, and {"layer", "reason"} of those that have weights but are none."""
    shared = shared_names(module)
    found: dict[str, nn.Module] = {}
    skipped = []
    for name, layer in module.named_modules():
        own = [n for n, p in layer.named_parameters(prefix=name, recurse=False) if p.ndim >= 2]
        if not own:
            continue
        reason = _why_not(module, name, layer, shared)
        if reason:
            skipped.append({"layer": name, "reason": reason})
        else:
            found[name] = layer
    return found, skipped


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as [out, in], a view of the parameter."""
    weight = layer.get_parameter("weight").detach()
    return weight.view(weight.shape[0], -1)


def set_matrix(layer: nn.Module, value: Tensor) -> None:
    """Give the layer another weight [out, in], as a new parameter: tensors that a copy shares stay as they are."""
    old = layer.get_parameter("weight")
    new = value.to(old.dtype).reshape(old.shape).contiguous()
    layer.register_parameter("weight", nn.Parameter(new, requires_grad=False))


def rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The layer's input [..., in] or [batch, channels, ...] as rows [n, in], in the order of `matrix`'s columns."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if isinstance(layer, nn.Conv1d):
        return _patches(layer, inputs.unsqueeze(-2), 1)
    if isinstance(layer, nn.Conv2d):
        return _patches(layer, inputs, 2)
    raise TypeError(f"the layer must be a Linear or a convolution, not a {type(layer).__name__}")


def output_rows(layer: nn.Module, outputs: Tensor) -> Tensor:
    """The layer's output [..., out] or [batch, out, ...] as rows [n, out], in the order of `rows`."""
    last = outputs if isinstance(layer, nn.Linear) else outputs.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


def geometry(layer: nn.Module) -> tuple[object, ...]:
    """Equal for two layers that make the same rows of the same input."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    return ()


def gram(x: Tensor) -> Tensor:
    """X^T X [in, in] of rows X [n, in], in the type of X; exactly symmetric.

    Only tiles on and above the diagonal are multiplied: little more than half of the work of a full product.
    """
    size = x.shape[1]
    product = x.new_empty(size, size)
    for start in range(0, size, _TILE):
        stop = min(start + _TILE, size)
        strip = x[:, start:stop].T @ x[:, start:]
        square = strip[:, : stop - start]
        product[start:stop, start:] = strip
        product[start:, start:stop] = strip.T
        product[start:stop, start:stop] = (square + square.T) / 2
    return product


def squares(x: Tensor) -> Tensor:
    """Sum of the squares of every column [in] of rows X [n, in]: the diagonal of `gram`."""
    return x.square().sum(dim=0)


def _patches(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, axes: int) -> Tensor:
    """im2col of [batch, channels, height, width] (height 1 for one axis)."""
    padded = inputs
    before_after = layer._reversed_padding_repeated_twice  # last axis first, as `pad` wants it; also for "same"
    if any(before_after):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        flat = padded.squeeze(-2) if axes == 1 else padded
        flat = pad(flat, list(before_after), mode=mode)
        padded = flat.unsqueeze(-2) if axes == 1 else flat
    lead = (1,) * (2 - axes)
    patches = unfold(padded, lead + tuple(layer.kernel_size), dilation=lead + tuple(layer.dilation),
                     stride=lead + tuple(layer.stride))  # fmt: skip
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _why_not(module: nn.Module, name: str, layer: nn.Module, shared: dict[str, str]) -> str | None:
    parent = module.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding"
    if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d):
        return f"a {type(layer).__name__}, neither Linear nor convolution"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)) and layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    weight = f"{name}.weight" if name else "weight"
    if weight in shared:
        return f"its weight is shared with {shared[weight]}"
    if name and isinstance(parent, _READ_CHILDREN):
        return f"{type(parent).__name__} reads its weight directly"
    if not layer.get_parameter("weight").is_floating_point():
        return "its weight is not floating-point"
    return None
