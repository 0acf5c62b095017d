"""What a Hugging Face model is fed with, from what its class and its config say: text, pictures, sound, or two of them.

The kinds are told apart by the inputs that the class's forward() takes, never by the name of an architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused
from deploytool.load.infer import Declared, Seen
from deploytool.load.texts import Tokenize, sentences, text_batches
from deploytool.signature import Dim
from deploytool.storage import read_json

Sample = dict[str, Tensor]

_BATCHES = (1, 2, 3, 5)
_WRITTEN = (8, 5, 12, 7, 3, 16, 9, 11)  # lengths of what a decoder has written so far, one per sample
_SECONDS_THIRDS = (3, 2, 4, 1)  # lengths of sound, in thirds of a second
_SAMPLING_RATE = 16_000
_LONGEST_TEXT = 512


@dataclass(frozen=True)
class Inputs:
    """Samples, their declared shapes, what every call gets beside them, and whether the samples are made up.

    `seen` holds outputs that are known already, by the sample's index.
    """

    samples: list[Sample]
    declared: Declared
    settings: dict[str, Any]
    synthetic: bool
    seen: Seen = field(default_factory=dict)


class NamedModel(nn.Module):
    """A Hugging Face model that returns its output tensors by name and nothing else."""

    def __init__(self, model: nn.Module, settings: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.settings = settings or {}

    def forward(self, **feeds: Tensor) -> dict[str, Tensor]:
        """Takes the model's inputs by name; returns its tensors, e.g. last_hidden_state [batch, sequence, width]."""
        outputs = self.model(**feeds, **self.settings, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def kind_by_class(kind: Any, config: Any) -> str | None:
    """ "encoder", "image", "sound", "encoder-decoder" or "text and image"; None for a class of another kind."""
    takes = inspect.signature(kind.forward).parameters
    main = getattr(kind, "main_input_name", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        return "encoder-decoder"
    if main == "input_ids" and "pixel_values" in takes and hasattr(config, "vision_config"):
        return "text and image"
    return {"input_ids": "encoder", "pixel_values": "image", "input_values": "sound", "input_features": "sound"}.get(
        str(main)
    )


def inputs_of(kind: str, model: Any, folder: Path, tokenize: Tokenize, real_text: bool) -> Inputs:
    """Samples for a model of any kind but the causal one. Text is real where the folder has a tokenizer."""
    if kind == "encoder-decoder":
        return _encoder_decoder(model, folder, tokenize, real_text)
    if kind == "text and image":
        return _text_and_image(model, folder, tokenize)
    samples, declared = _part(kind, model, model.config, folder, tokenize)
    return Inputs(samples, declared, {}, kind != "encoder" or not real_text)


def _part(kind: str, model: Any, config: Any, folder: Path, tokenize: Tokenize) -> tuple[list[Sample], dict[str, Any]]:
    makers: dict[str, Callable[[], tuple[list[Sample], dict[str, Any]]]] = {
        "encoder": lambda: _text(model, config, tokenize),
        "image": lambda: _images(config, folder),
        "sound": lambda: _sound(model, config),
    }
    return makers[kind]()


def _text(model: Any, config: Any, tokenize: Tokenize) -> tuple[list[Sample], dict[str, Any]]:
    names = ["input_ids", "attention_mask"]
    takes = inspect.signature(model.forward).parameters
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in takes:
        names.append("token_type_ids")
    longest = min(getattr(config, "max_position_embeddings", _LONGEST_TEXT) - _first_position(model), _LONGEST_TEXT)
    samples = [dict(zip(names, (ids, mask, torch.zeros_like(ids)), strict=False))
               for ids, mask in text_batches(tokenize, longest)]  # fmt: skip
    return samples, dict.fromkeys(names, ("batch", "sequence"))


def _first_position(model: nn.Module) -> int:
    """Rows of the table of positions that no token uses: some models number from the row after padding's own."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return max((row + 1 for row in padding if row is not None), default=0)


def _images(config: Any, folder: Path) -> tuple[list[Sample], dict[str, Any]]:
    height, width = _image_size(config, folder)
    random = torch.Generator().manual_seed(0)
    shape = (getattr(config, "num_channels", 3), height, width)
    samples = [{"pixel_values": torch.randn(batch, *shape, generator=random)} for batch in _BATCHES]
    return samples, {"pixel_values": ("batch", *shape)}


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    """Height and width: of the config, else what the folder's preprocessor makes, else 224."""
    size = getattr(config, "image_size", None)
    if size is None and (folder / "preprocessor_config.json").is_file():
        preprocessor = _preprocessor(folder)
        size = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(size, dict):
        size = (size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge"))
    size = size or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(height), int(width)


def _preprocessor(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = dict(read_json(folder / "preprocessor_config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise InputRefused("DT306", f"{folder}/preprocessor_config.json must be a JSON object (got: {error})"
                           ) from error  # fmt: skip
    return found


def _sound(model: Any, config: Any) -> tuple[list[Sample], dict[str, Any]]:
    """A waveform of free length where the config tells of convolutions over it, else a spectrogram of fixed size."""
    name = model.main_input_name
    random = torch.Generator().manual_seed(0)
    bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    shape: tuple[Dim, ...]
    if name == "input_values" and getattr(config, "conv_stride", None):
        lengths = [_SAMPLING_RATE * thirds // 3 for thirds in _SECONDS_THIRDS]
        samples = [{name: torch.randn(b, n, generator=random)} for b, n in zip(_BATCHES, lengths, strict=True)]
        return samples, {name: ("batch", "samples")}
    if name == "input_features" and bins and getattr(config, "max_source_positions", None):
        shape = (bins, 2 * config.max_source_positions)
    elif name == "input_values" and bins and frames:
        shape = (frames, bins)
    else:
        raise InputRefused("DT306", f"the config of {type(model).__name__} must tell the size of its sound (got "
                           "neither convolutions over it nor a spectrogram's size)",
                           fix="write a model file with samples of the inputs that it takes")  # fmt: skip
    samples = [{name: torch.randn(batch, *map(int, shape), generator=random)} for batch in _BATCHES]
    return samples, {name: ("batch", *shape)}


def _encoder_decoder(model: Any, folder: Path, tokenize: Tokenize, real_text: bool) -> Inputs:
    """One pass over a whole input and what was written so far, without a cache."""
    kind = {"input_ids": "encoder", "pixel_values": "image"}.get(model.main_input_name, "sound")
    samples, declared = _part(kind, model, getattr(model.config, "encoder", model.config), folder, tokenize)
    done = []
    for sample, written in zip(samples, _WRITTEN, strict=False):
        batch = len(sample[model.main_input_name])
        rows = torch.tensor(_cycle(tokenize, batch * written)).view(batch, written)
        done.append({**sample, "decoder_input_ids": rows})
    shapes = {**declared, "decoder_input_ids": ("batch", "written")}
    return Inputs(done, shapes, _without_cache(model), kind != "encoder" or not real_text)


def _text_and_image(model: Any, folder: Path, tokenize: Tokenize) -> Inputs:
    texts, text_shapes = _text(model, getattr(model.config, "text_config", model.config), tokenize)
    images, image_shapes = _images(model.config.vision_config, folder)
    by_size = {len(image["pixel_values"]): image for image in images}
    pairs = [{**text, **by_size[len(text["input_ids"])]} for text in texts if len(text["input_ids"]) in by_size]
    return Inputs(pairs, {**text_shapes, **image_shapes}, _without_cache(model), True)


def _cycle(tokenize: Tokenize, count: int) -> list[int]:
    """`count` ids of text, from its beginning again where it ends."""
    ids = tokenize(" ".join(sentences()[:8])) or [0]
    return (ids * (count // len(ids) + 1))[:count]


def _without_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
