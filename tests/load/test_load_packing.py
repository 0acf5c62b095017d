"""Tensors in fewer bytes: bit for bit the same, small enough, and damage is seen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from deploytool.encoding import Encoding
from deploytool.errors import InputRefused
from deploytool.load.grid import pack, quantize, snap
from deploytool.load.packing import Packed, pack_state, pack_tensor, unpack_state, unpack_tensor


def _weights(*shape: int, seed: int = 0) -> Tensor:
    """Like trained weights: normal, of different strength per row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * 0.1


def _sparse(weight: Tensor, kept: int, of: int) -> Tensor:
    """The weight with the `kept` largest of every `of` neighbours."""
    groups = weight.view(-1, of)
    mask = torch.zeros_like(groups).scatter(1, groups.abs().topk(kept, dim=1).indices, 1.0)
    return (groups * mask).view_as(weight)


ODD = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.0, 0.0]).repeat(1000)


@pytest.mark.parametrize("tensor", [
    _sparse(_weights(64, 256), 1, 2), _sparse(_weights(64, 256), 2, 4), _weights(64, 256), ODD, torch.zeros(100, 100),
    _sparse(_weights(64, 256), 1, 8).half(), _weights(64, 256).bfloat16(), _weights(64, 128).double(),
    torch.arange(5000), torch.arange(9000).to(torch.uint8), torch.zeros(9000, dtype=torch.bool), _weights(64, 256).T,
], ids=lambda t: f"{t.dtype} {list(t.shape)}")  # fmt: skip
def test_what_is_unpacked_is_the_same_bits(tensor: Tensor) -> None:
    """Every type, signed zeros, NaN, infinities and denormals included, must come back bit for bit."""
    packed = pack_tensor(tensor)
    assert packed is not None, "every one of these can be smaller"
    data, how = packed
    back = unpack_tensor("x", data, how)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert back.contiguous().flatten().view(torch.uint8).equal(tensor.contiguous().flatten().view(torch.uint8))
    assert data.numel() < 0.97 * tensor.numel() * tensor.element_size()


def test_half_zeros_take_little_more_than_half() -> None:
    """50 % zeros anywhere must take at most 0.62 of the dense bytes, and 2:4 no more."""
    dense = _weights(256, 1024)
    anywhere = torch.where(dense.abs() > dense.abs().median(), dense, 0.0)
    for sparse in (anywhere, _sparse(dense, 2, 4)):
        packed = pack_tensor(sparse)
        assert packed is not None and packed[0].numel() <= 0.62 * dense.numel() * 4


def test_two_of_four_on_a_grid_take_an_eighth() -> None:
    """2:4 zeros on an int4 grid in groups of 64, with its scales, must take at most 0.12 of the bytes in fp32."""
    weight = _sparse(_weights(256, 1024), 2, 4)
    scale = weight.view(256, 16, 64).abs().amax(dim=2) / 7.0
    encoding = Encoding(4, 0, 64, scale, torch.full_like(scale, 8.0))
    assert not snap(weight, encoding)[weight == 0].any()
    state = {"w:codes": pack(quantize(weight, encoding), 4), "w:scale": scale, "w:zero_point": encoding.zero_point}
    stored, told = pack_state(state, ":packed")
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= 0.12 * weight.numel() * 4
    back = unpack_state(stored, told, ":packed")
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)


def test_noise_and_small_tensors_stay_as_they_are() -> None:
    """What would not get smaller must be stored as it is, under its own name."""
    noise = torch.randint(0, 256, (20_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored, told = pack_state({"noise": noise, "small": torch.zeros(100)}, ":packed")
    assert not told and stored["noise"] is noise and set(stored) == {"noise", "small"}


def _damaged(how: Packed) -> list[Packed]:
    parts = list(how.parts)
    return [
        dataclasses.replace(how, dtype="int16"), dataclasses.replace(how, dtype="save"),
        dataclasses.replace(how, shape=(7, 7)), dataclasses.replace(how, shape=(-64, -256)),
        dataclasses.replace(how, bitmap=False), dataclasses.replace(how, parts=tuple(parts[:-1])),
        dataclasses.replace(how, parts=(("lzma", parts[0][1]), *parts[1:])),
        dataclasses.replace(how, parts=((parts[0][0], parts[0][1] - 1), *parts[1:])),
        dataclasses.replace(how, parts=(*parts[:-1], (parts[-1][0], parts[-1][1] + 9))),
    ]  # fmt: skip


def test_damage_is_refused() -> None:
    """Another description, bytes cut off, added or changed, must be an error and never another tensor's values."""
    packed = pack_tensor(_sparse(_weights(64, 256), 2, 4))
    assert packed is not None
    data, how = packed
    for wrong in _damaged(how):
        with pytest.raises(InputRefused, match="packed tensor 'x'"):
            unpack_tensor("x", data, wrong)
    for wrong in (data[:-1], torch.cat([data, data[:1]]), data.float(), data[:0]):
        with pytest.raises(InputRefused, match="packed tensor 'x'"):
            unpack_tensor("x", wrong, how)


def test_a_small_part_cannot_become_a_large_one() -> None:
    """A part that unpacks to more than its tensor must be refused before memory is taken for it."""
    packed = pack_tensor(torch.zeros(1 << 24))
    assert packed is not None
    with pytest.raises(InputRefused, match="packed tensor 'x'"):
        unpack_tensor("x", packed[0], dataclasses.replace(packed[1], shape=(10_000,)))
