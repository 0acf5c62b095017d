"""Runners with a known speed, opened by name in a child process: `settings` of the artifact says how slow."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Self

import numpy as np

from deploytool.artifact import Artifact
from deploytool.signature import Feeds, Outputs


class Planted:
    """Sleeps `seconds` per run, doubles its input, and fails as `settings["fails"]` asks."""

    def __init__(self, artifact: Artifact):
        self.signature = artifact.signature
        self._seconds = float(artifact.settings["seconds"])
        self._fails = artifact.settings.get("fails")
        self._ballast = np.ones(int(artifact.settings.get("ballast_bytes", 0)), dtype=np.uint8)

    def run(self, feeds: Feeds) -> Outputs:
        self.signature.bind(feeds)
        if self._fails == "crash":
            os.abort()
        if self._fails == "hang":
            time.sleep(3600)
        time.sleep(self._seconds)
        return {"y": feeds["x"] * 2}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def open_planted(artifact: Artifact) -> Planted:
    return Planted(artifact)
