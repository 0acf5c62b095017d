"""A source: a live module with what is needed to lower, verify and train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploytool.encoding import Encoding
from deploytool.signature import Signature

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, Any]
Predict = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class ModelRef:
    """What the user named.

    kind     "python" (a model file), "huggingface" (a folder or id), "compressed" (a folder that compress wrote),
             "onnx" (an ONNX file)
    name     short, for tables: "digits"
    path     the file or folder, absolute
    samples  for kinds that bring none: an .npz file or a folder of such, absolute; None where samples are made
    """

    kind: str
    name: str
    path: str
    samples: str | None = None

    @property
    def has_module(self) -> bool:
        """Whether there is a PyTorch module: an ONNX file has only its graph."""
        return self.kind != "onnx"


@dataclass(frozen=True)
class Hooks:
    """What can be asked of a model without building it; `notes` say what cannot, and why."""

    evaluate: Callable[[Predict], dict[str, float]] | None = None
    lower_is_better: tuple[str, ...] = ()
    prompts: Callable[[], list[list[int]]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A module in eval mode and what belongs to it.

    module         called as `module(**feeds)`; may return a tensor or any nesting of tuples, dicts and dataclasses
    flat           the same module as tensors in, tensors out, in the order of the signature: what lowering takes
    samples        re-iterable; each sample is {input name: tensor}; the first is the example that is timed
    seen           outputs of samples that were run while loading, by the sample's index
    evaluate       evaluate(predict) -> {metric: value}; predict maps named tensors to named output tensors
    lower_is_better names of the metrics that are better when smaller
    calibration    typical samples that compression steps look at; they take `samples` where it is None
    train_batches  one epoch of {input name: tensor, "target": tensor, ...} per call
    loss           loss(outputs, batch) -> scalar tensor; outputs are the named outputs
    prompts        token ids for the greedy-decoding check of language models
    assets         files that belong to the model and ship with it (tokenizer)
    made_assets    gives such files that are not on disk, by name: their text
    dependencies   files and folders that the model was read from, for the cache key
    synthetic      True when the samples are made up, since the model came with no data; reports say so
    notes          what else reports have to say of the model
    original       the uncompressed model that a compressed one is verified against; None when this is one itself
    edits          structural changes made to the original's module, in their order, as `load.surgery` applies them
    masks          {parameter name: bool tensor}, False where a weight was pruned and must stay zero
    encodings      {parameter name: the grid that its values lie on}, which lowerings write in their own forms
    """

    ref: ModelRef
    module: nn.Module
    flat: nn.Module
    signature: Signature
    samples: Callable[[], Iterable[dict[str, Tensor]]]
    seen: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    evaluate: Callable[[Predict], dict[str, float]] | None = None
    lower_is_better: tuple[str, ...] = ()
    calibration: Callable[[], Iterable[dict[str, Tensor]]] | None = None
    train_batches: Callable[[], Iterable[dict[str, Tensor]]] | None = None
    loss: Callable[[dict[str, Tensor], Batch], Tensor] | None = None
    prompts: Callable[[], list[list[int]]] | None = None
    assets: tuple[Path, ...] = ()
    made_assets: Callable[[], Mapping[str, str]] | None = None
    dependencies: tuple[Path, ...] = ()
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    original: ModelRef | None = None
    edits: tuple[Mapping[str, Any], ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
