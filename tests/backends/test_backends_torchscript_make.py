"""Scripts of modules that decide by values: the trace is wrong there, and must be noticed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import TINY, Workshop, cosine

torch = pytest.importorskip("torch")

from deploytool.backends.base import Request, build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.cut import open_cuts  # noqa: E402
from deploytool.backends.eager import ModuleRunner, as_tuple  # noqa: E402
from deploytool.backends.torchscript_make import quiet_jit, save_script  # noqa: E402
from deploytool.cases import Case  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused  # noqa: E402
from deploytool.load.flat import no_fast_path  # noqa: E402
from deploytool.load.model import open_source  # noqa: E402
from deploytool.source import ModelRef  # noqa: E402

FREE = """
import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", 16)}

def turned(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        return x
    return -2 * x

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x: Tensor):
        return self.layer(turned(x)), turned(x).sum(1)

def build():
    torch.manual_seed(0)
    return Model().eval()

def samples():
    return [{"x": torch.ones(2, 16)}, {"x": -torch.ones(3, 16)}]
"""


TWICE = """
import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", 16)}

class Gate(nn.Module):
    def forward(self, x: Tensor):
        if bool(x.sum() > 0):
            return x
        return -2 * x

def small(x: Tensor) -> Tensor:
    return x if bool(x.abs().max() < 9) else x / 9

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = self.second = Gate()

    def forward(self, x: Tensor):
        return self.second(self.first(small(x)) - 7)

def build():
    return Model().eval()

def samples():
    return [{"x": torch.ones(2, 16)}, {"x": -torch.ones(3, 16)}]
"""


MASKED = """
import torch
from torch import nn

INPUTS = {"x": ("batch", 5, 8), "mask": (5, 5)}
CAUSAL = torch.triu(torch.ones(5, 5), 1) > 0

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x, mask):
        return self.encoder(x, mask=mask)

def build():
    torch.manual_seed(0)
    return Model().eval()

def samples():
    torch.manual_seed(1)
    return [{"x": torch.randn(2, 5, 8), "mask": CAUSAL}, {"x": torch.randn(3, 5, 8), "mask": torch.zeros(5, 5) > 0}]
"""


def worst(workshop: Workshop, target: str, **build: Any) -> tuple[float, dict[str, Any]]:
    """The smallest cosine over samples and outputs, and the artifact's settings."""
    artifact = build_artifact(workshop.request("branching", load_checked_target(target), **build), {})
    with open_artifact(artifact) as runner:
        pairs = [(runner.run(feeds), workshop.reference("branching", feeds)) for feeds in workshop.feeds("branching")]
    return min(cosine(got[k], right[k]) for got, right in pairs for k in right), dict(artifact.settings)


@pytest.mark.parametrize(("target", "least"), [("torchscript", 0.999999), ("fbgemm", 0.999)])
def test_what_decides_by_values_is_compiled(target: str, least: float, workshop: Workshop) -> None:
    """All ways of a branch and a loop must be in the artifact, fp32 and int8, and settings name what was compiled."""
    found, settings = worst(workshop, target)
    assert found > least
    assert settings["made_by"] == "script" and settings["scripted"] == ["chooser"]
    if target == "fbgemm":
        assert settings["int8"] == {"Linear": 3}


def test_the_trace_alone_is_wrong(workshop: Workshop) -> None:
    """The samples must tell the ways apart: a trace, asked for, gives other outputs and claims nothing of lines."""
    found, settings = worst(workshop, "torchscript", method="trace")
    assert found < 0.99 and settings["made_by"] == "trace"
    assert "fixed_by_trace" not in settings


def test_a_right_trace_is_taken(workshop: Workshop) -> None:
    """Models without such code must be traced as ever; "script" compiles them too where it can, with equal outputs."""
    target = load_checked_target("torchscript")
    assert workshop.artifact("encoder", "torchscript").settings["made_by"] == "trace"
    artifact = build_artifact(workshop.request("conv", target, method="script"), {})
    assert artifact.settings["made_by"] == "script" and artifact.settings["scripted"] == [""]
    feeds = workshop.feeds("conv")[1]
    with open_artifact(artifact) as runner:
        assert cosine(runner.run(feeds)["output"], workshop.reference("conv", feeds)["output"]) > 0.999999


def _written(workshop: Workshop, folder: Path, old: str, new: str) -> Request:
    """A request for the branching model with other code."""
    text = (TINY / "branching.py").read_text()
    assert old in text
    (folder / "other.py").write_text(text.replace(old, new))
    source = open_source(ModelRef("python", "other", str(folder / "other.py")))
    return replace(workshop.request("branching", load_checked_target("torchscript")), source=source)


def test_what_cannot_be_compiled_is_refused_by_its_line(workshop: Workshop, tmp_path: Path) -> None:
    """Where neither way is right, the error must name file, line and code that decide, and what torch says of each."""
    request = _written(workshop, tmp_path, "torch.tanh(y + x)", "(lambda z: torch.tanh(z))(y + x)")
    with pytest.raises(InputRefused, match=r"other\.py:\d+: `if bool\(x\.sum\(\) > 0\):` decides") as refused:
        build_artifact(request, {})
    told = "\n".join(refused.value.detail)
    assert refused.value.code == "DT310"
    assert "other.py" in told and "torch.jit.trace: output" in told and "torch.jit.script of chooser" in told


def test_a_script_that_differs_is_refused(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled is held against the module too: code that takes another way in scripts must not pass."""
    request = _written(workshop, tmp_path, "y = self.warm(x)",
                       "y = self.cold(x) if torch.jit.is_scripting() else self.warm(x)")  # fmt: skip
    with pytest.raises(InputRefused, match="decides by values") as refused:
        build_artifact(request, {})
    assert any("torch.jit.script of chooser: output" in line for line in refused.value.detail)


def _saved(workshop: Workshop, folder: Path, text: str) -> dict[str, Any]:
    """What save_script says of a model of this text; its script must equal the module on all feeds."""
    (folder / "free.py").write_text(text)
    source = open_source(ModelRef("python", "free", str(folder / "free.py")))
    feeds = [{name: tensor.numpy() for name, tensor in sample.items()} for sample in source.samples()]
    request = replace(workshop.request("branching", load_checked_target("torchscript")), source=source,
                      signature=source.signature, calibration=lambda: feeds, cases=lambda: feeds)  # fmt: skip
    made = save_script(source.flat, request, "auto", request.out / "model.pt")
    with quiet_jit():
        script = torch.jit.load(str(request.out / "model.pt"))
    for one in feeds:
        given = [torch.from_numpy(one[name]) for name in source.signature.input_names]
        with torch.no_grad(), no_fast_path():
            for got, right in zip(as_tuple(script(*given)), as_tuple(source.flat(*given)), strict=True):
                assert np.allclose(got, right, atol=1e-5)
    return made


@pytest.mark.parametrize("asks", [
    "bool(x.sum() > 0)", "torch.equal(x, x.abs())", "torch.allclose(x, x.abs())",
    "torch.is_nonzero(torch.relu(x).sum())",
])  # fmt: skip
def test_helpers_outside_of_classes_are_compiled_with_the_model(tmp_path: Path, workshop: Workshop, asks: str) -> None:
    """Where no module's code holds the lines that decide, warned of or not, the whole model is compiled."""
    assert _saved(workshop, tmp_path, FREE.replace("bool(x.sum() > 0)", asks))["scripted"] == [""]


def test_a_module_at_two_places_is_compiled_at_both(tmp_path: Path, workshop: Workshop) -> None:
    """The second call of a module must not stay a trace of one way; what is still traced must be told by its line."""
    made = _saved(workshop, tmp_path, TWICE)
    assert made["scripted"] == ["first", "second"]
    (line,) = made["fixed_by_trace"]
    assert "return x if bool(x.abs().max() < 9)" in line


STRICT = """
import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", 16)}

class Model(nn.Module):
    def forward(self, x: Tensor):
        if bool(x.max() > 5):
            raise ValueError("x must be small")
        return x if bool(x.sum() > 0) else -2 * x

def build():
    return Model().eval()

def samples():
    return [{"x": torch.ones(2, 16)}, {"x": -torch.ones(3, 16)}]
"""


def test_what_a_model_raises_is_a_backend_failure(tmp_path: Path, workshop: Workshop) -> None:
    """An error of the model's own must be told as one, live and compiled, where torch gives it a class of its own."""
    assert _saved(workshop, tmp_path, STRICT)["scripted"] == [""]
    source = open_source(ModelRef("python", "free", str(tmp_path / "free.py")))
    with quiet_jit():
        script = torch.jit.script(source.module)
    for module in (source.flat, script):
        with pytest.raises(BackendFailed) as failed:
            ModuleRunner(module, source.signature).run({"x": np.full((2, 16), 9, np.float32)})
        assert "x must be small" in str(failed.value)


def test_torchs_own_code_decides_by_values(tmp_path: Path, workshop: Workshop) -> None:
    """torch looks whether a mask is the causal one: where masks differ the model is compiled, else the line named."""
    assert _saved(workshop, tmp_path, MASKED)["scripted"] == [""]
    alike = _saved(workshop, tmp_path, MASKED.replace("torch.zeros(5, 5) > 0", "CAUSAL"))
    assert alike["made_by"] == "trace"
    assert any("transformer.py" in line and "torch's own" in line for line in alike["fixed_by_trace"])


def test_the_model_is_left_as_it_was(workshop: Workshop) -> None:
    """Compiling must not leave scripts in the live module."""
    source = workshop.source("branching")
    before = [type(module) for module in source.flat.modules()]
    build_artifact(workshop.request("branching", load_checked_target("torchscript")), {})
    assert [type(module) for module in source.flat.modules()] == before


def test_bisect_refuses_a_graph_with_branches(workshop: Workshop, tmp_path: Path) -> None:
    """A compiled graph holds blocks that cannot be cut: said, not tried."""
    Case(workshop.feeds("branching")[0]).save(tmp_path / "calibration" / "000.npz")
    artifact = workshop.artifact("branching", "torchscript")
    with pytest.raises(InputRefused, match="without branches"):
        open_cuts(artifact, tmp_path, asdict(ModelRef("python", "branching", str(TINY / "branching.py"))))
