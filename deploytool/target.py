"""A target: the checked content of one TOML profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deploytool import shipped
from deploytool.errors import UsageProblem, nearest
from deploytool.settings import Table, load_toml

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]


class Limits(Table):
    """What parity may cost. `cosine_min` holds for the worst sample of every output; the others where given.

    max_abs           largest absolute difference of any element
    sqnr_db_min       signal to quantization noise ratio, decibels, over all samples of an output
    agreement_min     share of equal decisions (argmax over the last axis), 0 to 1
    metric_drop_max   how much of the task metric may be lost, relative to the reference's, 0 to 1
    generation_min    share of greedily decoded tokens that must equal the reference's, 0 to 1
    """

    cosine_min: float = Field(ge=-1, le=1)
    max_abs: float | None = Field(default=None, gt=0)
    sqnr_db_min: float | None = None
    agreement_min: float | None = Field(default=None, ge=0, le=1)
    metric_drop_max: float = Field(default=0.01, ge=0, le=1)
    generation_min: float | None = Field(default=None, ge=0, le=1)

    def beside_grids(self) -> Limits:
        """These limits for an engine in floating point and a model whose layers' inputs lie on learned grids.

        A number halfway between two codes falls to either by the last bit of a sum: a whole step, which moves what
        comes after it. The outputs of most samples stay equal, those of some are a few thousandths apart.
        """
        most = {"cosine_min": 0.999, "sqnr_db_min": 45.0, "agreement_min": 0.99, "generation_min": 0.98}
        own = self.model_dump(include=set(most), exclude_none=True)
        return self.model_copy(update={name: min(most[name], limit) for name, limit in own.items()})


class Device(Table):
    """What the artifact is for.

    architecture           as the system names it; "any" for what runs on every processor
    compute_capabilities   as TensorRT names them: "SM86"
    """

    architecture: str = "x86_64"
    compute_capabilities: tuple[str, ...] = Field(default=(), strict=False)


class Runtime(Table):
    """Settings of the engine at run time, part of the artifact.

    threads    0: as many as physical cores
    spinning   whether idle threads of ONNX Runtime wait busily for the next run: quicker back to back, at the cost of
               whatever else runs on the machine
    """

    threads: int = Field(default=0, ge=0, le=1024)
    spinning: bool = True


class Target(Table):
    """One profile. `plain` names the fp32 target of the same backend that one of lower precision must beat."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)  # it becomes a folder's name
    description: str
    backend: str
    precision: Precision
    parity: Limits
    plain: str | None = None
    device: Device = Device()
    runtime: Runtime = Runtime()
    build: dict[str, Any] = Field(default_factory=dict)  # checked by the backend's own settings table

    def to_json(self) -> dict[str, Any]:
        """The profile as data, for the artifact."""
        return self.model_dump(mode="json")


def load_target(name: str) -> Target:
    """The profile of a shipped name, or of a TOML file when `name` holds a slash or a suffix."""
    path = shipped.find("targets", name, ".toml")
    if path is None:
        built = [known for known in target_names() if load_target(known).backend == name.lower()]
        raise UsageProblem("DT201", f"the target must be a shipped name or a profile's path "
                           f"(got {shipped.unfound(name)})",
                           detail=[f"targets of the backend {name.lower()!r}: {', '.join(built)}" if built
                                   else nearest(name, target_names())],
                           fix="`deploytool targets list` shows them")  # fmt: skip
    return load_profile(path)


def load_profile(path: Path) -> Target:
    """Read and check one profile."""
    return load_toml(path, Target)


def target_names() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return shipped.names("targets", ".toml")
