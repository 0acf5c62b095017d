"""A tiny causal language model in transformers' form, with random weights and a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

SIZE = 128
CONFIG = {"vocab_size": SIZE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip


def characters(begins: bool = False) -> Any:
    """The tokenizer; with 1 before every text where it `begins` so."""
    words = {"[UNK]": 0, "[BOS]": 1, **{chr(code): code for code in range(2, SIZE)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    if begins:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return made


def save(path: Path) -> Path:
    """The folder, as a user would save it."""
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    with torch.no_grad():  # far from the tiny initial values, with which every text is as likely
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    module.save_pretrained(path)
    characters().save(str(path / "tokenizer.json"))
    return path
