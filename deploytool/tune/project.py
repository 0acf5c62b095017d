"""What a search leaves behind: the chosen artifact, its profile, and the `deploytool.toml` that makes it again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploytool.source import ModelRef
from deploytool.storage import new_folder, write_bytes
from deploytool.target import Target
from deploytool.tune.space import Config

CHOSEN, PROJECT, COMPRESSED_MODEL, RECIPE = "chosen", "deploytool.toml", "compressed", "recipe.toml"


def profile_of(config: Config, max_drop: float, number: int = 0) -> Target:
    """A configuration as a profile of its own, numbered from 1 on; it allows the loss that the search was allowed."""
    target = config.target
    parity = target.parity.model_copy(update={"metric_drop_max": max_drop})
    name = f"{config.profile.name}-tuned" + (f"-{number}" if number else "")
    description = f"Found by a search: {config.name}"[:200]
    return target.model_copy(update={"name": name, "description": description, "parity": parity})


def write_artifact(folder: Path, name: str, profile: Target, artifact: Path) -> None:
    """Write an artifact of the search and its profile to `name` and `name.toml` in `folder`."""
    with new_folder(folder / name, overwrite=True) as made:
        shutil.copytree(artifact, made, dirs_exist_ok=True)
    write_bytes(folder / f"{name}.toml", toml_text(profile.model_dump(mode="json", exclude_none=True)).encode())


def write_project(
    folder: Path, model: str, config: Config, max_drop: float, compressed: Path | None, profiles: Sequence[str]
) -> None:
    """Write the project file into `folder`: the model, and the `profiles` that lie there.

    With a recipe, the compressed model is copied and becomes the project's model; the recipe lies beside it.
    """
    lines = [f"# Found by `deploytool tune`: {config.name}. In this folder, `deploytool export` makes it again."]
    if compressed is not None and config.recipe is not None:
        with new_folder(folder / COMPRESSED_MODEL, overwrite=True) as made:
            shutil.copytree(compressed, made, dirs_exist_ok=True)
        shutil.copyfile(config.recipe, folder / RECIPE)
        lines.append(f"# The model was made by `deploytool compress {model} --recipe ./{RECIPE} -o {COMPRESSED_MODEL}`")
        model = f"./{COMPRESSED_MODEL}"
    lines += [f"model = {json.dumps(model)}", f"targets = {json.dumps([f'./{name}' for name in profiles])}", "",
              "[quality]", f"max_drop = {max_drop!r}"]  # fmt: skip
    write_bytes(folder / PROJECT, ("\n".join(lines) + "\n").encode())


def model_name(typed: str, ref: ModelRef, folder: Path) -> str:
    """The model as the project file names it: a shipped name or a hub id as it is, a path seen from the folder."""
    if Path(typed).exists() and ("/" in typed or Path(typed).suffix):
        return os.path.relpath(ref.path, folder.absolute())
    return typed


def toml_text(data: Mapping[str, Any]) -> str:
    """Data as TOML: text, numbers, booleans, lists of these, and tables of tables; None is left out."""
    return "\n".join(_table(data, ())) + "\n"


def _table(data: Mapping[str, Any], path: Sequence[str]) -> Iterator[str]:
    plain = {k: v for k, v in data.items() if not isinstance(v, Mapping) and v is not None}
    if path and (plain or not data):
        yield from ("", f"[{'.'.join(map(_key, path))}]")
    for key, value in plain.items():
        yield f"{_key(key)} = {json.dumps(value)}"
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _table(value, (*path, key))


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else json.dumps(name)
