"""Model files: what they may hold, and what is said of those that cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deploytool.errors import DeployError, EnvironmentLacking, InputRefused
from deploytool.load.describe import describe_job
from deploytool.load.model import open_hooks, open_source
from deploytool.load.modelfile import open_model_file, read_model_file
from deploytool.source import ModelRef

Write = Callable[..., ModelRef]
GOOD = """
def build():
    torch.manual_seed(0)
    return nn.Linear(3, 2)

def samples():
    yield {"input": torch.ones(1, 3)}
    yield {"input": torch.ones(2, 3)}
"""


def test_a_model_file_becomes_a_source(model_file: Write) -> None:
    """Generators are samples too; the module must be in eval mode, without gradients, and iterable again and again."""
    source = open_source(model_file(GOOD + "\ndef evaluate(predict):\n    return {'m': 1.0}\n"))
    assert not source.module.training and not any(p.requires_grad for p in source.module.parameters())
    assert str(source.signature.inputs[0]) == "input: float32[batch, 3]"
    assert len(list(source.samples())) == len(list(source.samples())) == 2
    assert source.evaluate is not None and source.loss is None and not source.synthetic
    assert torch.equal(source.flat(torch.ones(2, 3))[0], source.module(torch.ones(2, 3)))


def test_dataclasses_in_a_model_file(model_file: Write) -> None:
    """A dataclass with postponed annotations needs its module in sys.modules while the file is executed."""
    source = open_source(model_file("""
from dataclasses import dataclass
from typing import Optional

@dataclass
class Out:
    scores: "torch.Tensor"
    extra: "Optional[torch.Tensor]" = None

class M(nn.Linear):
    def forward(self, x):
        return Out(super().forward(x))

def build(): return M(3, 2)
def samples(): return [{"x": torch.ones(1, 3)}]
"""))
    assert source.signature.output_names == ("scores",)


def test_a_module_beside_the_model_file(model_file: Write, tmp_path: Path) -> None:
    """A model file may import its neighbours, which it then depends on."""
    (tmp_path / "neighbour_of_m.py").write_text("WIDTH = 3\n")
    text = "from neighbour_of_m import WIDTH\n" + GOOD.replace("nn.Linear(3", "nn.Linear(WIDTH")
    source = open_source(model_file(text))
    assert {tmp_path / "neighbour_of_m.py", tmp_path / "m.py"} <= set(source.dependencies)


def test_two_model_files_of_one_name(model_file: Write) -> None:
    """Files of the same name in different folders are different modules."""
    first = read_model_file(model_file(GOOD + "WHO = 1", "a/m.py"))
    second = read_model_file(model_file(GOOD + "WHO = 2", "b/m.py"))
    assert (first.hook("WHO"), second.hook("WHO")) == (1, 2)


def test_tied_weights_stay_tied(model_file: Write) -> None:
    """A weight with two names is one tensor in the source, and counted once."""
    ref = model_file("""
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))

def build(): return M()
def samples(): return [{"ids": torch.tensor([[1, 2]])}, {"ids": torch.tensor([[1, 2, 3], [0, 0, 4]])}]
""")
    source = open_source(ref)
    assert source.module.head.weight is source.module.embed.weight
    told = describe_job(vars(ref))
    assert told["parameters"] == 20 and told["signature"]["inputs"][0]["dtype"] == "int64"
    assert [(row["name"], row["tied_to"]) for row in told["layers"]] == [("embed", None), ("head", "embed")]


def test_numbers_are_samples(model_file: Write) -> None:
    """Python numbers are inputs of rank 0."""
    source = open_source(model_file("""
class M(nn.Module):
    def forward(self, x, scale, on):
        return x * scale * on

def build(): return M()
def samples(): return [{"x": torch.ones(2), "scale": 0.5, "on": True}]
"""))
    assert [str(s) for s in source.signature.inputs] == ["x: float32[2]", "scale: float32[]", "on: bool[]"]


def test_masks_of_infinity_are_no_broken_weights(model_file: Write) -> None:
    """A buffer may hold infinity, as causal masks do; a parameter must not, and nothing may hold NaN."""
    text = """
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor({weight}))
        self.register_buffer("mask", torch.tensor([0.0, float("{mask}")]))

    def forward(self, x):
        return torch.softmax(x + self.mask, -1) * self.w

def build(): return M()
def samples(): return [{{"x": torch.ones(2)}}]
"""
    assert open_source(model_file(text.format(weight="1.0", mask="-inf"))).signature.outputs
    for weight, mask, name in (("float('nan')", "0", "w"), ("float('inf')", "0", "w"), ("1.0", "nan", "mask")):
        with pytest.raises(InputRefused, match="finite") as caught:
            open_source(model_file(text.format(weight=weight, mask=mask)))
        assert caught.value.code == "DT304" and caught.value.detail == (name,)


SAMPLES = 'def samples(): return [{"input": torch.ones(1, 3)}]\n'
BUILD = "def build(): return nn.Linear(3, 2)\n"
HELD = 'GIVEN = ({"input": torch.ones(1, 3)} for _ in range(1))\n'
BAD = {
    "syntax": ("\ndef build(:\n", "DT302", "m.py:5"),
    "import": ("raise RuntimeError('no luck')\n", "DT302", "no luck"),
    "no build": (SAMPLES, "DT302", "missing: build"),
    "no samples": (BUILD, "DT302", "missing: samples"),
    "misspelt": (BUILD + "def sample(): return []\n", "DT302", "did you mean 'sample'?"),
    "not callable": ("build = 3\n" + SAMPLES, "DT302", "missing: build"),
    "build raises": ("def build():\n    raise ValueError('bad shape')\n" + SAMPLES, "DT302", "m.py:5"),
    "build gives": ("def build(): return 3\n" + SAMPLES, "DT302", "got int"),
    "samples raise": (BUILD + "def samples():\n    return [1 / 0]\n", "DT302", "ZeroDivisionError"),
    "generator": (BUILD + "def samples():\n    yield {'input': torch.ones(1, 3)}\n    1 / 0\n", "DT302", "m.py:7"),
    "samples give": (BUILD + "def samples(): return None\n", "DT302", "samples() of 'm' must run"),
    "no sample": (BUILD + "def samples(): return []\n", "DT303", "at least one sample"),
    "one generator": (BUILD + HELD + "def samples(): return GIVEN\n", "DT303", "1 samples at the first call and none"),
    "its items": (BUILD + HELD + "def samples(): yield from GIVEN\n", "DT303", "anew at every call"),
    "used up": (BUILD + HELD + "list(GIVEN)\ndef samples(): return GIVEN\n", "DT303", "0 samples at the first call"),
    "a tuple": (BUILD + "def samples(): return [(torch.ones(1, 3),)]\n", "DT303", "sample 0 is a tuple"),
    "a text": (BUILD + "def samples(): return [{'input': 'text'}]\n", "DT303", "got str"),
    "names": (BUILD + "def samples(): return [{'inputs': torch.ones(1, 3)}]\n", "DT303", "did you mean 'input'?"),
    "forward": (BUILD + "def samples(): return [{'input': torch.ones(1, 4)}]\n", "DT302", "in /"),
    "module": ("import no_such_package_here\n" + BUILD + SAMPLES, "DT401", "no_such_package_here"),
    "module later": ("def build():\n    import no_such_package_here\n" + SAMPLES, "DT401", "no_such_package_here"),
    "direction": (BUILD + SAMPLES + "LOWER_IS_BETTER = 'loss'\n", "DT302", "LOWER_IS_BETTER must be a list"),
    "files": (BUILD + SAMPLES + "FILES = 'weights.bin'\n", "DT302", "FILES must be a list"),
    "inputs": (BUILD + SAMPLES + "INPUTS = ('batch', 3)\n", "DT302", "INPUTS must be a dict"),
    "evaluate": (BUILD + SAMPLES + "evaluate = {'accuracy': 1.0}\n", "DT302", "evaluate must be a function"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_broken_model_files_are_refused(name: str, model_file: Write) -> None:
    """What is wrong in a model file must be said with its code, and where it raised with file and line."""
    text, code, sentence = BAD[name]
    with pytest.raises(DeployError) as caught:
        open_model_file(model_file(text))
    assert caught.value.code == code and sentence in str(caught.value)
    assert isinstance(caught.value, EnvironmentLacking if code == "DT401" else InputRefused)


def test_hooks_are_read_without_building(model_file: Write) -> None:
    """Evaluating an artifact must not need the module: build() may be slow or need much memory."""
    hooks = open_hooks(model_file("def build(): raise RuntimeError\n" + SAMPLES
                                  + "def evaluate(p): return {'m': 1}\nLOWER_IS_BETTER = ['m']\n"))  # fmt: skip
    assert hooks.evaluate is not None and hooks.lower_is_better == ("m",) and hooks.prompts is None


def test_weights_that_safetensors_opens_are_dependencies(model_file: Write, tmp_path: Path) -> None:
    """safetensors opens files in Rust: they must be listed all the same, as those opened by Python and numpy are."""
    numpy = pytest.importorskip("numpy")
    from safetensors.torch import save_file

    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "a" / "w.safetensors")
    numpy.save(tmp_path / "b" / "bias.npy", numpy.zeros(2, "float32"))
    (tmp_path / "c" / "labels.txt").write_text("one")
    source = open_source(model_file(f"""
from pathlib import Path
import numpy
from safetensors import safe_open
from safetensors.torch import load_file

def build():
    layer = nn.Linear(3, 2)
    weight = load_file("{tmp_path}/a/w.safetensors")["weight"]
    with safe_open("{tmp_path}/a/w.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), weight)
    layer.load_state_dict(dict(weight=weight, bias=torch.from_numpy(numpy.load("{tmp_path}/b/bias.npy"))))
    Path("{tmp_path}/c/labels.txt").read_text()
    return layer

{SAMPLES}
"""))
    expected = {tmp_path / "a/w.safetensors", tmp_path / "b/bias.npy", tmp_path / "c/labels.txt", tmp_path / "m.py"}
    assert expected <= set(source.dependencies)
    safetensors = sys.modules["safetensors"]
    assert type(safetensors.safe_open).__name__ == "type", "the real name must be back in its place"


def test_files_written_are_no_dependencies(model_file: Write, tmp_path: Path) -> None:
    """What a model file writes is not what it was made from."""
    source = open_source(model_file(f"open('{tmp_path}/out.txt', 'w').close()\n" + GOOD))
    assert tmp_path / "out.txt" not in source.dependencies


def test_unknown_kinds_are_our_bug() -> None:
    """A reference of a kind that nobody opens cannot come from a user."""
    with pytest.raises(DeployError) as caught:
        open_source(ModelRef("scroll", "m", "m"))
    assert caught.value.code == "DT900"
