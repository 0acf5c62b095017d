"""The models of a search: the one that was asked about, and what each recipe makes of it; each is prepared once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.load.resolve import COMPRESSED, resolve
from deploytool.pipeline.export import Options, prepared_and_checked
from deploytool.pipeline.reference import Reference
from deploytool.source import ModelRef
from deploytool.storage import sha256_file, work_folder
from deploytool.tune.store import Store, digest


class Models:
    """Prepares models in `folder`; a context manager."""

    def __init__(self, ref: ModelRef, folder: Path, options: Options, store: Store, say: Callable[[str], None]):
        self.ref = ref
        self._folder = folder
        self._options = options
        self._store = store
        self._say = say
        self._stack = ExitStack()
        self._references: dict[tuple[Path | None, bool], Reference] = {}
        self._lock = threading.RLock()  # several stations may want the same model at once

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def reference(self, recipe: Path | None, graph: bool = True) -> Reference:
        """The reference of the model, or of what a recipe made of it; one with an ONNX graph serves all targets.

        Raises InputRefused (DT305) where a graph is needed and the model has none.
        """
        with self._lock:
            if not graph and (recipe, True) in self._references:
                return self._references[recipe, True]
            if (recipe, graph) not in self._references:
                self._references[recipe, graph] = self._prepare(recipe, graph)
            return self._references[recipe, graph]

    def _prepare(self, recipe: Path | None, graph: bool) -> Reference:
        ref = self.ref if recipe is None else self._compressed(recipe)
        self._say(f"preparing {ref.name}")
        prepared = prepared_and_checked(ref, self._options, graph, self._say)
        work = self._stack.enter_context(work_folder(self._folder))
        return Reference(ref, prepared, work, self._options.limits, self._options.seed)

    def compressed_folder(self, recipe: Path) -> Path:
        """Where a recipe's result lies."""
        return self._folder / "models" / f"{recipe.stem}-{self._recipe_key(recipe)[:8]}"

    def _recipe_key(self, recipe: Path) -> str:
        original = self.reference(None, False).prepared
        return digest([sha256_file(recipe), original.fingerprint, original.folder.name, self._options.seed])

    def _compressed(self, recipe: Path) -> ModelRef:
        folder, about = self.compressed_folder(recipe), {"recipe": self._recipe_key(recipe)}

        def compress() -> dict[str, Any]:
            self._say(f"compressing by {recipe.stem}")
            report: dict[str, Any] = worker.run(
                f"compressing {self.ref.name}", "deploytool.compress.run:compress_job", self._options.limits, self._say,
                ref=asdict(self.ref), recipe_path=str(recipe.absolute()), out=str(folder.absolute()),
                seed=self._options.seed, evaluate=self._options.quality, overwrite=True,
            )  # fmt: skip
            return {"before": report["before"], "after": report["after"]}

        if not (folder / COMPRESSED).is_file():
            self._store.forget("compress", about)
        self._store.once("compress", about, compress)
        return resolve(str(folder))
