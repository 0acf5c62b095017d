"""A Hugging Face folder or id: text encoders, causal language models, image models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from deploytool.errors import DeployError, EnvironmentLacking, InputRefused
from deploytool.load.flat import FlatModule
from deploytool.load.infer import Declared, infer_signature, refuse_non_finite
from deploytool.load.optimum_task import task_by_optimum
from deploytool.load.texts import Tokenize, text_batches, tokenizer_of
from deploytool.source import ModelRef, Source
from deploytool.storage import read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt",
                    "tokenizer.model", "generation_config.json", "preprocessor_config.json", "config.json")  # fmt: skip
_IMAGE_BATCHES = (1, 2, 3, 5)
_AS = {"encoder": "a text encoder", "causal": "a causal language model", "image": "an image model"}


def open_huggingface(ref: ModelRef) -> Source:
    """The Source of a folder with config.json, or of a hub id (cached, or fetched unless HF_HUB_OFFLINE is set)."""
    folder = Path(ref.path) if Path(ref.path).is_dir() else _fetch(ref.path)
    config = _read(lambda: transformers.AutoConfig.from_pretrained(folder), folder)
    task = infer_task(config)
    model = _weights(_CLASSES[task](config), folder)
    model.eval().requires_grad_(False)
    refuse_non_finite(model)
    try:
        module, samples, declared = _PARTS[task](model, folder)
        module.eval()
        signature = infer_signature(module, samples, declared)
    except DeployError:
        raise
    except Exception as error:  # models that want inputs of another kind fail in their own ways
        raise InputRefused("DT306", f"{type(model).__name__} must run as {_AS[task]} (got {type(error).__name__}: "
                           f"{str(error)[:300]})", fix="write a model file with samples of the inputs that it takes"
                           ) from error  # fmt: skip
    assets = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    return Source(
        ref=ref,
        module=module,
        flat=FlatModule(module, signature.input_names, signature.output_names),
        signature=signature,
        samples=lambda: iter(samples),
        assets=assets,
        synthetic=task == "image" or tokenizer_of(folder) is None,
        dependencies=tuple(sorted(p for p in folder.iterdir() if p.is_file())),
    )


def _weights(kind: Any, folder: Path) -> Any:
    """The model with the folder's weights; refused when some are missing, which transformers would make up."""
    # Attention is left to transformers: it takes torch's where the model can, and refuses to be told where it cannot.
    model, info = _read(lambda: kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True), folder)
    if missing := sorted(info["missing_keys"]):
        raise InputRefused("DT306", f"{folder} must hold every weight of {type(model).__name__} "
                           f"({len(missing)} are missing)", detail=missing[:10],
                           fix="save the model again, or name in config.json the architecture that was saved"
                           )  # fmt: skip
    return model


def infer_task(config: Any) -> str:
    """ "causal", "encoder" or "image": from the architecture that the config names, else as Optimum would say.

    Optimum (the extra `optimum`) is asked only about what these rules do not know, and only where it is installed.
    """
    architecture = (config.architectures or ["?"])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise InputRefused("DT306", f"the model must be an encoder, a causal language model or an image model "
                           f"(got {architecture}, an encoder-decoder)",
                           fix="write a model file whose module wraps the part to deploy")  # fmt: skip
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        return "image"
    if hasattr(config, "vocab_size") and config.architectures:
        return "encoder"
    if task := task_by_optimum(config):
        return task
    if hasattr(config, "vocab_size"):
        return "encoder"
    raise InputRefused("DT306", "the model must be an encoder, a causal language model or an image model "
                       f"(got {architecture})", fix="write a model file for it; with `pip install "
                       "'deploytool[optimum]'` more kinds are told apart")  # fmt: skip


class NamedModel(nn.Module):
    """A Hugging Face model that returns its output tensors by name and nothing else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **feeds: Tensor) -> dict[str, Tensor]:
        """Takes the model's inputs by name; returns its tensors, e.g. last_hidden_state [batch, sequence, width]."""
        outputs = self.model(**feeds, return_dict=True)
        return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _encoder(model: Any, folder: Path) -> tuple[nn.Module, list[dict[str, Tensor]], Declared]:
    names = ["input_ids", "attention_mask"]
    if getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    limit = min(getattr(model.config, "max_position_embeddings", 512), 512)
    batches = text_batches(_tokenize(model, folder), limit)
    samples = [dict(zip(names, (ids, mask, torch.zeros_like(ids)), strict=False)) for ids, mask in batches]
    return NamedModel(model), samples, dict.fromkeys(names, ("batch", "sequence"))


def _causal(model: Any, folder: Path) -> tuple[nn.Module, list[dict[str, Tensor]], Declared]:
    from deploytool.load import causal_lm  # it brings generation code, seconds of imports, which an encoder lacks

    module = causal_lm.CausalLM(model)
    module.eval()
    return module, causal_lm.causal_samples(module, _tokenize(model, folder)), causal_lm.causal_inputs(model.config)


def _image(model: Any, folder: Path) -> tuple[nn.Module, list[dict[str, Tensor]], Declared]:
    height, width = _image_size(model.config, folder)
    random = torch.Generator().manual_seed(0)
    shape = (model.config.num_channels, height, width)
    samples = [{"pixel_values": torch.randn(batch, *shape, generator=random)} for batch in _IMAGE_BATCHES]
    return NamedModel(model), samples, {"pixel_values": ("batch", *shape)}


def _image_size(config: Any, folder: Path) -> tuple[int, int]:
    """Height and width: of the config, else what the folder's preprocessor makes, else 224."""
    size = getattr(config, "image_size", None)
    if size is None and (folder / "preprocessor_config.json").is_file():
        preprocessor = _read(lambda: read_json(folder / "preprocessor_config.json"), folder)
        size = preprocessor.get("crop_size") or preprocessor.get("size")
    if isinstance(size, dict):
        size = (size.get("height") or size.get("shortest_edge"), size.get("width") or size.get("shortest_edge"))
    size = size or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(height), int(width)


def _tokenize(model: Any, folder: Path) -> Tokenize:
    """Real text where the folder has a tokenizer, else seeded random ids (then the source says synthetic)."""
    tokenizer = tokenizer_of(folder)
    if tokenizer is not None:
        return tokenizer
    random = torch.Generator().manual_seed(0)
    return lambda text: torch.randint(model.config.vocab_size, (max(4, len(text) // 4),), generator=random).tolist()


def _encoder_class(config: Any) -> Any:
    """The class that the config names, so that a classifier keeps its head; AutoModel when it is unknown."""
    return getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)


_CLASSES: dict[str, Callable[[Any], Any]] = {
    "causal": lambda config: transformers.AutoModelForCausalLM,
    "encoder": _encoder_class,
    "image": _encoder_class,
}
_PARTS: dict[str, Callable[[Any, Path], tuple[nn.Module, list[dict[str, Tensor]], Declared]]] = {
    "causal": _causal,
    "encoder": _encoder,
    "image": _image,
}


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # only when something remote was named

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, local_files_only=offline))
    except Exception as error:
        raise EnvironmentLacking("DT401", f"{hub_id!r} must be in the local hub cache or reachable "
                                 f"(got {type(error).__name__})",
                                 fix="download the folder and name its path") from error  # fmt: skip


def _read(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError ... for bad folders
        last = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise InputRefused("DT306", f"{folder} must hold a model that transformers can read "
                           f"(got {type(error).__name__}: {last})") from error  # fmt: skip
