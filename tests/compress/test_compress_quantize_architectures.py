"""AWQ and SmoothQuant on small random models of published architectures, none of which the code knows by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from deploytool.compress.quantize.awq import apply as awq  # noqa: E402
from deploytool.compress.quantize.smoothquant import apply as smooth  # noqa: E402
from deploytool.compress.quantize.tables import Awq, SmoothQuant  # noqa: E402
from deploytool.compress.step import Calibration, Context  # noqa: E402
from deploytool.load.causal_lm import CausalLM, causal_inputs, inputs_for  # noqa: E402
from deploytool.load.flat import FlatModule  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402
from deploytool.source import ModelRef, Source  # noqa: E402

COMMON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GATED = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 2}
# {model type: its settings, and how many of a block's linear layers have an input that one layer alone makes}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "llama": (GATED, 7), "qwen2": (GATED, 7), "gemma2": ({**GATED, "head_dim": 12}, 7), "mistral": (GATED, 7),
    "opt": ({**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 48}, 6),
    "gpt_neox": ({**COMMON, "intermediate_size": 96}, 2),
}  # fmt: skip


def _source(kind: str) -> Source:
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind][0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms that are not all ones, weights that matter
            parameter.data += 0.1 * torch.randn_like(parameter)
        ids = torch.randint(3, 60, (4, 2, 12))
    module = CausalLM(model).eval().requires_grad_(False)
    samples = [inputs_for(config, row, torch.ones_like(row)) for row in ids]
    inputs = tuple(
        TensorSpec(n, "float32" if len(s) == 4 else "int64", tuple(s)) for n, s in causal_inputs(config).items()
    )
    signature = Signature(inputs, (TensorSpec("logits", "float32", ("batch", "sequence", 60)),))
    flat = FlatModule(module, signature.input_names, signature.output_names)
    return Source(ModelRef("python", kind, ""), module, flat, signature, samples=lambda: iter(samples))


def _distance(one: Source, two: Source) -> float:
    with torch.no_grad():
        pairs = [(one.flat(*s.values())[0], two.flat(*s.values())[0]) for s in one.samples()]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_folding_finds_its_way(kind: str) -> None:
    """The layers that can be scaled must be, in every architecture, and the logits stay what they were."""
    source = _source(kind)
    context = Context(source, Calibration(), 0, lambda line: None)
    out, report = awq(source, Awq(step="awq", round=False, bits=3, group=16, include=("*layers.*",)), context)
    scaled = {entry["layer"] for entry in report["layers"] if entry["exponent"] is not None}
    assert len(scaled) == 2 * MODELS[kind][1], report["not_scaled"]
    assert _distance(source, out) < 1e-4
    smoothed, _ = smooth(source, SmoothQuant(step="smoothquant"), context)
    assert _distance(source, smoothed) < 1e-3
