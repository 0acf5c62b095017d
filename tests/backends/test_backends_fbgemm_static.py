"""Static int8 of convolutional networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from workshop import Workshop, cosine

pytest.importorskip("torch")

import torch
from torch import nn

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.fbgemm_static import PercentileObserver, is_mostly_convolution
from deploytool.errors import InputRefused


@pytest.mark.parametrize("calibration", ["histogram", "min-max", "percentile"])
def test_convolutions_become_int8_and_agree(workshop: Workshop, calibration: str) -> None:
    """Every way of calibrating must fold norm and ReLU, quantize both convolutions, and agree at other batch sizes."""
    request = workshop.request("conv", load_checked_target("fbgemm"), calibration=calibration)
    artifact = build_artifact(request, {})
    assert artifact.settings["scheme"] == "static" and artifact.settings["int8"] == {"ConvReLU2d": 1, "Conv2d": 1}
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("conv"):
            assert cosine(runner.run(feeds)["output"], workshop.reference("conv", feeds)["output"]) > 0.995


def test_ranges_follow_from_the_calibration_feeds(workshop: Workshop) -> None:
    """Calibrated on inputs a hundredth of the real size, the same model must be seen to be wrong."""
    request = workshop.request("conv", load_checked_target("fbgemm"))
    small = [{name: array * 0.01 for name, array in feeds.items()} for feeds in workshop.feeds("conv")]
    with open_artifact(build_artifact(replace(request, calibration=lambda: small), {})) as runner:
        feeds = workshop.feeds("conv")[1]
        assert cosine(runner.run(feeds)["output"], workshop.reference("conv", feeds)["output"]) < 0.9


def test_what_fx_cannot_trace_is_refused_or_left_dynamic(workshop: Workshop) -> None:
    """Static int8 of an encoder with recurrent layers must not be chosen by itself; asked for, the layer is named."""
    assert not is_mostly_convolution(workshop.source("encoder").module)
    assert workshop.artifact("encoder", "fbgemm").settings["scheme"] == "dynamic"


def test_control_flow_over_values_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    """A forward() that branches on a value cannot be traced by torch.fx: the refusal says so and what to set."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.conv(input) if input.sum() > 0 else self.conv(-input)

    source = workshop.source("conv")
    request = workshop.request("conv", load_checked_target("fbgemm"), scheme="static")
    with pytest.raises(InputRefused, match=r"torch\.fx") as caught:
        build_artifact(replace(request, source=replace(source, module=Branching().eval())), {})
    assert "dynamic" in caught.value.fix


def test_percentiles_leave_outliers_out() -> None:
    """One outlier among 100,000 values must stretch the plain range and not the percentile's."""
    values = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    values[7] = 1e6
    observer = PercentileObserver()
    assert observer(values) is values
    assert observer.max_val < 1.01


def test_nothing_to_quantize_dynamically_is_refused(workshop: Workshop) -> None:
    """Dynamic int8 of a model without linear or recurrent layers must not pass as an int8 artifact."""
    with pytest.raises(InputRefused) as caught:
        build_artifact(workshop.request("conv", load_checked_target("fbgemm"), scheme="dynamic"), {})
    assert caught.value.code == "DT310" and "static" in caught.value.fix
