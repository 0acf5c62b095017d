"""The calls into TensorRT against its published types: full TensorRT is on few machines, and none of ours."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deploytool.backends

pytest.importorskip("mypy")
STUBS = importlib.util.find_spec("tensorrt_stubs")
if STUBS is None or STUBS.origin is None:
    pytest.skip("tensorrt-stubs is not installed", allow_module_level=True)

FOLDER = Path(deploytool.backends.__file__).parent
FILES = ("tensorrt.py", "tensorrt_engine.py", "tensorrt_caches.py")
SETTINGS = """
[mypy]
strict = True
follow_imports = skip
ignore_missing_imports = True
disallow_subclassing_any = False
warn_return_any = False
[mypy-tensorrt,tensorrt_bindings.*]
follow_imports = silent
ignore_errors = True
"""


def mended(text: str) -> str:
    """The types without the lines that are no Python: parameters named `in`, and values that cannot be written."""
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>|<[A-Z]\w*\.\w+: -?\d+>", "...", text)
    for _ in range(20):
        try:
            ast.parse(text)
        except SyntaxError as error:
            lines = text.splitlines()
            del lines[(error.lineno or 1) - 1]
            text = "\n".join(lines)
        else:
            break
    return re.sub(r"^bool: .*$", "", text, flags=re.MULTILINE)  # a member of DataType, which hides the type


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the mended types and mypy's settings."""
    folder = tmp_path_factory.mktemp("types")
    assert STUBS is not None and STUBS.origin is not None
    for name in ("tensorrt", "tensorrt_bindings"):
        shutil.copytree(Path(STUBS.origin).parent.parent / name, folder / name)
    path = folder / "tensorrt_bindings" / "tensorrt.pyi"
    path.write_text(mended(path.read_text()))
    (folder / "mypy.ini").write_text(SETTINGS)
    return folder


def complaints(folder: Path, *files: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", *map(str, files)],
        cwd=folder, env={"MYPYPATH": str(folder), "PATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if any(file.name in line for file in files)]


def test_every_call_is_one_that_tensorrt_has(checked: Path) -> None:
    """Builder, parser, runtime, context and inspector must be called as TensorRT's published types say."""
    assert complaints(checked, *(FOLDER / name for name in FILES)) == []


@pytest.mark.parametrize(("name", "right", "wrong", "said"), [
    ("tensorrt_engine.py", "execute_async_v3(self.stream.cuda_stream)", "execute_async_v3()", "Missing positional"),
    ("tensorrt_engine.py", "self.context.set_input_shape(name,", "self.context.set_input_shape(3,", "No overload"),
    ("tensorrt_engine.py", "engine.create_engine_inspector()", "engine.create_inspector()", "has no attribute"),
    ("tensorrt_caches.py", "set_timing_cache(cache, False):", "set_timing_cache(cache):", "Missing positional"),
    ("tensorrt_caches.py", "create_timing_cache(b\"\")", "create_timing_cache()", "Missing positional"),
    ("tensorrt_caches.py", "self._cache.serialize()", "self._cache.dump()", "has no attribute"),
    ("tensorrt.py", "trt.ProfilingVerbosity.DETAILED", "trt.ProfilingVerbosity.VERBOSE", "has no attribute"),
])  # fmt: skip
def test_a_wrong_call_is_seen(name: str, right: str, wrong: str, said: str, checked: Path) -> None:
    """A call that TensorRT does not have, or with other arguments, must be an error."""
    text = (FOLDER / name).read_text()
    assert right in text
    planted = checked / f"planted_{name}"
    planted.write_text(text.replace(right, wrong))
    assert any(said in line for line in complaints(checked, planted))
