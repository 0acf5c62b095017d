"""A small Llama with grouped keys, a tied head and its cache as flat tensors; batches are padded at the left."""

import torch
import transformers
from torch import Tensor, nn

from deploytool.load.causal_lm import CausalLM, causal_inputs, causal_samples

CONFIG = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
INPUTS = causal_inputs(CONFIG)


def build() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return CausalLM(model).eval()


def samples() -> list[dict[str, Tensor]]:
    """A decoding step after 128 tokens, prompts, several tokens after a past, several rows."""
    module = build()
    assert isinstance(module, CausalLM)
    return causal_samples(module, lambda text: [ord(letter) % 64 for letter in text])
