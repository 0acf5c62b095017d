"""ModelRef -> Source: the one place that knows the kinds of models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from deploytool.child import uncollected
from deploytool.errors import InternalError
from deploytool.load.modelfile import open_model_file, read_model_file
from deploytool.source import ModelRef, Predict, Source

_OPENERS = {
    "huggingface": "deploytool.load.huggingface:open_huggingface",
    "compressed": "deploytool.load.compressed:open_compressed",
    "onnx": "deploytool.load.onnxfile:open_onnx",
}


@dataclass(frozen=True)
class Hooks:
    """What can be asked of a model without building it."""

    evaluate: Callable[[Predict], dict[str, float]] | None = None
    lower_is_better: tuple[str, ...] = ()
    prompts: Callable[[], list[list[int]]] | None = None


def open_source(ref: ModelRef) -> Source:
    """Load a model and everything that belongs to it."""
    if ref.kind == "python":
        return open_model_file(ref)
    if ref.kind not in _OPENERS:
        raise InternalError("DT900", f"the kind of model must be known (got {ref.kind!r})")
    module, _, function = _OPENERS[ref.kind].partition(":")
    with uncollected():  # all but a model file's build(), which may do anything
        source: Source = getattr(importlib.import_module(module), function)(ref)
    return source


def open_hooks(ref: ModelRef) -> Hooks:
    """The model's own measures; a model file is executed for them but not built."""
    if ref.kind == "python":
        file = read_model_file(ref)
        return Hooks(file.hook("evaluate"), tuple(file.hook("LOWER_IS_BETTER") or ()), file.hook("prompts"))
    source = open_source(ref)
    return Hooks(source.evaluate, source.lower_is_better, source.prompts)
