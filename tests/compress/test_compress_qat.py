"""Quantization-aware training and fine-tuning: gradients, ranges, grids that travel, Q/DQ in the graph."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploytool.compress.finetune.finetune import apply as finetune
from deploytool.compress.finetune.tables import Finetune
from deploytool.compress.prune.magnitude import apply as prune
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.qat.activations import AveragedInput, LearnedInput
from deploytool.compress.qat.qat import apply
from deploytool.compress.qat.tables import Qat
from deploytool.compress.qat.weights import WeightGrid, fake_quantize
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.rtn import apply as rtn
from deploytool.compress.quantize.tables import Rtn
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.compressed import open_compressed, save_compressed
from deploytool.load.grid import lies_on, snap
from deploytool.load.surgery import with_module
from deploytool.source import ModelRef, Source


def _qat(**settings: Any) -> Qat:
    return Qat(step="qat", **{"epochs": 5, "learning_rate": 0.005, **settings})


def test_forward_is_the_grid_and_backward_passes_straight() -> None:
    """Values must be those of the grid; the gradient of a weight 1 inside and 0 outside, that of the scale LSQ's."""
    w = torch.tensor([-0.9, -0.32, 0.14, 0.31, 5.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    out = fake_quantize(w, scale, torch.tensor(8.0), 4)
    assert torch.equal(out.detach(), (torch.tensor([0.0, 5.0, 9.0, 11.0, 15.0]) - 8) * scale.detach())
    out.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [0, 1, 1, 1, 0]
    inside = torch.tensor([-3.0 + 3.2, 1.0 - 1.4, 3.0 - 3.1])
    assert scale.grad is not None and scale.grad.item() == pytest.approx(-8 + inside.sum().item() + 7, abs=1e-4)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 8, False), (4, 16, False), (8, 16, True)])
def test_a_weight_grid_equals_its_encoding(bits: int, group: int, symmetric: bool) -> None:
    """What training sees must be, to the bit, what the encoding gives; learned scales included."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits))
    grid = WeightGrid(choose(weight, bits, group, symmetric), "learned")
    assert grid.theta is not None
    with torch.no_grad():
        grid.theta.normal_(0, 0.1)
        assert torch.equal(grid(weight), snap(weight, grid.encoding()))


@pytest.mark.parametrize("kind", [LearnedInput, AveragedInput])
def test_input_ranges(kind: type[LearnedInput | AveragedInput]) -> None:
    """A range must start at what was seen, move with training or with the values, and keep 0 on the grid."""
    grid = kind(8, torch.tensor(-1.0), torch.tensor(3.0)).train()
    x = torch.linspace(-1, 3, 101, requires_grad=True)
    out = grid(x)
    assert (out - x).abs().max() < 3 / 100 and grid(torch.zeros(3)).abs().max() == 0
    (out.square().sum()).backward()
    if isinstance(grid, LearnedInput):
        assert grid.theta.grad is not None and grid.shift.grad is not None
    else:
        before = grid.high.item()
        grid(torch.tensor([10.0]))
        assert before < grid.high.item() < 10
        grid.eval()(torch.tensor([100.0]))
        assert grid.high.item() < 10


@pytest.mark.parametrize("kind", [LearnedInput, AveragedInput])
def test_symmetric_input_ranges(kind: type[LearnedInput | AveragedInput]) -> None:
    """Without zero points 0 must stay the middle code whatever is learned, and both extremes be on the grid."""
    grid = kind(8, torch.tensor(-1.0), torch.tensor(3.0), True).train()
    x = torch.linspace(-1, 3, 101, requires_grad=True)
    grid(x).square().sum().backward()
    with torch.no_grad():
        for parameter in grid.parameters():
            assert parameter.grad is not None
            parameter -= 0.01 * torch.sign(parameter.grad)
    assert grid.grid()[1].item() == 128
    assert (grid(x) - x).abs().max() < 2 * 3 / 127


@pytest.mark.parametrize(
    "settings",
    [{}, {"symmetric_activations": True}, {"ranges": "average"},
     {"bits": 2, "group": 8, "symmetric": False, "activations": "none"}],
)  # fmt: skip
def test_trained_grids_travel(tiny: Source, context: Context, tmp_path: Path, settings: dict[str, Any]) -> None:
    """After training all chosen weights must lie on their grids, and the folder must give the same outputs again."""
    trained, report = apply(tiny, _qat(**settings), context)
    assert {entry["layer"] for entry in report["layers"]} == {"up", "down"} == {n[:-7] for n in trained.encodings}
    assert all(lies_on(trained.module.get_parameter(n), e) for n, e in trained.encodings.items())
    assert report["loss_last"] < report["loss_first"]
    out = tmp_path / "out"
    save_compressed(dataclasses.replace(trained, original=tiny.ref), tiny, {}, out, overwrite=False)
    again = open_compressed(ModelRef("compressed", "out", str(out)))
    ids = next(iter(tiny.samples()))["ids"]
    assert all(torch.equal(a, b) for a, b in zip(again.flat(ids), trained.flat(ids), strict=True))
    assert ("input_scale" in report["layers"][0]) == ("activations" not in settings)


def test_training_on_the_grid_beats_rounding(tiny: Source, context: Context) -> None:
    """With 2 bits the trained weights must give a loss below those that were only rounded, from one model."""
    start, _ = finetune(tiny, Finetune(step="finetune", epochs=40, learning_rate=0.01), context)
    rounded, _ = rtn(start, Rtn(step="rtn", bits=2, group="channel"), context)
    trained, _ = apply(start, _qat(bits=2, activations="none", towards="labels", symmetric=False, epochs=20), context)
    assert tiny.train_batches is not None and tiny.loss is not None
    batch = next(iter(tiny.train_batches()))
    losses = [float(tiny.loss(s.module(batch["ids"]), batch)) for s in (start, rounded, trained)]
    assert losses[2] < losses[0] + 0.5 * (losses[1] - losses[0])


def test_zeros_stay_zero_on_the_grid(tiny: Source, context: Context) -> None:
    """Pruned weights must be zero after training on grids."""
    pruned, _ = prune(tiny, Magnitude(step="magnitude", sparsity=0.5, include=("up", "down")), context)
    trained, _ = apply(pruned, _qat(bits=4), context)
    for name, mask in pruned.masks.items():
        assert not trained.module.get_parameter(name)[~mask].any()


def test_the_graph_has_the_learned_grids(tiny: Source, context: Context, tmp_path: Path) -> None:
    """An exported graph must hold one quantized input per layer, with the scale that was learned."""
    trained, report = apply(tiny, _qat(epochs=1), context)
    ids = next(iter(tiny.samples()))["ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tracing is old, and our lowering's first choice
        torch.onnx.export(trained.flat, (ids,), tmp_path / "m.onnx", dynamo=False, opset_version=18)
    graph = onnx.load(tmp_path / "m.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 2 == kinds.count("DequantizeLinear")
    written = [node for node in graph.node if node.op_type == "Constant"]
    constants = {node.output[0]: onnx.numpy_helper.to_array(node.attribute[0].t) for node in written}
    constants |= {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    scales = sorted(float(constants[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear")
    assert np.allclose(scales, sorted(entry["input_scale"] for entry in report["layers"]))


def test_finetuning_keeps_zeros_and_grids(tiny: Source, context: Context) -> None:
    """Fine-tuning must lower the model's own loss; zeros stay, and weights stay on the grids they have."""
    pruned, _ = prune(tiny, Magnitude(step="magnitude", sparsity=0.5, include=("up", "down")), context)
    rounded, _ = rtn(pruned, Rtn(step="rtn", bits=4, group=4), context)
    trained, report = finetune(rounded, Finetune(step="finetune", epochs=10, learning_rate=0.01), context)
    assert report["loss_last"] < report["loss_first"] and report["weights_on_grids"] == 2
    for name, encoding in trained.encodings.items():
        weight = trained.module.get_parameter(name)
        assert lies_on(weight, encoding) and not weight[~rounded.masks[name]].any()


def test_a_model_without_batches_or_loss(tiny: Source, context: Context) -> None:
    """Fine-tuning must be refused without batches or loss, naming what lacks; so must labels in qat."""
    bare = dataclasses.replace(with_module(tiny, tiny.module), train_batches=None)
    with pytest.raises(InputRefused, match=r"needs a model with train_batches\(\)"):
        finetune(bare, Finetune(step="finetune"), context)
    with pytest.raises(UsageProblem, match="'original'"):
        apply(bare, _qat(towards="labels"), context)
    _, report = apply(bare, _qat(epochs=1), context)
    assert (report["towards"], report["data"]) == ("original", "samples")


def test_two_runs_are_one(tiny: Source, context: Context) -> None:
    """Training on grids twice with one seed must give the same bits."""
    one, two = (apply(tiny, _qat(), context)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.module.state_dict().values(), two.module.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_a_grid_that_fits_is_where_training_starts(tiny: Source, context: Context) -> None:
    """Weights that lie on a grid of the kind asked for must be trained from it, not from another one."""
    name = "up.weight"
    weight = tiny.module.get_parameter(name)
    grid = choose(2.5 * weight, 4, 12, symmetric=False)
    module = copy.deepcopy(tiny.module)
    module.up.weight.data = snap(weight, grid)
    source = dataclasses.replace(with_module(tiny, module), encodings={name: grid})
    how = _qat(bits=4, group=12, symmetric=False, activations="none", include=("up",), steps=1, learning_rate=1e-9)
    trained, _ = apply(source, how, context)
    torch.testing.assert_close(trained.encodings[name].scale, grid.scale)


def test_layers_that_never_run_are_left_alone(tiny: Source, context: Context) -> None:
    """A layer that no sample reaches has no range: it must be told and stay; without any other the step is refused."""
    module = copy.deepcopy(tiny.module)
    module.spare = nn.Linear(3, 3)
    source = with_module(tiny, module)
    trained, report = apply(source, _qat(steps=1), context)
    assert "spare.weight" not in trained.encodings and len(trained.encodings) == 2
    assert {"layer": "spare", "reason": "it did not run on the calibration samples"} in report["skipped"]
    with pytest.raises(UsageProblem, match="must find a layer"):
        apply(source, _qat(steps=1, include=("spare",)), context)


def test_twice_is_refused(tiny: Source, context: Context) -> None:
    """Inputs that lie on grids cannot get others: the step must say so."""
    once, _ = apply(tiny, _qat(steps=1), context)
    with pytest.raises(UsageProblem, match="are on grids already"):
        apply(once, _qat(steps=1), context)
