"""Fourier mixing in the place of attention: the transform itself, gains from data, folders and graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from deploytool.compress.attention.fnet import apply
from deploytool.compress.attention.tables import Fnet
from deploytool.compress.run import compress_job
from deploytool.compress.step import Calibration, Context
from deploytool.errors import UsageProblem
from deploytool.load.fourier import FourierMixing, dft
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import with_module
from deploytool.lower.onnx import lower_onnx
from deploytool.source import Source

FNET = Fnet(step="fnet")


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(resolve("digits"))


def _context(source: Source) -> Context:
    return Context(source, Calibration(samples=4), 0, lambda line: None)


@pytest.mark.parametrize(("tokens", "fixed"), [(16, True), (7, False), (1, False), (128, False)])
def test_mixing_is_the_fourier_transform(tokens: int, fixed: bool) -> None:
    """The mixing must be the real part of torch's unitary FFT over tokens and width, times the gains."""
    x = torch.randn(2, tokens, 12, generator=torch.Generator().manual_seed(0))
    mixing = FourierMixing(12, tokens if fixed else None, None, 0)
    mixing.gain.data = torch.arange(12.0)
    expected = torch.fft.fft2(x, norm="ortho").real * torch.arange(12.0)
    torch.testing.assert_close(mixing(x), expected, atol=1e-5, rtol=1e-5)


def test_the_transform_is_unitary() -> None:
    """C and S must make a matrix whose inverse is its own conjugate: C C + S S = 1."""
    cos, sin = dft(9, torch.float64)
    torch.testing.assert_close(cos @ cos + sin @ sin, torch.eye(9, dtype=torch.float64))


def test_step_keeps_each_channels_strength(digits: Source) -> None:
    """Attention must be gone with its weights, and each channel as strong on the samples as the attention's was."""
    changed, report = apply(digits, FNET, _context(digits))
    assert [row["tokens"] for row in report["layers"]] == [16] * 4
    assert not any("attention.q" in name for name in changed.module.state_dict())
    seen: dict[str, Tensor] = {}
    for label, source in (("before", digits), ("after", changed)):
        outputs: list[Tensor] = []
        handle = source.module.blocks[0].attention.register_forward_hook(lambda m, a, o, k=outputs: k.append(o))
        for sample, _ in zip(digits.samples(), range(4), strict=False):
            source.module(**sample)
        handle.remove()
        seen[label] = torch.cat([o.flatten(0, 1) for o in outputs]).std(dim=0)
    torch.testing.assert_close(seen["after"], seen["before"], rtol=1e-4, atol=1e-4)


def test_folder_and_graph(digits: Source, tmp_path: Path) -> None:
    """The folder must open with the mixing in place, and its ONNX graph hold no Fourier operator and be right."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "fnet"\n[calibration]\nsamples = 4\n')
    compress_job(dataclasses.asdict(digits.ref), str(recipe), str(tmp_path / "out"), evaluate=False)
    again = open_source(resolve(str(tmp_path / "out")))
    direct, _ = apply(digits, FNET, _context(digits))
    file = lower_onnx(again, tmp_path / "onnx").main_file
    assert not {node.op_type for node in onnx.load(file).graph.node} & {"DFT", "STFT", "Loop"}
    session = runtime.InferenceSession(file)
    for sample in digits.samples():
        torch.testing.assert_close(again.module(**sample), direct.module(**sample))
        (got,) = session.run(None, {"image": sample["image"].numpy()})
        torch.testing.assert_close(torch.from_numpy(got), again.module(**sample)["logits"], atol=1e-4, rtol=1e-4)


class _Varied(nn.Module):
    """Attention that takes its input by keyword, returns a pair, and runs at several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = _Pair()
        self.cross = _Cross()

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mix(mask=None, hidden_states=x)[0]
        return mixed + self.cross(x, x.flip(1))


class _Pair(nn.Module):
    def forward(self, hidden_states: Tensor, mask: Any) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(hidden_states, hidden_states, hidden_states), None


class _Cross(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, other, other)


def test_forms_of_call_are_kept_and_other_sequences_refused(digits: Source, tmp_path: Path) -> None:
    """Keyword inputs, pairs of outputs and varying lengths must be taken; attention to another sequence must stay."""
    path = tmp_path / "varied.py"
    path.write_text("import torch\nfrom torch import nn\n\n\ndef build():\n    return nn.Identity()\n\n\n"
                    "def samples():\n    return [{'input': torch.randn(2, n, 12)} for n in (5, 7)]\n")  # fmt: skip
    source = open_source(resolve(str(path)))
    source = dataclasses.replace(with_module(source, _Renamed()), samples=source.samples)
    changed, report = apply(source, FNET, _context(source))
    assert [(row["layer"], row["tokens"]) for row in report["layers"]] == [("inner.mix", None)]
    assert report["skipped"] == [{"layer": "inner.cross", "reason": "it attends to another sequence"}]
    for sample in source.samples():
        assert changed.module(**sample).shape == sample["input"].shape


class _Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Varied()

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.inner(input)
        return out


def test_patterns_that_match_nothing_are_refused(digits: Source, tiny: Source, context: Context) -> None:
    """A pattern without a module, and a model without attention, must each be told."""
    with pytest.raises(UsageProblem, match="must match layers"):
        apply(digits, Fnet(step="fnet", include=("encoder.*",)), _context(digits))
    with pytest.raises(UsageProblem, match="must find modules"):
        apply(tiny, FNET, context)
