"""Modules that dynamic quantization can break."""

from __future__ import annotations

import pytest
from workshop import Workshop, cosine

pytest.importorskip("torch")

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact


@pytest.mark.parametrize("name", ["torchscript", "fbgemm"])
def test_hard_modules_agree_at_every_shape(workshop: Workshop, name: str) -> None:
    """An encoder layer with a fast path, tied and shared weights and a GRU must trace, and hold at other shapes."""
    target = load_checked_target(name)
    with open_artifact(workshop.artifact("encoder", name)) as runner:
        for feeds in workshop.feeds("encoder"):
            reference = workshop.reference("encoder", feeds)
            assert cosine(runner.run(feeds)["logits"], reference["logits"]) >= target.parity.cosine_min


def test_fused_attention_becomes_int8(workshop: Workshop) -> None:
    """The projections inside torch's encoder layer are linears of their own, a shared one counts once."""
    artifact = build_artifact(workshop.request("encoder", load_checked_target("fbgemm"), keep_fp32=0), {})
    # q, k, v, out_proj, linear1, linear2, twice, head; the weight that is read as a tensor stays
    assert artifact.settings["int8"] == {"Linear": 8, "GRU": 1}
    assert artifact.settings["unfused"] == ["layer"] and "note" not in artifact.settings
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("encoder"):
            assert cosine(runner.run(feeds)["logits"], workshop.reference("encoder", feeds)["logits"]) > 0.999


def test_what_stays_fp32_is_said(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that has no form of plain linears is named with the reason, and the rest becomes int8."""
    source = workshop.source("encoder")
    monkeypatch.setattr(source.module.layer.self_attn, "add_zero_attn", True)
    settings = build_artifact(workshop.request("encoder", load_checked_target("fbgemm")), {}).settings
    assert settings["int8"] == {"Linear": 4, "GRU": 1} and "unfused" not in settings
    assert "layer: add_bias_kv and add_zero_attn" in settings["note"]


def test_what_is_inside_an_excluded_module_stays(workshop: Workshop) -> None:
    """`exclude` keeps a named module with all that it holds, also what only unfusing makes a module."""
    target = load_checked_target("fbgemm")
    target = target.model_copy(update={"build": {**target.build, "keep_fp32": 0}})
    whole = build_artifact(workshop.request("encoder", target, exclude=["module.layer", "module.gru"]), {}).settings
    assert whole["int8"] == {"Linear": 2}  # twice, head
    part = build_artifact(workshop.request("encoder", target, exclude=["module.layer.self_attn.q"]), {}).settings
    assert part["int8"] == {"Linear": 7, "GRU": 1}


def test_embeddings_become_smaller(workshop: Workshop) -> None:
    """With `embeddings` the tables must be stored in 8 bits, counted, and still agree."""
    plain, artifact = (
        build_artifact(workshop.request("encoder", load_checked_target("fbgemm"), keep_fp32=0, embeddings=on), {})
        for on in (False, True)
    )
    assert artifact.settings["int8"]["Embedding"] == 1
    assert artifact.size_bytes < plain.size_bytes
    feeds = workshop.feeds("encoder")[1]
    with open_artifact(artifact) as runner:
        assert cosine(runner.run(feeds)["logits"], workshop.reference("encoder", feeds)["logits"]) > 0.98
