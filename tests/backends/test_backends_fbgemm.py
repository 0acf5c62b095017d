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


def test_what_stays_fp32_is_said(workshop: Workshop) -> None:
    """A shared linear must count once, a weight read as a tensor not at all, and attention's projections be noted."""
    settings = workshop.artifact("encoder", "fbgemm").settings
    assert settings["int8"] == {"Linear": 4, "GRU": 1}  # linear1, linear2, twice, head
    assert "MultiheadAttention" in settings["note"]


def test_embeddings_become_smaller(workshop: Workshop) -> None:
    """With `embeddings` the tables must be stored in 8 bits, counted, and still agree."""
    plain = workshop.artifact("encoder", "fbgemm")
    artifact = build_artifact(workshop.request("encoder", load_checked_target("fbgemm"), embeddings=True), {})
    assert artifact.settings["int8"]["Embedding"] == 1
    assert artifact.size_bytes < plain.size_bytes
    feeds = workshop.feeds("encoder")[1]
    with open_artifact(artifact) as runner:
        assert cosine(runner.run(feeds)["logits"], workshop.reference("encoder", feeds)["logits"]) > 0.98
