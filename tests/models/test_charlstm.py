"""The character LSTM on held-out text, and its ONNX export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

Source = Callable[[str], ModuleType]
Model = Callable[[str], nn.Module]


def test_held_out_text_takes_few_bits(source: Source, model: Model) -> None:
    """Held-out text must take less than 2.2 bits per character (6.6 when all are as likely), its windows' mean."""
    module, told = model("charlstm"), dict[str, list[float]]()
    with torch.inference_mode():
        found = source("charlstm").evaluate(lambda feeds: module(**feeds), told.__setitem__)
    assert found["bits_per_char"] < 2.2
    scores = told["bits_per_char"]
    assert len(scores) > 100 and sum(scores) / len(scores) == pytest.approx(found["bits_per_char"])
    assert min(scores) < found["bits_per_char"] < max(scores)


def test_held_out_text_is_not_trained_on(source: Source) -> None:
    """No held-out paragraph may be in the training text, however its lines are broken."""
    train, test = ("".join(source("charlstm").CHARACTERS[i] for i in part) for part in source("charlstm")._text())
    assert len(train) > 200_000 and len(test) > 20_000
    words = " ".join(train.split())
    assert not [paragraph for paragraph in test.split("\n\n") if " ".join(paragraph.split()) in words]


def test_the_past_alone_decides(source: Source, model: Model) -> None:
    """Logits of a prefix must not depend on what follows it."""
    tokens = next(iter(source("charlstm").samples()))["tokens"]
    with torch.inference_mode():
        whole, prefix = model("charlstm")(tokens)["logits"], model("charlstm")(tokens[:, :9])["logits"]
    torch.testing.assert_close(whole[:, :9], prefix, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_onnx_export_is_right_at_every_shape(source: Source, model: Model, positional: Any, tmp_path: Path) -> None:
    """Exported by tracing at the timing sample's shape, it must agree in ONNX Runtime on all samples."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    samples = list(source("charlstm").samples())
    adapter = positional(model("charlstm"), ["tokens"]).eval()
    torch.onnx.export(
        adapter, tuple(samples[0].values()), str(tmp_path / "model.onnx"), dynamo=False, opset_version=18,
        input_names=["tokens"], output_names=["logits"], dynamic_axes={"tokens": {0: "batch", 1: "sequence"}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for sample in samples:
        got = session.run(None, {"tokens": sample["tokens"].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), model("charlstm")(**sample)["logits"], rtol=1e-4, atol=1e-4)
