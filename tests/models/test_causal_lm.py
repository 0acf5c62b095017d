"""The wrapper with the flat cache, over the families of language models: small ones with seeded random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the architectures come with transformers")

import transformers

from deploytool.errors import InputRefused
from deploytool.load.causal_lm import CausalLM, causal_inputs, causal_samples, inputs_for

GROUPED = {"num_key_value_heads": 2}
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral, sliding": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2, softcap, both kinds": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gemma3, sliding": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", {}),
    "gpt-neox": ("GPTNeoXConfig", {}),
}


@pytest.fixture(params=list(FAMILIES))
def plain(request: pytest.FixtureRequest) -> nn.Module:
    """A small transformers model of a family, in eval mode."""
    name, special = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **special)
    attention = "eager" if "softcap" in request.param else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()  # type: ignore[no-any-return]


def _text() -> tuple[Tensor, Tensor]:
    """Two rows of 20 tokens, the second with 3 of padding at the left."""
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def test_two_steps_through_the_cache_equal_one_plain_pass(plain: Any) -> None:
    """11 tokens, then 9 with the cache, must give the logits that transformers gives for the 20 at once."""
    ids, mask = _text()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        whole = plain(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        wrapped = CausalLM(plain)
        first = wrapped(**inputs_for(plain.config, ids[:, :11], mask[:, :11]))
        second = wrapped(**inputs_for(plain.config, ids[:, 11:], mask, first))
    got = torch.cat([first["logits"], second["logits"]], dim=1)
    torch.testing.assert_close(got[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-5)
    assert second["present.0.key"].shape[2] == 20
    assert torch.equal(second["present.1.value"][:, :, :11], first["present.1.value"])


def test_wrapping_leaves_the_model_right_by_itself(plain: Any) -> None:
    """The wrapped model must give, without its wrapper, the logits that it gave before it was wrapped."""
    ids, mask = _text()
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.inference_mode():
        before = plain(**feeds).logits
        CausalLM(plain)
        for chosen in (feeds, {"input_ids": ids[:1]}):
            after = plain(**chosen).logits
            valid = mask[: len(after)].bool()
            torch.testing.assert_close(after[valid], before[: len(after)][valid], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_decoding_step_is_right_at_every_shape(plain: Any, positional: Any) -> None:
    """Traced at one row, 128 past and one new token, it must agree on prefill, padded batches and mixtures."""
    module = CausalLM(plain)
    samples = causal_samples(module, lambda text: [3 + ord(c) % 90 for c in text])
    assert {tuple(causal_inputs(plain.config)) for _ in samples} == {tuple(s) for s in samples}
    adapter = positional(module, list(samples[0])).eval()
    with torch.inference_mode():
        traced = torch.jit.trace(adapter, tuple(samples[0].values()), check_trace=False)
        for sample in samples:
            for got, wanted in zip(traced(*sample.values()), adapter(*sample.values()), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_wrapping_keeps_eval_mode() -> None:
    """A wrapper of an evaluated model must be in eval mode itself, so that train() is never called by accident."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **GROUPED)).eval()
    assert not any(part.training for part in CausalLM(model).modules())


def test_padding_never_makes_a_row_without_scores() -> None:
    """Rows that are padding throughout must give finite numbers, in single and in half precision."""
    ids, mask = _text()
    mask[1] = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = (
            transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **GROUPED)).eval().to(dtype)
        )
        with torch.inference_mode():
            outputs = CausalLM(model)(**inputs_for(model.config, ids, mask, dtype=dtype))
        assert all(bool(torch.isfinite(value).all()) for value in outputs.values())


def test_other_kinds_of_layers_are_refused() -> None:
    """A model with layers that keep another state than keys and values must be refused by name, not run wrong."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **GROUPED))
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputRefused, match="linear_attention"):
        CausalLM(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_either_exporter_gives_an_onnx_file_right_at_every_shape(dynamo: bool, positional: Any, tmp_path: Path) -> None:
    """Exported from one decoding step, the file must agree in ONNX Runtime on prefill and padded batches."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, **GROUPED)).eval()
    module = CausalLM(plain)
    samples = causal_samples(module, lambda text: [3 + ord(c) % 90 for c in text])
    adapter = positional(module, list(samples[0])).eval()
    axes = {
        name: {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in causal_inputs(plain.config).items()
    }
    free = {"dynamic_shapes": (tuple(axes.values()),)} if dynamo else {"dynamic_axes": axes}
    torch.onnx.export(
        adapter, tuple(samples[0].values()), str(tmp_path / "model.onnx"), dynamo=dynamo, opset_version=18,
        input_names=list(samples[0]), output_names=list(module(**samples[0])), verbose=False, **free,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for sample in samples:
        feeds = {name: value.numpy() for name, value in sample.items()}
        for got, wanted in zip(session.run(None, feeds), module(**sample).values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-5)
