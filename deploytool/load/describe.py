"""What a model holds, layer by layer, as data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deploytool.load.attention_routing import attention_sites
from deploytool.load.model import open_source
from deploytool.source import ModelRef, Source

_HOOKS = ("evaluate", "train_batches", "loss", "prompts")


def describe_job(ref: Mapping[str, str]) -> dict[str, Any]:
    """Signature, size, hooks and layers of a model (in a worker)."""
    source = open_source(ModelRef(**ref))
    rows = layers(source) if source.ref.has_module else _weights_of_graph(source)
    rows = [{"rank": None, "heads": None, "bits": None, **row} for row in rows]
    own = [(p.numel(), p.numel() * p.element_size()) for p in source.module.parameters()]  # tied ones once
    sizes = own if source.ref.has_module else [(row["parameters"], row["size_bytes"]) for row in rows]
    return {
        "signature": source.signature.to_json(),
        "parameters": sum(count for count, _ in sizes),
        "size_bytes": sum(size for _, size in sizes) - sum(_saved(source, name) for name in source.encodings),
        "samples": sum(1 for _ in source.samples()),
        "synthetic": source.synthetic,
        "hooks": [name for name in _HOOKS if getattr(source, name) is not None],
        "layers": rows,
    }


def _weights_of_graph(source: Source) -> list[dict[str, Any]]:
    from deploytool.load.onnxfile import onnx_layers  # brings ONNX Runtime, which a module does without

    return onnx_layers(Path(source.ref.path))


def layers(source: Source) -> list[dict[str, Any]]:
    """Every module that owns parameters or computes attention, as data.

    Name, kind, the weight's shape, bytes as they are stored, share of zeros, what it is tied to; `rank` where it is a
    factor, `heads` where it computes attention, `bits` that one element of its weight takes.
    """
    rows = []
    seen: dict[int, str] = {}
    ranks = {edit["layer"]: edit["rank"] for edit in source.edits if "rank" in edit}
    tucker = [edit for edit in source.edits if edit["kind"] == "conv_tucker"]
    ranks |= {edit["layer"]: [edit["inputs"], edit["outputs"]] for edit in tucker}
    heads = _heads(source)
    for name, module in source.module.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own and name not in heads:
            continue
        row = _layer(name, module, own, seen) if own else _empty(name, module)
        row |= {"rank": ranks.get(name.rpartition(".")[0]), "heads": heads.get(name)}
        encoding = source.encodings.get(f"{name}.weight")
        if encoding is not None and not row["tied_to"]:
            row |= {"bits": encoding.bits, "size_bytes": row["size_bytes"] - _saved(source, f"{name}.weight")}
        rows.append(row)
    return rows


def _saved(source: Source, name: str) -> int:
    """The bytes that an encoded weight takes less than its floats: codes, scales and zero points are stored."""
    weight, encoding = source.module.get_parameter(name), source.encodings[name]
    coded = -(-weight.numel() * encoding.bits // 8) + 4 * (encoding.scale.numel() + encoding.zero_point.numel())
    return weight.nbytes - coded


def _heads(source: Source) -> dict[str, int]:
    """Heads of the modules that ask torch for attention on the first sample."""
    sample = next(iter(source.samples()))
    arguments = [sample[name] for name in source.signature.input_names]
    sites = attention_sites(source.module, lambda: source.flat(*arguments))
    return {site.name: site.heads for site in sites} | {
        name: module.num_heads for name, module in source.module.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }  # fmt: skip


def _empty(name: str, module: nn.Module) -> dict[str, Any]:
    return {"name": name or "(the model)", "kind": type(module).__name__, "shape": [], "parameters": 0,
            "size_bytes": 0, "bits": None, "sparsity": 0.0, "tied_to": None}  # fmt: skip


def _layer(name: str, module: nn.Module, own: Mapping[str, Any], seen: dict[int, str]) -> dict[str, Any]:
    first = own.get("weight", next(iter(own.values())))
    tied = seen.get(first.data_ptr())
    seen.setdefault(first.data_ptr(), name)
    total = sum(p.numel() for p in own.values())
    return {
        "name": name or "(the model)",
        "kind": type(module).__name__,
        "shape": list(first.shape),
        "bits": 8 * first.element_size(),
        "parameters": total,
        "size_bytes": 0 if tied else sum(p.numel() * p.element_size() for p in own.values()),
        "sparsity": 1.0 - sum(int(p.count_nonzero()) for p in own.values()) / max(total, 1),
        "tied_to": tied,
    }
