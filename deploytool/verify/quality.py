"""The task metric, and for language models greedy decoding, of any artifact: computed by the model's own code."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.base import open_as_used
from deploytool.errors import DeployError, InputRefused, nearest
from deploytool.load.model import open_hooks
from deploytool.load.predict import tensor_predict
from deploytool.source import ModelRef
from deploytool.verify.generation import greedy

NEW_TOKENS = 32


def quality_job(artifact: str, ref: Mapping[str, str]) -> dict[str, Any]:
    """Evaluate an artifact with the hooks of the model `ref` (in a worker).

    Returns {"metrics": {name: value}, "scores": {name: [number of each sample, ...]}, "tokens": [[id, ...], ...],
    "rivals": [[id or None, ...], ...]}, a rival being what nearly tied with the token; empty where the model has no
    such hook, or its evaluate() does not take `record`.
    """
    hooks = open_hooks(ModelRef(**ref))
    metrics: dict[str, float] = {}
    scores: dict[str, list[float]] = {}
    tokens: list[list[int]] = []
    rivals: list[list[int | None]] = []
    with open_as_used(Artifact.load(Path(artifact), check=False)) as runner:
        if hooks.evaluate is not None:
            recorded = {"record": partial(_record, scores)} if _records(hooks.evaluate) else {}
            metrics = _checked(_run("evaluate", hooks.evaluate, tensor_predict(runner), **recorded))
            if unknown := [name for name in scores if name not in metrics]:
                raise InputRefused("DT313", "record() must be given metrics that evaluate() gives "
                                   f"(got {', '.join(unknown)})", detail=[nearest(unknown[0], metrics)])  # fmt: skip
            if unknown := [name for name in hooks.lower_is_better if name not in metrics]:
                raise InputRefused("DT313", "LOWER_IS_BETTER must name metrics that evaluate() gives "
                                   f"(got {', '.join(unknown)})", detail=[nearest(unknown[0], metrics)])  # fmt: skip
        if hooks.prompts is not None:
            for prompt in _prompts(_run("prompts", hooks.prompts)):
                found, near = greedy(runner, prompt, NEW_TOKENS)
                tokens.append(found)
                rivals.append(near)
    return {"metrics": metrics, "scores": scores, "tokens": tokens, "rivals": rivals}


def _records(evaluate: Callable[..., Any]) -> bool:
    """Whether evaluate() can tell the scores of single samples."""
    return "record" in inspect.signature(evaluate).parameters


def _record(scores: dict[str, list[float]], name: str, numbers: Iterable[Any]) -> None:
    """What a model's evaluate() calls: the scores of the next samples, in the same order in every run."""
    taken = [float(number) for number in numbers]
    if not all(map(math.isfinite, taken)):
        raise InputRefused("DT313", f"every score of {name!r} must be finite (got {taken!r:.300})")
    scores.setdefault(str(name), []).extend(taken)


def _run(name: str, hook: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The model's own code: what it raises is its author's to mend."""
    try:
        return hook(*arguments, **named)
    except DeployError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputRefused("DT313", f"{name}() of the model must run (got {type(error).__name__}: {str(error)[:300]})",
                           detail=[f"at {frame.filename}:{frame.lineno}"]) from error  # fmt: skip


def _prompts(prompts: list[list[int]]) -> list[list[int]]:
    if not prompts:
        raise InputRefused("DT313", "prompts() must give at least one prompt (got none)")
    return prompts


def _checked(metrics: Any) -> dict[str, float]:
    if not isinstance(metrics, Mapping) or not metrics:
        raise InputRefused("DT313", f"evaluate() must return {{metric: number}} (got {metrics!r})")
    try:
        numbers = {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise InputRefused("DT313", f"every metric must be a number (got {metrics!r:.300})") from error
    bad = [f"{name} = {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise InputRefused("DT313", f"every metric must be finite (got {', '.join(bad)})")
    return numbers
