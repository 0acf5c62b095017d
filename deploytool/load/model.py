"""ModelRef -> Source: the one place that knows the kinds of models."""

from __future__ import annotations

import importlib

from deploytool.child import uncollected
from deploytool.errors import InternalError
from deploytool.load.modelfile import open_model_file, read_model_file
from deploytool.source import Hooks, ModelRef, Source

_OPENERS = {
    "huggingface": "deploytool.load.huggingface:open_huggingface",
    "compressed": "deploytool.load.compressed:open_compressed",
    "onnx": "deploytool.load.onnxfile:open_onnx",
}


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
    """The model's own measures; a model file is executed for them but not built, a folder's weights are not read."""
    if ref.kind == "python":
        file = read_model_file(ref)
        return Hooks(file.hook("evaluate"), tuple(file.hook("LOWER_IS_BETTER") or ()), file.hook("prompts"))
    if ref.kind == "huggingface":
        found: Hooks = importlib.import_module("deploytool.load.huggingface").huggingface_hooks(ref)
        return found
    source = open_source(ref)
    return Hooks(source.evaluate, source.lower_is_better, source.prompts)
