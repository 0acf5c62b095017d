"""A Hugging Face folder or id: models of text, pictures and sound, and causal language models with their cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from deploytool.errors import DeployError, EnvironmentLacking, InputRefused
from deploytool.load.flat import FlatModule
from deploytool.load.hf_inputs import Inputs, NamedModel, inputs_of, kind_by_class
from deploytool.load.infer import Seen, infer_signature, refuse_non_finite
from deploytool.load.optimum_task import task_by_optimum
from deploytool.load.texts import Tokenize, tokenizer_of
from deploytool.source import Hooks, ModelRef, Source

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt",
                    "tokenizer.model", "generation_config.json", "preprocessor_config.json", "config.json")  # fmt: skip
_AS = {"encoder": "a text encoder", "causal": "a causal language model", "image": "an image model",
       "sound": "a model of sound", "encoder-decoder": "an encoder-decoder",
       "text and image": "a model of texts and images"}  # fmt: skip


def open_huggingface(ref: ModelRef) -> Source:
    """The Source of a folder with config.json, or of a hub id (cached, or fetched unless HF_HUB_OFFLINE is set)."""
    folder, config, task = _about(ref)
    model = _weights(transformers.AutoModelForCausalLM if task == "causal" else _class_of(config), folder)
    model.eval().requires_grad_(False)
    refuse_non_finite(model)
    try:
        module, inputs = _module(task, model, folder)
        module.eval()
        signature = infer_signature(module, inputs.samples, inputs.declared, inputs.seen)
    except DeployError:
        raise
    except Exception as error:  # models that want inputs of another kind fail in their own ways
        raise InputRefused("DT306", f"{type(model).__name__} must run as {_AS[task]} (got {type(error).__name__}: "
                           f"{str(error)[:300]})", fix="write a model file with samples of the inputs that it takes"
                           ) from error  # fmt: skip
    hooks = _hooks(task, config, folder)
    assets = tuple(folder / name for name in _TOKENIZER_FILES if (folder / name).is_file())
    return Source(
        ref=ref,
        module=module,
        flat=FlatModule(module, signature.input_names, signature.output_names),
        signature=signature,
        samples=lambda: iter(inputs.samples),
        seen=inputs.seen,
        evaluate=hooks.evaluate,
        lower_is_better=hooks.lower_is_better,
        prompts=hooks.prompts,
        assets=assets,
        synthetic=inputs.synthetic,
        notes=hooks.notes,
        dependencies=tuple(sorted(p for p in folder.iterdir() if p.is_file())),
    )


def huggingface_hooks(ref: ModelRef) -> Hooks:
    """How the model is measured; its weights are not read."""
    folder, config, task = _about(ref)
    return _hooks(task, config, folder)


def _about(ref: ModelRef) -> tuple[Path, Any, str]:
    """Folder, configuration and task."""
    folder = Path(ref.path) if Path(ref.path).is_dir() else _fetch(ref.path)
    config = _read(lambda: transformers.AutoConfig.from_pretrained(folder), folder)
    return folder, config, infer_task(config)


def _hooks(task: str, config: Any, folder: Path) -> Hooks:
    if task != "causal":
        return Hooks()
    from deploytool.load.held_out import held_out  # see _module

    text = held_out(config, folder)
    return Hooks() if text is None else text.hooks()


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
    """ "causal", "encoder", "image", "sound", "encoder-decoder" or "text and image".

    From the class that the config names and the inputs that it takes, else as Optimum would say: it (the extra
    `optimum`) is asked only about what these rules do not know, and only where it is installed.
    """
    architecture = (config.architectures or ["?"])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    kind = getattr(transformers, architecture, None)
    if kind is not None and (found := kind_by_class(kind, config)):
        return found
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        return "image"
    if task := task_by_optimum(config):
        return task
    if hasattr(config, "vocab_size") and not getattr(config, "is_encoder_decoder", False):
        return "encoder"
    raise InputRefused("DT306", f"the model must be {', '.join(_AS.values())} (got {architecture})",
                       fix="name its class in config.json (`architectures`), or write a model file for it; with "
                       "`pip install 'deploytool[optimum]'` more kinds are told apart")  # fmt: skip


def _module(task: str, model: Any, folder: Path) -> tuple[nn.Module, Inputs]:
    own = tokenizer_of(folder)
    tokenize, real = own or _random_ids(model), own is not None
    if task != "causal":
        inputs = inputs_of(task, model, folder, tokenize, real)
        return NamedModel(model, inputs.settings), inputs
    from deploytool.load import causal_lm  # it brings generation code, seconds of imports, which an encoder lacks

    module = causal_lm.CausalLM(model)
    module.eval()
    seen: Seen = {}
    samples = causal_lm.causal_samples(module, tokenize, seen)
    return module, Inputs(samples, causal_lm.causal_inputs(model.config), {}, not real, seen)


def _random_ids(model: Any) -> Tokenize:
    """Seeded random ids where the folder has no tokenizer; the source says synthetic then."""
    random = torch.Generator().manual_seed(0)
    size = getattr(model.config.get_text_config(decoder=True), "vocab_size", 2)
    return lambda text: torch.randint(size, (max(4, len(text) // 4),), generator=random).tolist()


def _class_of(config: Any) -> Any:
    """The class that the config names, so that a classifier keeps its head; AutoModel when it names none."""
    architecture = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:  # AutoModel would open it without its head, and not say so
        raise InputRefused("DT306", f"config.json must name a class of transformers {transformers.__version__} "
                           f"(got {architecture!r})", fix="correct `architectures`, install the release of "
                           "transformers that has the class, or write a model file for it")  # fmt: skip
    return kind


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
