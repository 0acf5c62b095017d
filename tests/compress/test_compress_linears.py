"""Layers of a class of their own that compute what nn.Linear does: every step must reach them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.explain import explain
from deploytool.compress.linears import with_linears
from deploytool.compress.recipe import Recipe, parse_recipe
from deploytool.compress.run import compress
from deploytool.errors import InputRefused
from deploytool.load.compressed import save_compressed
from deploytool.load.linears import as_linear
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import apply_edits
from deploytool.source import Source

GPT2 = """
import torch
import transformers
from torch import nn

INPUTS = {"ids": ("batch", "sequence")}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32)
        self.gpt = transformers.GPT2Model(config)

    def forward(self, ids):
        return {"hidden": self.gpt(input_ids=ids, use_cache=False).last_hidden_state}


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 50, size, generator=generator)} for size in ((1, 12), (2, 9), (3, 16), (4, 7))]
"""


class Turned(nn.Module):
    """x W + b of a weight [in, out]; `times` makes it something else."""

    def __init__(self, inputs: int, outputs: int, times: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(inputs, outputs, generator=generator))
        self.register_parameter("bias", nn.Parameter(torch.randn(outputs, generator=generator)) if bias else None)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = self.times * (x @ self.weight)
        return y if self.bias is None else y + self.bias


class Straight(Turned):
    """x W^T of a weight [out, in]."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


@pytest.fixture
def gpt2(tmp_path: Path) -> Source:
    (tmp_path / "gpt2.py").write_text(GPT2)
    return open_source(resolve(str(tmp_path / "gpt2.py")))


def _recipe(text: str) -> Recipe:
    return parse_recipe(tomllib.loads(text), text, where="test")


@pytest.mark.parametrize("layer", [Turned(4, 6), Turned(5, 5), Turned(5, 5, bias=False), Straight(5, 5, bias=False)])
def test_they_are_known_by_what_they_do(layer: nn.Module) -> None:
    """Either way round, square ones too, with a bias or without, the Linear must give what the layer gives."""
    linear = as_linear(layer)
    assert linear is not None and (linear.bias is None) == (getattr(layer, "bias", None) is None)
    x = torch.randn(2, 7, linear.in_features)
    torch.testing.assert_close(linear(x), layer(x))
    with torch.no_grad():
        linear.weight.zero_()
    assert bool((layer.weight != 0).all())


@pytest.mark.parametrize("layer", [Turned(4, 6, times=1.01), nn.Linear(3, 4), nn.Embedding(4, 6), nn.Bilinear(2, 2, 2),
                                   nn.Sequential(Turned(4, 6)), nn.Conv2d(1, 1, 3), nn.LayerNorm((3, 4)),
                                   nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4),
                                   Turned(4, 6).double()])  # fmt: skip
def test_nothing_else_is_taken_for_one(layer: nn.Module) -> None:
    """A layer that gives anything else, or is a Linear already, must be left alone."""
    assert as_linear(layer) is None


def test_steps_reach_the_layers_of_gpt2(gpt2: Source, tmp_path: Path) -> None:
    """Zeros, fewer neurons and grids must reach all of GPT-2's layers, and the folder must open as it was."""
    recipe = _recipe("""
[[compress]]
step = "structured"
remove = 0.5
units = ["neurons"]

[[compress]]
step = "sparsegpt"
sparsity = 0.5

[[compress]]
step = "rtn"
bits = 8
group = "channel"
""")
    small, report = compress(gpt2, recipe)
    assert [(e["layer"], e["after"]) for e in report["steps"][0]["layers"]] == [
        (f"gpt.h.{i}.mlp.c_fc", 48) for i in (0, 1)
    ]
    linears = {name for name, layer in small.module.named_modules() if isinstance(layer, nn.Linear)}
    assert len(linears) == 8 and {f"{name}.weight" for name in linears} == set(small.masks) == set(small.encodings)
    assert small.module.gpt.h[0].mlp.c_proj.weight.shape == (24, 48)
    assert not any("Conv1D" in entry["reason"] for step in report["steps"] for entry in step["skipped"])
    save_compressed(small, gpt2, report, tmp_path / "out", overwrite=False)
    again = open_source(resolve(str(tmp_path / "out")))
    for sample in gpt2.samples():
        assert torch.equal(again.flat(sample["ids"])[0], small.flat(sample["ids"])[0])


def test_the_model_itself_stays(gpt2: Source) -> None:
    """The copy must give the same outputs, and the source must keep its own layers."""
    changed, names = with_linears(gpt2)
    assert len(names) == 8 and type(gpt2.module.gpt.h[0].mlp.c_fc).__name__ == "Conv1D"
    ids = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(changed.flat(ids)[0], gpt2.flat(ids)[0], rtol=1e-4, atol=1e-5)
    same, none = with_linears(changed)
    assert same is changed and not none


def test_explain_tells_of_them_too(gpt2: Source) -> None:
    """What --explain says of a step must be what the step does."""
    [told] = explain(gpt2, _recipe('[[compress]]\nstep = "sparsegpt"\nsparsity = 0.5\n'))["explained"]
    assert "gpt.h.1.attn.c_attn" in told["layers"]


READS = GPT2.replace("return {", "self.gpt.h[0].mlp.c_fc.nf\n        return {")


def test_a_model_that_reads_their_weights_itself_stays_as_it_is(tmp_path: Path) -> None:
    """Where replaced layers change what the model gives, or break it, none may be replaced."""
    (tmp_path / "gpt2.py").write_text(READS)
    source = open_source(resolve(str(tmp_path / "gpt2.py")))
    assert with_linears(source) == (source, [])


def test_an_edit_of_another_model_is_refused() -> None:
    """A folder whose model has changed since must be refused, not opened with some other layer."""
    for layer in (Turned(4, 7), nn.LayerNorm(4)):
        with pytest.raises(InputRefused, match="edit"):
            apply_edits(nn.ModuleDict({"a": layer}), [{"kind": "linear", "layer": "a", "inputs": 4, "outputs": 6}])
