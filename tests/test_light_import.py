"""What must work, and start quickly, where no machine learning library is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "nncf", "tensorrt", "tensorrt_rtx",
         "transformers", "tokenizers", "accelerate", "scipy", "sklearn", "matplotlib", "jinja2", "ray")  # fmt: skip
LIGHT = (
    "import deploytool.cli.main",
    "import deploytool.gate.check",
    "import deploytool.bundle.pack, deploytool.bundle.verify, deploytool.bundle.trial, deploytool.bundle.selftest",
    "import deploytool.report.table, deploytool.report.markdown",
    "import deploytool.pipeline.export, deploytool.pipeline.again, deploytool.compress.recipe",
    "from deploytool.cli.main import run; run(['--help'])",
    "from deploytool.cli.main import run; run(['targets', 'list'])",
    "from deploytool.cli.main import run; run(['export', 'digits', '--target', 'all', '--dry-run'])",
)


@pytest.mark.parametrize("code", LIGHT)
def test_heavy_libraries_are_not_imported(code: str) -> None:
    """The code must run without importing any library that takes long or may be absent, nor look for one and fail."""
    ask = f"import sys; {code}; print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("code", LIGHT)
def test_heavy_libraries_are_not_needed(code: str) -> None:
    """The same code must run where every import of such a library fails."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); {code}"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
