"""Static int8 within a bound on the model's own metric."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from workshop import TINY, Workshop

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from deploytool.backends.base import build_artifact, load_checked_target
from deploytool.errors import InputRefused
from deploytool.source import ModelRef

# The metric falls with the distance from the model's own fp32 outputs: int8 loses some, and only fp32 loses nothing.
EVALUATE = '''

def evaluate(predict):
    module = build()
    with torch.inference_mode():
        error = max(float((predict(s)["output"] - module(s["input"])).abs().max()) for s in samples())
    return {"closeness": 1.0 - error}
'''


def test_layers_go_back_until_the_metric_is_kept(workshop: Workshop, tmp_path: Path) -> None:
    """A bound that full int8 breaks must leave fewer layers in int8 than no bound, and a wide one as many."""
    model = tmp_path / "mlp.py"
    model.write_text((TINY / "mlp.py").read_text() + EVALUATE)
    target, counts = load_checked_target("openvino-int8"), {}
    for drop in (None, 0.5, 0.002):
        request = workshop.request("mlp", target, **({} if drop is None else {"max_drop": drop}))
        artifact = build_artifact(replace(request, ref=ModelRef("python", "mlp", str(model))), {})
        counts[drop] = artifact.settings["quantizers"]
    assert counts[0.5] == counts[None] > counts[0.002]


def test_a_model_without_a_metric_is_refused(workshop: Workshop) -> None:
    """`max_drop` for a model that has no evaluate() must be refused with what to do."""
    request = workshop.request("mlp", load_checked_target("openvino-int8"), max_drop=0.01)
    with pytest.raises(InputRefused) as caught:
        build_artifact(replace(request, ref=ModelRef("python", "mlp", str(TINY / "mlp.py"))), {})
    assert caught.value.code == "DT313"
