"""Which layers a step works on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from deploytool.errors import UsageProblem, nearest

_LISTED = 40


def select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The names that a pattern of `include` matches (all when it is empty) and none of `exclude`.

    Raises UsageProblem when a pattern matches nothing, or nothing is left.
    """
    names = list(names)
    idle = [p for p in (*include, *exclude) if not any(fnmatchcase(n, p) for n in names)]
    chosen = {n for n in names if not include or any(fnmatchcase(n, p) for p in include)}
    chosen -= {n for n in chosen if any(fnmatchcase(n, p) for p in exclude)}
    if idle or not chosen:
        detail = [f"{p!r} matches no layer; {nearest(p, names)}" for p in idle]
        detail += [f"candidate: {n}" for n in names[:_LISTED]]
        detail += [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
        got = f"no match for {', '.join(map(repr, idle))}" if idle else "none chosen"
        raise UsageProblem("DT204", f"include and exclude must match layers that the step can change (got {got})",
                           detail=detail)  # fmt: skip
    return chosen


def shared_names(module: nn.Module) -> dict[str, str]:
    """{parameter name: another name of the same tensor} for every parameter that has more than one."""
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault((parameter.data_ptr() or id(parameter), tuple(parameter.shape)), []).append(name)
    return {name: next(n for n in group if n != name) for group in groups.values() if len(group) > 1 for name in group}
