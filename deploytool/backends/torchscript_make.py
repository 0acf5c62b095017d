"""Makes TorchScript of a module: traced, or compiled by torch.jit.script where the trace is wrong.

A trace holds the one way that its example took: a branch or a loop on a tensor's value is gone from it. Only the
modules whose code decides by values are compiled, where they can be found and compiled; what is around them is traced.
https://docs.pytorch.org/docs/stable/jit.html ("Mixing Tracing and Scripting")
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from deploytool.backends.base import Request
from deploytool.backends.eager import as_tuple, positional
from deploytool.difference import Difference, error_max
from deploytool.errors import InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.lower.export_failure import reason

_SAME = 0.99999  # cosine: the same operators in the same order
_WHOLE = "module"  # the name of the model within its FlatModule
_TORCH = str(Path(torch.__file__).parent)
_AGREED = 0.99  # of whole numbers: a rounding may turn a choice between equals
Place = tuple[str, int]  # file, line


def save_script(module: nn.Module, request: Request, method: Literal["auto", "trace", "script"], path: Path
                ) -> dict[str, Any]:  # fmt: skip
    """Freeze a FlatModule in eval mode and save it to `path`; returns what the artifact's settings say of it.

    made_by         "trace" or "script"
    scripted        of "script": the modules that were compiled, "" for the whole model
    fixed_by_trace  of a trace that was compared, or of what is traced around the scripted modules: lines that decide by
                    values or sizes, all samples alike

    "auto" takes the trace where it equals the module on every parity case and calibration feed, else a script that
    does: of torch.equal and its like tracing does not warn. Raises InputRefused DT310 where there is none, with the
    lines that decide.
    """
    arguments = example(request)
    places: list[Place] = []
    obstacles: list[str] = []
    made = _attempt(module, arguments, [], obstacles, places)
    if made is not None and method != "script":
        compared = method == "auto"
        wrong = _difference(made, module, request) if compared else ""
        if not wrong:
            _save(made, path)
            return {"made_by": "trace"} | (_fixed(places) if compared else {})
        obstacles.append(f"torch.jit.trace: {wrong}")
    if method == "trace":
        raise InputRefused("DT310", f"the model must be traceable by torch.jit.trace (got: {obstacles[0]})",
                           fix='leave out method = "trace", or choose a target that lowers to ONNX')  # fmt: skip
    for names in filter(None, ([n for n in _owners(module, places) if n != _WHOLE], [_WHOLE])):
        around: list[Place] = []
        made = _attempt(module, arguments, names, obstacles, around)
        wrong = "" if made is None else _difference(made, module, request)
        if made is not None and not wrong:
            _save(made, path)
            scripted = [name.removeprefix(_WHOLE).lstrip(".") for name in names]
            return {"made_by": "script", "scripted": scripted} | _fixed(around)
        obstacles += [f"torch.jit.script of {_named(names)}: {wrong}"] if wrong else []
    raise _refused(places, obstacles)


def trace(module: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    """A module in eval mode, traced and not frozen; what torch raises is raised."""
    with no_fast_path(), torch.no_grad():
        return torch.jit.trace(module, arguments, strict=False, check_trace=False).eval()


@contextmanager
def quiet_jit() -> Iterator[None]:
    """Silences what torch says of TorchScript's age and of constants in a trace; parity judges the trace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        yield


def example(request: Request) -> tuple[Tensor, ...]:
    """The calibration feeds with the most free dimensions larger than 1, as tensors.

    Tracing writes sizes of 1 into the graph where it can; of equally good samples the smallest is taken.
    """
    best: tuple[tuple[int, int], tuple[Tensor, ...]] | None = None
    for feeds in request.calibration():
        sizes = request.signature.bind(feeds)
        rank = (sum(size > 1 for size in sizes.values()), -sum(array.size for array in feeds.values()))
        if best is None or rank > best[0]:
            best = (rank, tuple(t.clone() for t in positional(request.signature, feeds)))
    if best is None:
        raise InputRefused("DT303", "tracing must have at least one sample (got none)")
    return best[1]


def _attempt(
    module: nn.Module, arguments: tuple[Tensor, ...], scripted: Sequence[str], obstacles: list[str],
    places: list[Place],
) -> Any:  # fmt: skip
    """The trace with some modules compiled; None, and why in `obstacles`, where torch does not take it."""
    way = f"torch.jit.script of {_named(scripted)}" if scripted else "torch.jit.trace"
    try:
        with quiet_jit(), _compiled(module, scripted), _noting(places):
            return trace(module, arguments)
    except Exception as error:  # what the compiler raises has no common base, and tracing runs the model's own code
        obstacles.append(f"{way}: {reason(error)}")
        return None


@contextmanager
def _compiled(root: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Some modules below `root` in their compiled form, which shares their weights, for the while."""
    before = {name: root.get_submodule(name) for name in names}
    scripts = {inner: torch.jit.script(inner) for inner in dict.fromkeys(before.values())}
    try:
        for name, inner in before.items():
            root.set_submodule(name, scripts[inner])
        yield
    finally:
        for name, inner in before.items():
            root.set_submodule(name, inner)


@contextmanager
def _noting(places: list[Place]) -> Iterator[None]:
    """Collects the lines that tracing warns of, each once; other warnings go their way."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TracerWarning)
        show = warnings.showwarning

        def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
            if not issubclass(category, TracerWarning):
                show(message, category, filename, lineno, *rest)
            elif (filename, lineno) not in places:
                places.append((filename, lineno))

        warnings.showwarning = note  # type: ignore[assignment]
        yield


def _owners(root: nn.Module, places: Sequence[Place]) -> list[str]:
    """The outermost modules in whose classes' code the places are, one at two places by both its names.

    torch's own lines are in functions of many.
    """
    places = [place for place in places if not _is_of_torch(place)]
    found: list[str] = []
    for name, inner in root.named_modules(remove_duplicate=False):
        if name and not any(name.startswith(f"{outer}.") for outer in found) and _holds(type(inner), places):
            found.append(name)
    return found


def _holds(kind: type, places: Sequence[Place]) -> bool:
    kinds = [k for k in kind.__mro__ if issubclass(k, nn.Module) and k is not nn.Module]
    codes = [f.__code__ for k in kinds for f in vars(k).values() if inspect.isfunction(f)]
    return any((code.co_filename, line) in places for code in codes for _, _, line in code.co_lines() if line)


def _difference(script: Any, module: nn.Module, request: Request) -> str:
    """How the script's outputs differ from the module's on the first feeds where they do; "" where they never do."""
    specs = request.signature.outputs
    for index, feeds in enumerate(itertools.chain(request.cases(), request.calibration())):
        given = positional(request.signature, feeds)
        with torch.inference_mode(), quiet_jit(), no_fast_path():
            wanted = as_tuple(module(*(tensor.clone() for tensor in given)))
            try:
                got = as_tuple(script(*(tensor.clone() for tensor in given)))
            except (RuntimeError, torch.jit.Error) as error:  # the latter where the script itself raises
                return f"it fails on feeds {index} ({' '.join(str(error).split())[-200:]})"
        for spec, right, other in zip(specs, wanted, got, strict=True):
            found = Difference(spec.name, bool(spec.shape) and spec.shape[0] == "batch")
            found.add(index, right.numpy(), other.numpy())
            if found.problems:
                return f"output {spec.name!r}: {found.problems[0]}"
            figures = f"cosine {found.cosine:.6f}, relative error {found.error:.2g}"
            wrong = found.cosine < _SAME or found.error > error_max(_SAME)
            if not found.epsilon:
                figures = f"{found.agreed} of {found.decisions} values"
                wrong = found.agreed < _AGREED * found.decisions
            if wrong:
                return f"output {spec.name!r} of feeds {index} is not the module's ({figures})"
    return ""


def _save(script: Any, path: Path) -> None:
    try:
        with quiet_jit(), torch.no_grad():
            torch.jit.save(torch.jit.freeze(script), str(path))
    except RuntimeError as error:
        raise InputRefused("DT310", f"torch.jit.freeze must take the model (got: {error})"[:2000],
                           fix="choose a target that lowers to ONNX") from error  # fmt: skip


def _refused(places: Sequence[Place], obstacles: Sequence[str]) -> InputRefused:
    lines = [_told(place) for place in sorted(places, key=_is_of_torch)]
    decides = f"{lines[0]} decides by values of tensors" if lines else obstacles[0]
    return InputRefused(
        "DT310", f"the model must be one that torch.jit.trace or torch.jit.script takes (got: {decides})"[:2000],
        detail=[*lines[1:6], *obstacles],
        fix="write these lines with torch.where or masks, or in the part of Python that torch.jit.script compiles "
        "(arguments that are no tensors annotated, tensors, lists and dicts of one type)",
    )  # fmt: skip


def _fixed(places: Sequence[Place]) -> dict[str, list[str]]:
    """The setting that tells of lines whose choice a trace holds; none where there are no such lines."""
    return {"fixed_by_trace": [_told(place) for place in places]} if places else {}


def _told(place: Place) -> str:
    whose = " (torch's own)" if _is_of_torch(place) else ""
    return f"{Path(place[0]).name}:{place[1]}: `{linecache.getline(*place).strip()}`{whose}"


def _is_of_torch(place: Place) -> bool:
    return place[0].startswith(_TORCH + os.sep)


def _named(names: Sequence[str]) -> str:
    return ", ".join(name.removeprefix(_WHOLE).lstrip(".") or "the model" for name in names)
