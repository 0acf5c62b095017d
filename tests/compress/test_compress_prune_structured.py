"""Structured pruning: units found by what they do, really removed, the rest fitted, and the folder that comes back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from deploytool.compress.matrices import matrix, matrix_layers
from deploytool.compress.prune import magnitude
from deploytool.compress.prune.budget import least_loss, same_share
from deploytool.compress.prune.discover import discover, kind
from deploytool.compress.prune.importance import unit_scores
from deploytool.compress.prune.influence import watch
from deploytool.compress.prune.refit import Reading, best_damping, best_weight, removal_order
from deploytool.compress.prune.structured import apply
from deploytool.compress.prune.tables import Magnitude, Structured
from deploytool.compress.prune.units import find_groups
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.causal_lm import CausalLM, causal_inputs, causal_samples
from deploytool.load.compressed import save_compressed
from deploytool.load.infer import infer_signature
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

FRESH = """
import sys, numpy, torch
torch.set_num_threads(1)
from deploytool.load.infer import infer_signature
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
source = open_source(resolve(sys.argv[1]))
numpy.savez(sys.argv[2], *[source.flat(s["image"])[0].numpy() for s in source.samples()])
"""


RESIDUAL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.outer(torch.relu(self.norm(self.inner(x)))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 3), nn.Sequential(Block(), Block()), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 3, 6, 6, generator=generator)} for _ in range(8)]
"""


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(resolve("digits"))


def _run(source: Source, samples: int = 8, **settings: Any) -> tuple[Source, dict[str, Any]]:
    context = Context(source, Calibration(samples=samples), 0, lambda line: None)
    return apply(source, Structured(step="structured", **settings), context)


def _accuracy(source: Source) -> float:
    assert source.evaluate is not None
    with torch.no_grad():
        return source.evaluate(lambda feeds: {"logits": source.module(feeds["image"])["logits"]})["accuracy"]


def _groups(module: nn.Module, *inputs: Tensor) -> tuple[list[Any], dict[str, str]]:
    layers, _ = matrix_layers(module)
    norms = {n for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    probe = watch(partial(module.eval(), *inputs), module, set(layers))
    return find_groups(probe, {n: matrix(layer).shape[0] for n, layer in layers.items()}, set(layers) | norms)


def test_heads_and_neurons_are_found_in_a_transformer(digits: Source) -> None:
    """Each block must give one group of 8 heads and one of 256 neurons, each unit with all of its channels."""
    layers, _ = matrix_layers(digits.module)
    groups, why = discover(digits, layers, list(digits.samples()))
    assert [(kind(digits, g), len(g)) for g in groups] == [("heads", 8), ("neurons", 256)] * 4
    heads = groups[0]
    assert set(heads.makers) == {f"blocks.0.attention.{n}" for n in "qkv"} and heads.readers == [
        "blocks.0.attention.out"
    ]
    for number, (outputs, inputs) in enumerate(zip(heads.outputs, heads.inputs, strict=True)):
        mine = list(range(8 * number, 8 * number + 8))
        assert all(rows == mine for rows in outputs.values()) and inputs["blocks.0.attention.out"] == mine
    assert why["head"] == "its channels are part of the outputs" and "needs all of its channels" in why["blocks.0.down"]


def test_gated_and_grouped_units_are_found() -> None:
    """Two layers that multiply must share units; key heads that serve several query heads must go with all of them."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
            self.q, self.k, self.v, self.o = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t(x).unflatten(-1, (-1, 3)).transpose(1, 2) for t in (self.q, self.k, self.v))
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    groups, _ = _groups(Grouped(), torch.randn(2, 5, 6))
    sizes = {tuple(sorted(g.makers)): len(g) for g in groups}
    assert sizes == {("k", "q", "v"): 2, ("gate", "up"): 10}
    attention = next(g for g in groups if "q" in g.makers)
    assert attention.outputs[0] == {"k": [0, 1, 2], "q": [0, 1, 2, 3, 4, 5], "v": [0, 1, 2]}


def test_residual_channels_hang_together() -> None:
    """Convolutions whose outputs are added must lose the same channels, with their normalizations and all readers."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.inner, self.outer = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
            self.last = nn.Linear(8 * 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            x = x + self.outer(torch.relu(self.inner(x)))
            return self.last(x.flatten(1))

    groups, why = _groups(Residual(), torch.randn(2, 2, 4, 4))
    by_makers = {tuple(sorted(g.makers)): g for g in groups}
    assert {k: len(g) for k, g in by_makers.items()} == {("first", "outer"): 8, ("inner",): 5}
    both = by_makers[("first", "outer")]
    assert set(both.readers) == {"norm", "inner", "last"}
    assert both.inputs[3] == {"norm": [3], "inner": [3], "last": list(range(48, 64))}
    assert set(why) == {"last"}


PARTS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + torch.cat([self.down(torch.relu(self.up(part))) for part in x.split(PART)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(rows, 6, generator=generator)} for rows in (4, 12, 5, 9)]
"""


@pytest.mark.parametrize("part", [6, 100])
def test_layers_that_run_twice_on_some_sample_are_left_alone(tmp_path: Path, part: int) -> None:
    """Long samples that are cut into parts must not be counted as one of their parts: nothing goes, with the reason."""
    (tmp_path / "parts.py").write_text(PARTS.replace("PART)", f"{part})"))
    source = open_source(resolve(str(tmp_path / "parts.py")))
    if part == 100:
        assert {e["after"] for e in _run(source, remove=0.5)[1]["layers"]} == {4}
        return
    with pytest.raises(UsageProblem, match="units") as refused:
        _run(source, remove=0.5)
    assert any("blocks.0.up: it runs several times" in line for line in refused.value.detail)


def test_half_of_a_transformer_goes(digits: Source) -> None:
    """Parameters must fall by half, shapes with them, and reconstruction must keep more than plain removal does."""
    pruned, report = _run(digits, remove=0.5)
    assert pruned.module.blocks[0].up.weight.shape == (128, 64) and pruned.module.blocks[0].down.in_features == 128
    assert pruned.module.blocks[2].attention.q.weight.shape == (32, 64)
    counts = [sum(p.numel() for p in s.module.parameters()) for s in (digits, pruned)]
    assert counts[1] < 0.52 * counts[0]
    assert [(e["units"], e["before"], e["after"]) for e in report["layers"]] == [
        ("heads", 8, 4),
        ("neurons", 256, 128),
    ] * 4
    plain, _ = _run(digits, remove=0.5, importance="magnitude", reconstruct=False)
    assert _accuracy(pruned) > 0.95 and _accuracy(pruned) > _accuracy(plain) + 0.02


def test_removed_units_are_as_if_their_readers_ignored_them(digits: Source) -> None:
    """Without reconstruction the smaller model must give what the large one gives with the readers' columns at zero."""
    pruned, report = _run(digits, remove=0.25, importance="magnitude", reconstruct=False)
    layers, _ = matrix_layers(digits.module)
    groups, _ = discover(digits, layers, list(digits.samples()))
    module = shell(digits.module)
    settings = Structured(step="structured", remove=0.25, importance="magnitude")
    for group, scores in zip(groups, unit_scores(digits, groups, settings, []), strict=True):
        assert scores is not None
        for unit in scores.argsort(stable=True)[: len(group) // 4].tolist():
            for name, columns in group.inputs[unit].items():
                layer = module.get_submodule(name)
                weight = matrix(layer).clone()
                weight[:, columns] = 0
                layer.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[assignment]
    zeroed = with_module(digits, module)
    for sample in digits.samples():
        torch.testing.assert_close(
            pruned.flat(sample["image"])[0], zeroed.flat(sample["image"])[0], rtol=1e-4, atol=1e-4
        )
    assert len(report["layers"]) == 8 and pruned.edits


def test_a_model_that_counts_its_heads_otherwise_is_left_alone(digits: Source) -> None:
    """Where removal would change more than the removed heads, nothing may be removed, and the report must say why."""
    fixed = shell(digits.module)
    for block in fixed.blocks:
        block.attention.forward = partial(_scaled_by_width, block.attention)
    pruned, report = _run(with_module(digits, fixed), remove=0.5, samples=3)
    assert [e["units"] for e in report["layers"]] == ["neurons"] * 4
    assert pruned.module.blocks[0].attention.q.out_features == 64
    assert sum("not what it is when they are ignored" in e["reason"] for e in report["skipped"]) == 12


def _scaled_by_width(attention: nn.Module, x: Tensor) -> Tensor:
    return type(attention).forward(attention, x) * (attention.q.out_features / 64)


def test_heads_of_a_hugging_face_encoder_go(tmp_path: Path) -> None:
    """Heads and neurons of a BERT folder must go, its own counts of heads with them, and the result open again."""
    config = transformers.BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
                                     intermediate_size=40, architectures=["BertModel"])  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    source = open_source(resolve(str(tmp_path / "bert")))
    pruned, report = _run(source, remove=0.5, samples=3)
    assert [(e["units"], e["after"]) for e in report["layers"]] == [("heads", 3), ("neurons", 20)] * 2
    attention = next(m for m in pruned.module.modules() if hasattr(m, "num_attention_heads"))
    assert attention.num_attention_heads == 3 and attention.query.out_features == 12
    save_compressed(pruned, source, {"steps": []}, tmp_path / "out", overwrite=False)
    again = open_source(resolve(str(tmp_path / "out")))
    feeds = next(iter(source.samples()))
    inputs = [feeds[name] for name in source.signature.input_names]
    torch.testing.assert_close(again.flat(*inputs)[0], pruned.flat(*inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_decoder_keeps_the_heads_that_its_cache_counts(tiny: Source) -> None:
    """Gated neurons of a language model must go; heads whose number stands in its inputs must stay, and be told."""
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
                                      num_attention_heads=6, num_key_value_heads=3, head_dim=8)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = CausalLM(transformers.LlamaForCausalLM(config).eval()).eval().requires_grad_(False)
    samples = causal_samples(module, lambda text: [ord(letter) % 50 for letter in text])
    signature = infer_signature(module, samples, causal_inputs(config))
    source = with_module(dataclasses.replace(tiny, signature=signature, samples=lambda: iter(samples)), module)
    pruned, report = _run(source, remove=0.5)
    assert [(e["units"], e["makers"][0][-9:], e["after"]) for e in report["layers"]] == [
        ("neurons", "gate_proj", 20)
    ] * 2
    reasons = {e["layer"][-18:]: e["reason"] for e in report["skipped"]}
    assert "not what it is" in reasons["1.self_attn.q_proj"]
    sample = samples[1]
    outputs = pruned.flat(*(sample[name] for name in signature.input_names))
    assert [tuple(o.shape) for o in outputs[:2]] == [(1, 128, 50), (1, 3, 128, 8)]


@pytest.mark.parametrize("importance", ["activation", "magnitude", "taylor", "reconstruction"])
def test_every_importance_works_globally(digits: Source, importance: str) -> None:
    """With scope "global" the share of removable weights must be met, and not every group lose the same."""
    pruned, report = _run(digits, remove=0.3, scope="global", importance=importance, samples=4)
    weights = [[p for n, p in s.module.named_parameters() if "blocks" in n and p.ndim > 1] for s in (digits, pruned)]
    counts = [sum(p.numel() for p in found) for found in weights]
    assert counts[1] / counts[0] == pytest.approx(0.7, abs=0.01)
    assert len({(e["units"], e["after"]) for e in report["layers"]}) > 2


def test_taylor_draws_the_same_batches(digits: Source) -> None:
    """Training data that a model file shuffles must give the same scores whatever was drawn before."""

    def shuffled() -> Iterator[dict[str, Tensor]]:
        for batch in islice(digits.train_batches(), 2):
            picked = torch.randperm(len(batch["target"]))[:8]
            yield {name: value[picked] for name, value in batch.items()}

    source, states = dataclasses.replace(digits, train_batches=shuffled), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(_run(source, remove=0.5, importance="taylor", samples=2)[1]["layers"])
        states.append(list(_run(source, remove=0.5, importance="taylor", samples=2)[0].module.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(states[1], states[3], strict=True))


def test_convolution_channels_go_with_their_normalization() -> None:
    """Channels, the statistics of their normalization and the readers' kernels must go together."""
    source = open_source(resolve("mnistcnn"))
    pruned, report = _run(source, remove=0.25, samples=4)
    assert {e["units"] for e in report["layers"]} == {"channels"}
    stage = pruned.module.stages[1]
    assert (stage[0].in_channels, stage[0].out_channels, stage[1].num_features) == (12, 24, 24)
    assert stage[0].weight.shape == (24, 12, 3, 3) and stage[1].running_var.shape == (24,)
    assert _accuracy(pruned) > _accuracy(source) - 0.1


@pytest.mark.parametrize("reconstruct", [True, False])
def test_channels_of_a_residual_network_go(tmp_path: Path, reconstruct: bool) -> None:
    """Layers that read one group of channels and make another must lose both, and the folder must open alike."""
    (tmp_path / "net.py").write_text(RESIDUAL)
    source = open_source(resolve(str(tmp_path / "net.py")))
    pruned, report = _run(source, remove=0.5, reconstruct=reconstruct)
    assert [block.inner.weight.shape for block in pruned.module.blocks] == [(6, 4, 3, 3)] * 2
    assert [block.outer.weight.shape for block in pruned.module.blocks] == [(4, 6, 3, 3)] * 2
    save_compressed(pruned, source, report, tmp_path / "out", overwrite=False)
    back, x = open_source(resolve(str(tmp_path / "out"))), next(iter(source.samples()))["x"]
    assert torch.equal(back.flat(x)[0], pruned.flat(x)[0])


def test_a_fresh_process_gives_the_same_model(digits: Source, tmp_path: Path) -> None:
    """The written folder must open with its smaller shapes and the same bits, and run alike in another process."""
    pruned, report = _run(digits, remove=0.5)
    save_compressed(pruned, digits, {"steps": [report]}, tmp_path / "out", overwrite=False)
    state = open_source(resolve(str(tmp_path / "out"))).module.state_dict()
    assert all(torch.equal(state[n], t) for n, t in pruned.module.state_dict().items())
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "out"), str(tmp_path / "y.npz")], check=True)
    with np.load(tmp_path / "y.npz") as fresh:
        for sample, given in zip(digits.samples(), fresh.values(), strict=True):
            np.testing.assert_allclose(pruned.flat(sample["image"])[0].numpy(), given, rtol=1e-4, atol=1e-4)


def test_two_runs_are_bit_identical_and_the_source_stays(digits: Source) -> None:
    """The same step must remove the same units twice, and leave the source's own layers alone."""
    before = {n: t.clone() for n, t in digits.module.state_dict().items()}
    one, two = (_run(digits, remove=0.5, samples=3)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(t, before[n]) for n, t in digits.module.state_dict().items())


def test_masks_of_earlier_steps_shrink_too(digits: Source) -> None:
    """A layer pruned by magnitude before must keep its mask in the new shape."""
    context = Context(digits, Calibration(), 0, lambda line: None)
    sparse, _ = magnitude.apply(digits, Magnitude(step="magnitude", sparsity=0.3, include=("blocks.*",)), context)
    pruned, _ = _run(sparse, remove=0.5, samples=3, units=("neurons",))
    assert all(pruned.module.get_parameter(n).shape == mask.shape for n, mask in pruned.masks.items())


def test_kinds_and_names_choose(digits: Source) -> None:
    """Only the asked units of the chosen layers may go; what is left alone must be told with its reason."""
    pruned, report = _run(digits, remove=0.5, units=("neurons",), include=("blocks.1.*",), samples=3)
    assert [e["layer"] for e in report["layers"]] == ["blocks.1.up"]
    reasons = {e["layer"]: e["reason"] for e in report["skipped"]}
    assert reasons["blocks.1.attention.q"] == "heads are not among the units to remove"
    assert reasons["blocks.0.up"] == "not chosen by include and exclude"
    assert pruned.module.blocks[0].up.out_features == 256


def test_wrong_asks_are_refused(digits: Source, tiny: Source, write_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """No match, no units of a kind, no loss for its gradient, and NaN in the samples must each be an error."""
    with pytest.raises(UsageProblem, match="no match for"):
        _run(digits, remove=0.5, include=("blokcs",))
    with pytest.raises(UsageProblem, match="of a kind that the chosen layers have"):
        _run(digits, remove=0.5, units=("channels",))
    no_hooks = open_source(write_tiny(tmp_path, hooks=False))
    with pytest.raises(InputRefused, match="train_batches"):
        _run(no_hooks, remove=0.5, importance="taylor")
    broken = [{"image": torch.full((1, 1, 8, 8), float("nan"))}]
    with pytest.raises(InputRefused, match="finite"):
        _run(dataclasses.replace(digits, samples=lambda: iter(broken)), remove=0.5)
    with pytest.raises(UsageProblem, match="units that can be removed"):
        _run(with_module(digits, _OneLayer()), remove=0.5)


class _OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(image)}


def test_refit_is_the_regression() -> None:
    """best_weight must be what least squares on the kept columns gives, and removal_order's losses its residuals."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(300, 12, generator=generator, dtype=torch.float64)
        @ torch.randn(12, 12, generator=generator).double()
    )
    weight = torch.randn(5, 12, generator=generator).double()
    moments, kept = x.T @ x, torch.tensor([0, 2, 3, 7, 9, 11])
    best = best_weight(weight, moments, weight @ moments, kept, 1e-12)
    torch.testing.assert_close(best.T, torch.linalg.lstsq(x[:, kept], x @ weight.T).solution, rtol=1e-6, atol=1e-6)
    reading = Reading(weight, moments, weight @ moments, [torch.tensor([i]) for i in range(12)])
    order, losses = removal_order([reading], 1e-9, 4)
    left = torch.tensor([i for i in range(12) if i not in order])
    residual = x @ weight.T - x[:, left] @ torch.linalg.lstsq(x[:, left], x @ weight.T).solution
    share = float(residual.square().sum() / (x @ weight.T).square().sum())
    assert sum(losses) == pytest.approx(share, rel=1e-3)


def test_damping_is_chosen_by_rows_that_the_fit_has_not_seen() -> None:
    """With few noisy rows more damping must be chosen than with many, and the fit be better on new rows for it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 40, generator=generator).double()
    mix = torch.randn(40, 40, generator=generator).double()
    chosen = {}
    for count in (60, 4000):
        x = torch.randn(count, 40, generator=generator).double() @ mix
        seen, held = x[: count * 3 // 4], x[count * 3 // 4 :]
        reading = Reading(weight, x.T @ x, weight @ x.T @ x, [], (held.T @ held, weight @ held.T @ held))
        kept = torch.arange(20)
        chosen[count] = best_damping(reading, kept)
        square, tried = seen.T @ seen, (chosen[count], 0.001, 10.0)
        fits = {d: best_weight(weight, square, weight @ square, kept, d) for d in tried}
        losses = {d: float((held @ weight.T - held[:, kept] @ f.T).square().sum()) for d, f in fits.items()}
        assert losses[chosen[count]] == min(losses.values())
    assert chosen[60] > chosen[4000]


def test_budgets_are_met() -> None:
    """Shares must leave a unit everywhere; a global budget must take the cheapest weights first."""
    assert same_share([8, 3, 1], 0.5) == [4, 2, 0] and same_share([2], 0.99) == [1]
    assert least_loss([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]], [10, 10], [4, 4], 0.25) == [2, 0]
    assert least_loss([[1.0, 1.1], [1.0, 5.0]], [10, 1], [3, 3], 0.4) == [1, 2]
