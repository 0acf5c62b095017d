"""What torch's fast path for fused attention changes is measured, and the reference is taken without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deploytool.cases import Case  # noqa: E402
from deploytool.load.flat import FlatModule  # noqa: E402
from deploytool.lower.fast_path import fast_path_differs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
HIDDEN = torch.arange(5) >= torch.tensor([[5], [3], [1]])


class Encoder(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, **options)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options)

    def forward(self, x: Any, hidden: Any) -> Any:
        return self.layers(x, src_key_padding_mask=hidden)


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Any, hidden: Any) -> Any:
        return self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


class Pooled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Any, hidden: Any) -> Any:
        return (self.encoder(x, hidden) * ~hidden[..., None]).sum(1)


def differs(make_source: Callable[..., Any], module: Any, hidden: Any, folder: Path) -> dict[str, Any] | None:
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    module.eval().requires_grad_(False)
    outputs = {"output": ("b", "t", 12) if module(x, hidden).ndim == 3 else ("b", 12)}
    source = make_source(module, {"x": ("b", "t", 12), "hidden": ("b", "t")}, outputs, [(x, hidden)])
    source = dataclasses.replace(source, flat=FlatModule(module, ("x", "hidden"), ("output",)))
    (reference,) = source.flat(x, hidden)
    assert torch.backends.mha.get_fastpath_enabled()
    Case({"x": x.numpy(), "hidden": hidden.numpy()}, reference={"output": reference.numpy()}).save(folder / "000.npz")
    return fast_path_differs(source, folder)


@pytest.mark.parametrize(("module", "hidden", "far"), [
    (Encoder, HIDDEN, True), (Pooled, HIDDEN, False), (Attention, HIDDEN, False),
    (lambda: Encoder(norm_first=True), HIDDEN, False), (Encoder, HIDDEN & False, False),
    (Encoder, HIDDEN * -2.0, True),
])  # fmt: skip
def test_only_what_differs_is_told(
    module: Callable[[], Any], hidden: Any, far: bool, make_source: Callable[..., Any], tmp_path: Path
) -> None:
    """Zeros at hidden positions that are outputs, and soft masks taken for hard ones, are told; nothing else is."""
    torch.manual_seed(0)
    found = differs(make_source, module(), hidden, tmp_path)
    if not far:
        assert found is None
    else:
        assert found is not None and found["largest"] > 0.1
        assert {**found, "largest": 0} == {"cases": 1, "of": 1, "outputs": ["output"], "largest": 0, "failed": None}


class Cut(torch.nn.Module):
    """On the fast path it gives the rows that are seen alone, and it fails on negative ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Any) -> Any:
        if torch.backends.mha.get_fastpath_enabled():
            if x.min() < -100:
                raise ValueError("negative")
            return self.encoder(x, None)[:, :2]
        return self.encoder(x, None)


def test_a_case_that_fails_does_not_hide_the_others(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """Another shape counts as wholly different, and what fails is told beside the figures of what does not."""
    module = Cut().eval().requires_grad_(False)
    samples = [torch.randn(1, 5, 12), torch.randn(1, 5, 12) - 200]
    source = make_source(module, {"x": (1, 5, 12)}, {"output": (1, 5, 12)}, [(x,) for x in samples])
    flat = FlatModule(module, ("x",), ("output",))
    for number, x in enumerate(samples):
        Case({"x": x.numpy()}, reference={"output": flat(x)[0].numpy()}).save(tmp_path / f"{number:03d}.npz")
    found = fast_path_differs(source, tmp_path)
    assert found == {"cases": 1, "of": 2, "outputs": ["output"], "largest": 1.0, "failed": "it fails: negative"}


def test_other_modules_are_not_run_again(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """Where no module has a fast path there must be no cost: not even the cases are read."""
    source = make_source(torch.nn.Linear(3, 2), {"x": ("b", 3)}, {"y": ("b", 2)}, [(torch.zeros(2, 3),)])
    assert fast_path_differs(source, tmp_path / "none") is None


def test_the_flat_module_leaves_out_the_fast_path(make_source: Callable[..., Any]) -> None:
    """Hidden positions have values in the flat module; with `fast_path` they are the zeros that torch's users see."""
    torch.manual_seed(0)
    module = Encoder().eval().requires_grad_(False)
    x = torch.randn(3, 5, 12)
    plain, fast = (FlatModule(module, ("x", "hidden"), ("output",), fast_path=f)(x, HIDDEN)[0] for f in (False, True))
    assert not np.any(fast[HIDDEN].numpy()) and np.all(np.any(plain[HIDDEN].numpy(), axis=-1))
    torch.testing.assert_close(plain[~HIDDEN], fast[~HIDDEN], atol=1e-5, rtol=1e-5)
