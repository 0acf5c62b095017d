"""Why torch could not export a module: the first cause in one sentence, with the place in the user's own code."""

from __future__ import annotations

import linecache
import os
import re
import sysconfig
import traceback
from pathlib import Path

import torch

import deploytool

DATA_DEPENDENT = ("make every way part of the graph there: torch.cond for an `if`, torch.where for values, a fixed "
                  "number of steps for a loop; or choose torchscript or fbgemm, which compile it; or keep that part "
                  "out of the module and run it in your own code")  # fmt: skip
_LONGEST = 400
_OWN = tuple(f"{Path(module.__file__ or '').parent}{os.sep}" for module in (torch, deploytool))
_STANDARD = sysconfig.get_paths()["stdlib"]
_PLACE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
_DATA = ("data-dependent", "data dependent", "DataDependent")
# Where torch's messages go on with advice on its own debugging.
_NOISE = ("consider using", "caused by", "for more", "for extended", "for c++", "if you suspect", "the following call",
          "the error above", "(refer to", "potential framework code culprit", "to fix the error", "from user code",
          "set torch")  # fmt: skip


def reason(error: BaseException) -> str:
    """What failed first, with its place: "ValueError: must be so, at m.py:9: `y = x.item()`"."""
    first = _first(error)
    place = _place(first)
    if depends_on_data(error):
        return f"{type(first).__name__}: what is computed depends on values of the inputs{place}"
    lines = [" ".join(line.split()) for line in str(first).splitlines() if line.strip()]
    noise = next((n for n, line in enumerate(lines) if line.lower().startswith(_NOISE)), len(lines))
    said = " ".join(lines[: max(noise, 1)])
    return f"{type(first).__name__}: {said[:_LONGEST]}{place}"


def depends_on_data(error: BaseException) -> bool:
    """Whether the module branches, loops or takes sizes by values of its inputs, which no graph can."""
    first = _first(error)
    return any(word in type(first).__name__ or word in str(first) for word in _DATA)


def _first(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _place(error: BaseException) -> str:
    """ ", at FILE:LINE: `code`", of the last call that is none of torch's, Python's or ours; "" without any."""
    told = [(file, int(line)) for file, line, _ in _PLACE.findall(str(error))]
    went = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    for places in (told, went):
        own = [(file, line) for file, line in places if Path(file).is_file() and not _foreign(file)]
        if own:
            file, line = own[-1]
            return f", at {file}:{line}: `{linecache.getline(file, line).strip()}`"
    return ""


def _foreign(file: str) -> bool:
    return file.startswith(_OWN) or (file.startswith(_STANDARD) and "site-packages" not in file)
