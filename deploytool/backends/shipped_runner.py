"""Puts the small text generator beside a language model: `generate.py` and its engine's decoder."""

from __future__ import annotations

import shutil
from pathlib import Path


def ship(decoder: Path, out: Path) -> None:
    """Copy the generator, and `decoder` as the decoder.py that it opens the model with, into the artifact `out`."""
    shutil.copyfile(Path(__file__).with_name("generate.py"), out / "generate.py")
    shutil.copyfile(decoder, out / "decoder.py")
