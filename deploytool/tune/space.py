"""What a search may vary: targets, build settings, runtime settings, and recipes that the user names."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploytool.backends.saturation import has_vnni
from deploytool.backends.used_settings import does_something
from deploytool.bench.environment import environment, usable_cores
from deploytool.target import Target

Change = tuple[str, Any]  # ("build.reduce_range", False)

# Settings worth trying beside those of the profile, per backend and precision. All are keys of the backend's own table.
CHOICES: Mapping[tuple[str, str], Mapping[str, tuple[Any, ...]]] = {
    ("torchscript", "fp32"): {"optimize": (False,)},
    ("fbgemm", "int8"): {"keep_fp32": (0,), "weight_bits": (8,), "embeddings": (True,), "engine": ("x86",)},
    ("inductor_int8", "int8"): {"keep_fp32": (0,), "weight_bits": (8,)},
    ("onnxruntime", "fp32"): {"arena": (False,)},
    ("onnxruntime", "int8"): {
        "arena": (False,),
        "keep_fp32": (0,),
        "reduce_range": (False,),
        "op_types": (("MatMul", "LSTM", "Attention", "Gather"),),
        "group": (64, 128),
        "activations": ("fp32",),
    },
    ("onnxruntime", "int4"): {"group": (32, 128), "activations": ("fp32",), "int8_share": (0.2,)},
    ("openvino", "int4"): {"group_size": (32, 128), "int4_share": (0.8,)},
    ("openvino", "int8"): {"scheme": ("transformer", "unsmoothed"), "keep_fp32": (0,), "preset": ("performance",)},
}
# Without VNNI 8-bit weights saturate, and torch's engine "x86" is no other than fbgemm: not offered there.
_NEEDS_VNNI: tuple[Change, ...] = (("reduce_range", False), ("weight_bits", 8), ("engine", "x86"))
_CORES_TO_HALVE = 4
# Settings that make the file or the process smaller and not quicker: tried for that objective only.
_ONLY_FOR = {"embeddings": "size", "op_types": "size", "arena": "memory"}


@dataclass(frozen=True)
class Config:
    """One configuration: a profile with changes of its settings, of the model or of what a recipe made of it."""

    profile: Target
    changes: tuple[Change, ...] = ()
    recipe: Path | None = None

    @property
    def name(self) -> str:
        """Short and unique within a search: "svd + ort-int8 keep_fp32=0 threads=1"."""
        words = [f"{key.partition('.')[2]}={_word(value)}" for key, value in self.changes]
        return " ".join([*([self.recipe.stem, "+"] if self.recipe else []), self.profile.name, *words])

    @property
    def target(self) -> Target:
        """The profile as it is to be built, under its own name."""
        data = self.profile.to_json()
        for key, value in self.changes:
            table, _, name = key.partition(".")
            data[table] = {**data[table], name: list(value) if isinstance(value, tuple) else value}
        return Target.model_validate(data, strict=False)

    @property
    def runtime(self) -> dict[str, Any]:
        """What the artifact's settings are replaced by when it is opened: the same files serve all of these."""
        return self.target.runtime.model_dump(mode="json")

    def with_change(self, key: str, value: Any) -> Config:
        """The configuration with one setting changed."""
        return replace(self, changes=tuple(sorted({**dict(self.changes), key: value}.items())))

    def with_build_of(self, other: Config) -> Config:
        """The other's build with the runtime settings of this one."""
        kept = {key: value for key, value in self.changes if key.startswith("runtime.")}
        build = {key: value for key, value in other.changes if key.startswith("build.")}
        return replace(other, changes=tuple(sorted({**build, **kept}.items())))


def _fits(profile: Target, key: str) -> bool:
    """Whether a setting does anything in the profile's scheme: a build that comes out the same is wasted."""
    if key == "keep_fp32" and profile.build.get("mixed") == "measured":
        return False  # which counts by itself
    static = profile.build.get("scheme") == "static" and key == "op_types"  # embeddings are of dynamic int8
    return does_something(profile, key) and not static


def _word(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def build_choices(profile: Target, objective: str) -> list[Change]:
    """Changes of build settings to try, one at a time or together; those that the profile has already are left out."""
    vnni = has_vnni(environment()["cpu_flags"])
    found: list[Change] = []
    for key, values in CHOICES.get((profile.backend, profile.precision), {}).items():
        for value in values:
            wanted = (vnni or (key, value) not in _NEEDS_VNNI) and _ONLY_FOR.get(key, objective) == objective
            has = profile.build.get(key) == (list(value) if isinstance(value, tuple) else value)
            if wanted and not has and _fits(profile, key):
                found.append((f"build.{key}", value))
    return found


def runtime_choices(profile: Target) -> list[Change]:
    """Changes of runtime settings to try: fewer threads, and ONNX Runtime without spinning.

    Fewer are one, and half of the cores from four on: small products wait longer for each other than they compute.
    """
    if (usable := usable_cores()) < 2:
        return []
    cores = min(usable, environment().get("cores_physical") or usable)  # what a profile means that sets no threads
    counts = [1, cores // 2] if cores >= _CORES_TO_HALVE else [1]
    found: list[Change] = [("runtime.threads", count) for count in counts if count < (profile.runtime.threads or cores)]
    if profile.backend == "onnxruntime" and profile.runtime.spinning:
        found.append(("runtime.spinning", False))
    return found


def bases(profiles: Sequence[Target], recipes: Iterable[Path]) -> list[Config]:
    """Every profile as it is, of the model and of each recipe's result; what is quick to build comes first."""
    ordered = sorted(profiles, key=lambda p: (p.precision != "fp32", p.backend != "onnxruntime"))
    return [Config(profile, recipe=recipe) for recipe in (None, *recipes) for profile in ordered]


def everything(base: Config, objective: str) -> Iterator[Config]:
    """Every combination of the settings that are offered for one profile."""
    choices: dict[str, list[Any]] = {}
    for key, value in [*build_choices(base.profile, objective), *runtime_choices(base.profile)]:
        choices.setdefault(key, [None]).append(value)
    for values in itertools.product(*choices.values()):
        changes = {k: v for k, v in zip(choices, values, strict=True) if v is not None}
        if not (changes.get("runtime.threads") == 1 and "runtime.spinning" in changes):  # one thread has none to wait
            yield replace(base, changes=tuple(sorted(changes.items())))
