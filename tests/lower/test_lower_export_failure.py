"""Why a module has no graph: the first cause, the user's own line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from deploytool.backends.exported import export_module  # noqa: E402
from deploytool.errors import InputRefused  # noqa: E402
from deploytool.lower.export_failure import reason  # noqa: E402
from deploytool.lower.onnx import lower_onnx  # noqa: E402


class Branches(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x + 1
        return x - 1


class Loops(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        for _ in range(int(x[0, 0].abs()) + 1):
            x = x.tanh()
        return x


class Refuses(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        raise ValueError("there must be no such\nmodule")


def source_of(make_source: Callable[..., Any], module: Any) -> Any:
    class Runs(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    source = make_source(Runs(), {"x": ("b", 4)}, {"y": ("b", 4)}, [(torch.ones(2, 4),)])
    source.flat.module = module
    return source


@pytest.mark.parametrize(("module", "code"), [(Branches, "if x.sum() > 0:"), (Loops, "for _ in range(int(x[0, 0]")])
def test_control_flow_by_values_is_named(
    module: Any, code: str, make_source: Callable[..., Any], tmp_path: Path
) -> None:
    """Both exporters of torch.export must name the file, the line and its code, and say what to write there."""
    source = source_of(make_source, module())
    with pytest.raises(InputRefused) as lowered:
        lower_onnx(source, tmp_path / "out", exporter="dynamo")
    with pytest.raises(InputRefused) as exported:
        export_module(source.flat, source.signature, (torch.ones(2, 4),))
    for said in (lowered.value.detail[0], exported.value.message):
        assert "depends on values of the inputs" in said and f"{Path(__file__).name}:" in said and code in said
        assert "Refer to" not in said and "TORCH_LOGS" not in said
    assert "torch.cond" in lowered.value.fix and lowered.value.fix == exported.value.fix


def test_other_failures_keep_their_words(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """What the module itself raises must be told whole, in one line, with its place; no advice on branches."""
    source = source_of(make_source, Refuses())
    for exporter in ("dynamo", "torchscript"):
        with pytest.raises(InputRefused) as caught:
            lower_onnx(source, tmp_path / "out", exporter=exporter)
        said = caught.value.detail[0]
        assert "ValueError: there must be no such module, at " in said and "raise ValueError" in said
        assert "torch.cond" not in caught.value.fix


def test_the_first_cause_is_told() -> None:
    """Of errors that stand for others, only the first says what is wrong; without a place there is none."""
    error = RuntimeError("see the trace")
    error.__cause__ = KeyError("what was not there")
    assert reason(error) == "KeyError: 'what was not there'"
