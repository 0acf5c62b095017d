"""What several processes share while they train: torchrun or accelerate starts them, accelerate's state joins them.

    data             every process has the whole model and its own part of the batches (DistributedDataParallel)
    sharded          the same, and parameters, gradients and optimizer are cut into one part per process (FSDP2)
    tensor           all see the same batches; the rows of every linear layer are spread over the processes
    sharded+tensor   groups of two processes share layers, the groups shard and split the batches

A single process trains plainly whatever is asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from deploytool.errors import EnvironmentLacking, UsageProblem
from deploytool.train.recompute import blocks
from deploytool.train.schedule import Parallel

try:
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object
except ImportError as error:
    raise EnvironmentLacking("DT401", f"training must be able to import accelerate (got: {error})",
                             fix="pip install 'deploytool[train]'") from error  # fmt: skip

_GROUP = 2  # processes that share layers where sharding and tensor parallelism go together
_DATA, _TENSOR = "data", "tensor"


@dataclass(frozen=True)
class Team:
    """The processes of a training run.

    rank, size              this process, and how many there are
    part, parts             which part of each step's batches this process computes, of how many
    mesh                    the processes as a grid with axes "data" and "tensor"; None for plain and data parallel
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    part: int = 0
    parts: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0


def device() -> torch.device:
    """Where this process trains."""
    place: torch.device = _state().device
    return place


def first_process() -> bool:
    """Whether this process is the one that writes files; True where there is only one."""
    return _alone() or _state().process_index == 0


def wait_for_all() -> None:
    """Go on when all processes are here."""
    _state().wait_for_everyone()


def from_first(value: Any) -> Any:
    """What the first process has in the place of this one's value; every process must ask."""
    return value if _alone() else broadcast_object_list([value])[0]


def refuse_unshared(folder: Path) -> None:
    """Raise EnvironmentLacking in all processes where one does not see what the first writes into `folder`.

    Every process must ask. On machines without a common disk some would go on from a checkpoint and others begin.
    """
    if _alone():
        return
    held: tuple[Path | None, str] = (None, "")
    if first_process():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(dir=folder, prefix=".deploytool-seen-")
            os.close(handle)
            held = Path(path), ""
        except OSError as error:  # told to all: the others wait for it
            held = None, error.strerror or type(error).__name__
    written, problem = from_first((None if held[0] is None else held[0].name, held[1]))
    seen = gather_object([written is not None and (folder / written).exists()])
    if held[0] is not None:
        held[0].unlink(missing_ok=True)
    if problem:
        raise EnvironmentLacking("DT403", f"{folder} must be writable (got: {problem})")
    if not all(seen):
        raise EnvironmentLacking("DT403", f"checkpoints must lie where all processes see them (got {folder}, of which "
                                 f"{seen.count(False)} of {len(seen)} do not see what the first one writes)",
                                 fix="let [training] checkpoints name a folder on a disk that the machines share, or "
                                     "leave it out")  # fmt: skip


def _alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@cache
def _state() -> PartialState:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    return PartialState(cpu=not torch.cuda.is_available())


def join(parallel: Parallel) -> Team:
    """The team that torchrun or accelerate started; one process where nothing did."""
    state = _state()
    rank, size = state.process_index, state.num_processes
    if size == 1:
        return Team(state.device)
    if parallel == "data":
        return Team(state.device, rank, size, rank, size)
    together = {"sharded": 1, "tensor": size, "sharded+tensor": _GROUP}[parallel]
    if size % together:
        raise UsageProblem("DT204", f"{parallel} needs a multiple of {together} processes (got {size})")
    mesh = init_device_mesh(state.device.type, (size // together, together), mesh_dim_names=(_DATA, _TENSOR))
    return Team(state.device, rank, size, rank // together, size // together, mesh)


@contextmanager
def spread(module: nn.Module, team: Team) -> Iterator[None]:
    """Within the block the module's parameters are spread over the team's mesh; after it they are whole again."""
    if team.mesh is None:
        yield
        return
    before = {name: (m, m.__class__, dict(m.__dict__), dict(m._parameters)) for name, m in module.named_modules()}
    hooks = {name: {key: value.copy() for key, value in kept.items() if "_hooks" in key and hasattr(value, "copy")}
             for name, (_, _, kept, _) in before.items()}  # fmt: skip
    _spread(module, team.mesh)
    try:
        yield
    finally:
        values = {name: whole(p) for name, p in module.named_parameters(remove_duplicate=False)}
        for name, (child, kind, kept, parameters) in before.items():
            child.__class__ = kind
            child.__dict__.clear()
            child.__dict__.update({**kept, **hooks[name]})
            child._parameters.update(parameters)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(values[name])


def _spread(module: nn.Module, mesh: DeviceMesh) -> None:
    size = mesh[_TENSOR].size()
    if size > 1:
        plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in _rows(module, size)}
        if not plan:
            raise UsageProblem("DT204", f"tensor parallelism needs linear layers whose outputs {size} divides "
                               "(got none)")  # fmt: skip
        parallelize_module(module, mesh[_TENSOR], plan)  # type: ignore[arg-type]
    if mesh[_DATA].size() > 1:
        if scalars := [name for name, parameter in module.named_parameters() if parameter.ndim == 0]:
            raise UsageProblem("DT204", "sharded training needs parameters with at least one axis (got scalars: "
                               f"{', '.join(scalars[:5])})", fix='use parallel = "data"')  # fmt: skip
        for block in blocks(module):
            fully_shard(block, mesh=mesh[_DATA])
        fully_shard(module, mesh=mesh[_DATA])


def _rows(module: nn.Module, size: int) -> list[str]:
    """Linear layers that can be spread: outputs divide evenly, and no other layer uses the same weight."""
    users: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    linears = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    return [n for n, layer in linears.items() if layer.out_features % size == 0 and users[id(layer.weight)] == 1]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; every process of the team must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` spread over the processes as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return value.to(parameter.device)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients together; parts on other processes included."""
    grads = [p.grad for p in parameters if p.grad is not None]
    plain = [g for g in grads if not isinstance(g, DTensor)]
    total = nn.utils.get_total_norm(plain)
    parts = [g for g in grads if isinstance(g, DTensor)]
    if not parts:
        return total
    shared = torch.stack([g.to_local().square().sum() / _copies(g) for g in parts]).sum()
    all_reduce(shared)
    return (total.square() + shared).sqrt()


def _copies(tensor: DTensor) -> int:
    """How many processes hold the same part of a tensor."""
    mesh = tensor.device_mesh
    copies = torch.distributed.get_world_size() // mesh.size()
    for axis, placement in enumerate(tensor.placements):
        copies *= mesh.size(axis) if placement.is_replicate() else 1
    return copies


def summed(value: float, team: Team) -> float:
    """The sum over the parts of the batches."""
    if team.parts == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=team.device)
    all_reduce(total)
    return total.item() * team.parts / team.size


def moved(batch: Mapping[str, Any], team: Team) -> Mapping[str, Any]:
    """The batch on the team's device."""
    if team.device.type == "cpu":
        return batch
    return {name: value.to(team.device, non_blocking=True) for name, value in batch.items()}
