"""The training loop behind every step that trains: AdamW, a schedule, clipped gradients, kept zeros, checkpoints.

AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deploytool.errors import BackendFailed, CheckFailed, InputRefused
from deploytool.train import checkpoint
from deploytool.train.checkpoint import Digest, Saving
from deploytool.train.parallel import Team, gradient_norm, join, like, moved, spread, summed, wait_for_all, whole
from deploytool.train.progress import Progress
from deploytool.train.randomness import isolated, reseed
from deploytool.train.recompute import recomputed
from deploytool.train.schedule import Schedule, learning_rate
from deploytool.train.stream import Batch, Batches, Step, items, steps, steps_per_epoch

Loss = Callable[[Batch], Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 1e-4  # of fp16 losses: below it the gradients are infinite at any scale


@dataclass
class Trained:
    """What training did.

    losses          of every optimizer step, those before resuming included
    epoch_losses    mean loss of every finished epoch, or what `watch` said
    best_epoch      of the weights that were kept, where training could end early; counted from 0
    resumed_from    the step that a checkpoint brought; 0 where none did
    skipped_steps   where fp16 gradients overflowed and the scale was lowered instead
    seconds, items  of this run
    """

    losses: list[float] = field(default_factory=list)
    epoch_losses: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False
    resumed_from: int = 0
    skipped_steps: int = 0
    processes: int = 1
    seconds: float = 0.0
    items: float = 0.0

    def report(self) -> dict[str, Any]:
        """For the step's report; the losses as at most 200 pairs of step and mean loss since the pair before."""
        size = max(1, math.ceil(len(self.losses) / 200))
        parts = [self.losses[at : at + size] for at in range(0, len(self.losses), size)]
        curve = [[min((i + 1) * size, len(self.losses)), sum(p) / len(p)] for i, p in enumerate(parts)]
        return {
            "optimizer_steps": len(self.losses), "loss_first": self.losses[0], "loss_last": self.losses[-1],
            "loss_curve": curve, "best_epoch": self.best_epoch, "stopped_early": self.stopped_early,
            "resumed_from": self.resumed_from, "skipped_steps": self.skipped_steps, "processes": self.processes,
            "train_seconds": self.seconds, "items_per_second": self.items / max(self.seconds, 1e-9),
        }  # fmt: skip


def fit(
    module: nn.Module,
    batches: Batches,
    loss: Loss,
    schedule: Schedule,
    *,
    masks: Mapping[str, Tensor] | None = None,
    count: Callable[[Batch], float] = items,
    watch: Callable[[], float] | None = None,
    before_step: Callable[[int, int], None] = lambda step, total: None,
    saving: Saving | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train the floating-point parameters of `module` in place.

    `batches(epoch)` gives one pass; `loss(batch)` runs the module and gives a mean over `count(batch)` things. Weights
    where `masks` is False are zero after every step. `watch()`, lower is better, judges an epoch where the schedule has
    patience; left out, it is the epoch's mean loss. `before_step(step, total)` may change what depends on how far
    training is. The same seed gives the same bits, also when the process was killed
    and goes on from a checkpoint of `saving`. Raises CheckFailed when the loss or a gradient is NaN or infinite, and
    InputRefused when there are no batches or the checkpoint is another training's.
    """
    was_training = module.training
    team = join(schedule.parallel)
    try:
        with isolated(), ExitStack() as stack:
            data = Digest() if saving else None
            total, each = _length(batches, schedule, team, data)
            wanted = _identity(module, schedule, total, team, saving.about, data) if saving and data else {}
            module.requires_grad_(False).to(team.device)
            for parameter in module.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            module.train()
            if schedule.gradient_checkpointing:
                stack.enter_context(recomputed(module))
            stack.enter_context(spread(module, team))
            run = _Run(
                module,
                loss,
                schedule,
                team,
                total,
                each,
                masks or {},
                count,
                watch,
                saving,
                wanted,
                progress,
                before_step,
            )
            return run.all(batches)
    except RuntimeError as error:
        raise BackendFailed("DT504", f"a training step must run (got: {str(error)[:500]})") from error
    finally:
        module.train(was_training).requires_grad_(False).to("cpu")


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero every weight whose mask is False."""
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask).add_(0.0)  # minus zero becomes zero, which a folder stores as one bit


class _Objective(nn.Module):
    """The loss as a module's output, which data parallelism needs to know when gradients will come."""

    def __init__(self, module: nn.Module, loss: Loss):
        super().__init__()
        self.module = module
        self._loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(batch)


class _Run:
    """One training: what changes from step to step."""

    def __init__(
        self, module: nn.Module, loss: Loss, schedule: Schedule, team: Team, total: int, each: int,
        masks: Mapping[str, Tensor], count: Callable[[Batch], float], watch: Callable[[], float] | None,
        saving: Saving | None, wanted: Mapping[str, Any], progress: Callable[[str], None],
        before_step: Callable[[int, int], None],
    ):  # fmt: skip
        self.module, self.schedule, self.team, self.total, self.each = module, schedule, team, total, each
        self.count, self.watch, self.saving, self.wanted, self.progress = count, watch, saving, wanted, progress
        self.before_step = before_step
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.masks = {name: like(module.get_parameter(name), mask) for name, mask in masks.items()}
        self.objective: nn.Module = _Objective(module, loss)
        if team.size > 1 and team.mesh is None:
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.optimizer = torch.optim.AdamW(_alike(self.parameters), lr=1.0, weight_decay=schedule.weight_decay)
        self.scaler = torch.amp.GradScaler(team.device.type, enabled=schedule.precision == "fp16")
        self.done = Trained(processes=team.size)
        self.best: dict[str, Tensor] = {}
        self.saved = "none was made"

    def all(self, batches: Batches) -> Trained:
        """Every step, from the newest checkpoint on if there is one."""
        started = time.perf_counter()
        finished = self._resume()
        step = len(self.done.losses)
        tell = Progress(self.progress if self.team.first else lambda line: None, self.total, step)
        group = self.schedule.accumulate * self.team.parts
        stream = steps(batches, group, self.schedule.seed, step // self.each, step % self.each)
        while not finished:
            rate = learning_rate(self.schedule, step, self.total)
            together = next(stream)
            held = self._step(together, step, rate)
            step += 1
            self.done.items += held
            tell.step(step, self.done.losses[-1], rate, held)
            stop = together.last and self._judge_epoch(step)
            finished = stop or step == self.total
            if finished:
                self._take_best()
            if self.saving and (finished or step % self.saving.every == 0):
                self._save(finished)
        self.done.seconds = time.perf_counter() - started
        return self.done

    def _step(self, step: Step, number: int, rate: float) -> float:
        """One optimizer step; how many items it held."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.before_step(number, self.total)
        counts = [self.count(batch) for batch in step.batches]
        everything = sum(counts)
        if everything <= 0:
            raise InputRefused("DT303", f"the batches of a step must hold something to learn from (got {counts} labels "
                               f"that count at step {number + 1})")  # fmt: skip
        mine = range(self.team.part, len(step.batches), self.team.parts)
        value = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for index in mine or (0,):  # a process without a batch in a short last step takes part with weight 0
            share = counts[index] / everything if mine else 0.0
            reseed(self.schedule.seed, number, index)
            with self._synchronized(index + self.team.parts >= len(step.batches)):
                loss = self._loss(step.batches[index])
                value += loss.item() * share if mine else 0.0
                scaled = loss if share * self.team.parts == 1.0 else loss * (share * self.team.parts)
                self.scaler.scale(scaled).backward()
        self._apply(summed(value, self.team), number)
        return everything

    def _loss(self, batch: Batch) -> Tensor:
        dtype = _DTYPES.get(self.schedule.precision)
        with torch.autocast(self.team.device.type, dtype) if dtype else nullcontext():
            value = self.objective(moved(batch, self.team))
        if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
            raise InputRefused("DT303", "loss() must give one number that follows from the outputs (got "
                               f"{_described(value)})")  # fmt: skip
        return value

    @contextmanager
    def _synchronized(self, last: bool) -> Iterator[None]:
        """Processes add up their gradients once per step, with the last of its batches."""
        wrapped = isinstance(self.objective, DistributedDataParallel)
        with self.objective.no_sync() if wrapped and not last else nullcontext():  # type: ignore[operator]
            yield

    def _apply(self, loss: float, number: int) -> None:
        """Clip, check and take the step."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.parameters)
        if math.isfinite(loss) and not math.isfinite(norm.item()) and self.scaler.get_scale() > _SMALLEST_SCALE and \
                self.scaler.is_enabled():  # fmt: skip
            self.done.skipped_steps += 1
        elif not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise CheckFailed("DT105", f"loss and gradients must be finite (got loss {loss:g}, gradient norm "
                              f"{norm.item():g} at step {number + 1} of {self.total})",
                              detail=[f"last good checkpoint: {self.saved}"],
                              fix="lower learning_rate, or check the training data")  # fmt: skip
        scale = (self.schedule.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        apply_masks(self.module, self.masks)
        self.done.losses.append(loss)

    def _judge_epoch(self, step: int) -> bool:
        """Whether there was no better epoch for too long."""
        if self.schedule.patience is None:
            return False
        mine = self.done.losses[-((step - 1) % self.each + 1) :]
        self.done.epoch_losses.append(self._watched() if self.watch else sum(mine) / len(mine))
        values = self.done.epoch_losses
        if not math.isfinite(values[-1]):
            raise CheckFailed("DT105", f"what judges an epoch must be finite (got {values[-1]:g} after step {step})",
                              detail=[f"last good checkpoint: {self.saved}"])  # fmt: skip
        if self.done.best_epoch is None or values[-1] < values[self.done.best_epoch]:
            self.done.best_epoch = len(values) - 1
            self.best = {name: whole(t).cpu().clone() for name, t in _tensors(self.module).items()}
        self.done.stopped_early = len(values) - 1 - self.done.best_epoch >= self.schedule.patience
        return self.done.stopped_early

    def _watched(self) -> float:
        assert self.watch is not None
        self.module.eval()
        try:
            with torch.no_grad():
                return self.watch()
        finally:
            self.module.train()

    def _take_best(self) -> None:
        with torch.no_grad():
            for name, tensor in _tensors(self.module).items():
                if name in self.best:
                    tensor.copy_(like(tensor, self.best[name]))
        self.best = {}

    def _save(self, finished: bool) -> None:
        assert self.saving is not None
        tensors = {f"model.{name}": whole(t) for name, t in _tensors(self.module).items()}
        tensors |= {f"best.{name}": t for name, t in self.best.items()}
        for parameter, moments in self.optimizer.state.items():
            tensors |= {f"{kind}.{self.names[id(parameter)]}": whole(moments[kind]) for kind in _MOMENTS}
        done = self.done
        state = {"training": dict(self.wanted), "finished": finished, "losses": done.losses,
                 "epoch_losses": done.epoch_losses, "best_epoch": done.best_epoch, "stopped_early": done.stopped_early,
                 "skipped_steps": done.skipped_steps, "scaler": self.scaler.state_dict()}  # fmt: skip
        if self.team.first:
            path = checkpoint.save(self.saving.folder, len(done.losses), tensors, state)
            self.saved = f"step {len(done.losses)}, {path}"
        if self.team.size > 1:
            wait_for_all()

    def _resume(self) -> bool:
        """Take over the newest checkpoint; whether it was the last one of its training."""
        found = checkpoint.latest(self.saving.folder) if self.saving else None
        if found is None:
            return False
        checkpoint.refuse_foreign(found, self.wanted)
        with torch.no_grad():
            for name, tensor in _tensors(self.module).items():
                tensor.copy_(like(tensor, found.tensors[f"model.{name}"]))
        for parameter in self.parameters:
            name = self.names[id(parameter)]
            if f"step.{name}" in found.tensors:
                kinds = {kind: found.tensors[f"{kind}.{name}"] for kind in _MOMENTS}
                self.optimizer.state[parameter] = {
                    kind: t if kind == "step" else like(parameter, t) for kind, t in kinds.items()
                }
        self.best = {n.removeprefix("best."): t for n, t in found.tensors.items() if n.startswith("best.")}
        state = found.state
        self.scaler.load_state_dict(state["scaler"])
        self.done.losses, self.done.epoch_losses = state["losses"], state["epoch_losses"]
        self.done.best_epoch, self.done.stopped_early = state["best_epoch"], state["stopped_early"]
        self.done.skipped_steps, self.done.resumed_from = state["skipped_steps"], len(state["losses"])
        self.saved = f"step {len(state['losses'])}, {found.path}"
        if self.team.first:
            self.progress(f"was finished before: the weights are those of {found.path}" if state["finished"] else
                          f"goes on from step {len(state['losses'])} of {self.total}, {found.path}")  # fmt: skip
        return bool(state["finished"])


def _length(batches: Batches, schedule: Schedule, team: Team, data: Digest | None) -> tuple[int, int]:
    """Optimizer steps in all, and of one epoch, whose batches go into `data`."""
    each = steps_per_epoch(batches, schedule.accumulate * team.parts, schedule.seed, data.add if data else None)
    return min(schedule.epochs * each, schedule.steps or schedule.epochs * each), each


def _identity(
    module: nn.Module, schedule: Schedule, total: int, team: Team, about: str, data: Digest
) -> dict[str, Any]:
    """What a checkpoint must have in common with the training that goes on from it."""
    return {"model": checkpoint.sha256(_tensors(module)), "schedule": asdict(schedule), "steps": total,
            "parts": team.parts, "settings": about, "training data": data.hex()}  # fmt: skip


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _alike(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of parameters that one kernel can update together: plain ones, and those on each kind of mesh."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": group} for group in groups.values()]


def _described(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.requires_grad else type(value).__name__
