"""Prefill and decoding timed apart."""

from __future__ import annotations

import pytest

from deploytool.bench.decoding import summarize_decoding, told


def test_rates_and_ratios_are_of_the_parts() -> None:
    """Tokens per second come from the median round, ratios from each round's pair, prefill and decoding apart."""
    own = [{"prefill": 0.5, "decode": 2.0}, {"prefill": 0.5, "decode": 1.0}, {"prefill": 1.0, "decode": 1.0}]
    other = [{"prefill": 1.0, "decode": 8.0}, {"prefill": 0.5, "decode": 3.0}, {"prefill": 4.0, "decode": 3.0}]
    found = summarize_decoding({"ort": own, "eager": other}, prompt=128, new=64)
    assert found["decode_tokens_per_s"] == 64
    assert found["prefill_tokens_per_s"] == 256
    assert found["against"]["eager"]["decode_speedup"] == pytest.approx(3.0)
    assert found["against"]["eager"]["prefill_speedup"] == pytest.approx(2.0)
    assert found["against"]["eager"]["decode_speedup_range"] == pytest.approx([3.0, 4.0])
    assert found["against"]["eager"]["prefill_speedup_range"] == pytest.approx([1.0, 4.0])
    assert "eager 3.00x (rounds 3.00 to 4.00) and 2.00x (rounds 1.00 to 4.00)" in told(found)
