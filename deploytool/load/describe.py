"""What a model holds, layer by layer, as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deploytool.load.model import open_source
from deploytool.source import ModelRef, Source

_HOOKS = ("evaluate", "train_batches", "loss", "prompts")


def describe_job(ref: Mapping[str, str]) -> dict[str, Any]:
    """Signature, size, hooks and layers of a model (in a worker)."""
    source = open_source(ModelRef(**ref))
    rows = layers(source) if source.ref.has_module else _weights_of_graph(source)
    own = [(p.numel(), p.numel() * p.element_size()) for p in source.module.parameters()]  # tied ones once
    sizes = own if source.ref.has_module else [(row["parameters"], row["size_bytes"]) for row in rows]
    return {
        "signature": source.signature.to_json(),
        "parameters": sum(count for count, _ in sizes),
        "size_bytes": sum(size for _, size in sizes),
        "samples": sum(1 for _ in source.samples()),
        "synthetic": source.synthetic,
        "hooks": [name for name in _HOOKS if getattr(source, name) is not None],
        "layers": rows,
    }


def _weights_of_graph(source: Source) -> list[dict[str, Any]]:
    from deploytool.load.onnxfile import onnx_layers  # brings ONNX Runtime, which a module does without

    return onnx_layers(Path(source.ref.path))


def layers(source: Source) -> list[dict[str, Any]]:
    """Every module that owns parameters: name, kind, weight's shape, bytes, share of zeros, and what it is tied to."""
    rows = []
    seen: dict[int, str] = {}
    for name, module in source.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            rows.append(_layer(name, module, own, seen))
    return rows


def _layer(name: str, module: nn.Module, own: Mapping[str, Any], seen: dict[int, str]) -> dict[str, Any]:
    first = own.get("weight", next(iter(own.values())))
    tied = seen.get(first.data_ptr())
    seen.setdefault(first.data_ptr(), name)
    total = sum(p.numel() for p in own.values())
    return {
        "name": name or "(the model)",
        "kind": type(module).__name__,
        "shape": list(first.shape),
        "parameters": total,
        "size_bytes": 0 if tied else sum(p.numel() * p.element_size() for p in own.values()),
        "sparsity": 1.0 - sum(int(p.count_nonzero()) for p in own.values()) / max(total, 1),
        "tied_to": tied,
    }
