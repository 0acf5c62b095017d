"""What a Hugging Face model is for, as Optimum tells it."""

from __future__ import annotations

import importlib.util
from typing import Any

import transformers

_TEXT = {"feature-extraction", "fill-mask", "text-classification", "token-classification", "question-answering",
         "sentence-similarity"}  # fmt: skip


def task_by_optimum(config: Any) -> str | None:
    """ "causal", "encoder" or "image" by Optimum's task table; None where it is not installed or does not know.

    Asked about the class of the model, not about its folder: for local folders Optimum needs the hub.
    """
    kind = _class_of(config)
    if kind is None or importlib.util.find_spec("optimum") is None:
        return None
    from optimum.exporters.tasks import TasksManager  # an extra; slow to import

    try:
        task = str(TasksManager.infer_task_from_model(kind, library_name="transformers"))
    except (ValueError, KeyError, AttributeError, RuntimeError):
        return None
    if task.startswith("text-generation"):
        return "causal"
    main = getattr(kind, "main_input_name", "")
    if main == "pixel_values" and hasattr(config, "num_channels"):
        return "image"
    return "encoder" if main == "input_ids" and task in _TEXT and hasattr(config, "vocab_size") else None


def _class_of(config: Any) -> Any:
    """The class that the config names, else the one without a head that its type has; None for neither."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None:
        return named
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        return None
