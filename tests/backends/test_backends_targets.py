"""The shipped profiles, and what is said of a wrong one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deploytool.backends
from deploytool import shipped
from deploytool.backends import ort_optimizers, used_settings
from deploytool.backends.base import BACKENDS, find_backend, load_checked_target
from deploytool.backends.used_settings import PRECISIONS
from deploytool.errors import UsageProblem
from deploytool.target import target_names

# ONNX Runtime's optimizers that run whatever is left out.
ALWAYS = {"CastFloat16Transformer", "EnsureUniqueDQForNodeUnit", "FreeDimensionOverrideTransformer",
          "FuseFp16InitializerToFp32NodeTransformer", "MemcpyTransformer",
          "RemoveDuplicateCastTransformer"}  # fmt: skip
FOLDER = Path(deploytool.backends.__file__).parent


@pytest.mark.parametrize("name", target_names())
def test_shipped_profiles_are_whole(name: str) -> None:
    """Every shipped profile must load, carry its file's name, and name a backend and a plain sibling that exist.

    What is not fp32 must have such a sibling: TensorRT's is in fp16, which on GPUs is what fewer bits must beat.
    """
    target = load_checked_target(name)
    assert target.name == name
    assert target.backend in BACKENDS
    widths = ("fp32", "fp16", "bf16") if target.backend == "tensorrt" else ("fp32",)
    assert (target.precision not in widths) == (target.plain is not None)
    if target.plain:
        plain = load_checked_target(target.plain)
        assert plain.precision in widths
        assert plain.plain is None
        assert plain.parity.cosine_min > target.parity.cosine_min


def test_every_backend_has_a_file_and_a_profile() -> None:
    """The table of backends, the files that hold a BACKEND and the shipped profiles must agree."""
    files = {path.stem for path in FOLDER.glob("*.py") if "\nBACKEND = " in path.read_text(encoding="utf-8")}
    assert files == set(BACKENDS)
    assert files == {load_checked_target(name).backend for name in target_names()}


def test_all_errors_of_a_profile_are_told_at_once(tmp_path: Path) -> None:
    """A profile with several mistakes must give one sentence for each, with its line and the nearest known key."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "onnxruntime"\nprecison = "int8"\n\n'
        "[parity]\ncosine_min = 2.0\n\n[runtime]\nthread = 2\n"
    )
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(path))
    text = str(caught.value)
    for line, word in ((4, "'precision'"), (7, "cosine_min"), (10, "'threads'")):
        assert f"{path}:{line}: " in text
        assert word in text
    assert "missing key 'precision'" in text


def test_errors_of_the_build_table_have_lines_too(tmp_path: Path) -> None:
    """Keys and values that the backend does not know must be told with file, line and the nearest known key."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "onnxruntime"\nprecision = "int8"\n'
        '[parity]\ncosine_min = 0.9\n[build]\nkeep_fp23 = 2\noptimization = "most"\n'
    )
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(path))
    assert f"{path}:8: unknown key 'build.keep_fp23'; did you mean 'keep_fp32'?" in str(caught.value)
    assert f"{path}:9: 'build.optimization'" in str(caught.value)


def test_sizes_of_a_profile_are_ordered(tmp_path: Path) -> None:
    """An engine's size range must hold min <= opt <= max."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "tensorrt"\nprecision = "fp16"\n'
        "[parity]\ncosine_min = 0.9\n[build.profile.batch]\nmin = 4\nopt = 2\nmax = 8\n"
    )
    with pytest.raises(UsageProblem, match="1 error") as caught:
        load_checked_target(str(path))
    assert "min <= opt <= max" in str(caught.value)


def wrong(tmp_path: Path, backend: str, precision: str, build: str, rest: str = "") -> str:
    """What is said of a profile; it must be refused with the code of wrong values."""
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\ndescription = "x"\nbackend = "{backend}"\nprecision = "{precision}"\n'
                    f"[parity]\ncosine_min = 0.9\n{rest}[build]\n{build}\n")  # fmt: skip
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(path))
    assert caught.value.code == "DT202" and caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("backend", "precision", "build", "said"),
    [
        ("openvino", "int4", "max_drop = 0.01", "FILE:8: 'build.max_drop' does nothing in int4: take it out (it is of"),
        ("openvino", "int8", "weights_only = true\nexclude = ['x']", "FILE:9: 'build.exclude' does nothing in int8"),
        ("openvino", "int8", "activation_group = 32", "FILE:8: 'build.activation_group' does nothing in int8:"),
        ("openvino", "fp32", "scheme = 'plain'", "'build.scheme' does nothing in fp32"),
        ("onnxruntime", "fp32", "scheme = 'static'\ncalibration = 'entropy'", "FILE:9: 'build.calibration' does noth"),
        ("onnxruntime", "int8", "calibration = 'entropy'", 'does nothing in int8 with scheme = "dynamic"'),
        ("onnxruntime", "int8", "scheme = 'weights'\nkeep_fp32 = 1", 'it is of int8 with scheme = "dynamic"'),
        ("onnxruntime", "int8", "int8_share = 0.5", "take it out (it is of int4)"),
        ("onnxruntime", "fp16", "fuse = false", "'build.fuse' does nothing in fp16"),
        ("onnxruntime", "int4", "mixed = 'measured'", 'does nothing in int4: take it out (it is of int8 with scheme'),
        ("onnxruntime", "int8", "group = 'measured'", "'build.group' does nothing in int8 with scheme"),
        ("fbgemm", "int8", "scheme = 'static'\nembeddings = true", "'build.embeddings' does nothing"),
        ("inductor_int8", "int8", "scheme = 'dynamic'\ncalibration = 'min-max'", "'build.calibration' does nothing"),
        ("executorch", "fp32", "exclude = ['x']", "'build.exclude' does nothing in fp32"),
        ("tensorrt", "fp16", "calibration = 'entropy'", "'build.calibration' does nothing in fp16"),
        ("tensorrt", "int8", "fp32_ops = ['Softmax']", "'build.fp32_ops' does nothing in int8"),
        ("torchscript", "int8", "optimize = true", "FILE:4: 'precision' must be fp32 for the backend torchscript"),
        ("onnxruntime", "bf16", "arena = true", "must be fp32, fp16, int8 or int4"),
        ("onnxruntime", "fp32", "without = ['SkipLayerNormFusio']", "did you mean 'SkipLayerNormFusion'?"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(
    backend: str, precision: str, build: str, said: str, tmp_path: Path
) -> None:
    """A setting that the precision or scheme does not use is an error with its line that says what it is of."""
    assert said in wrong(tmp_path, backend, precision, build)


def test_runtime_and_device_settings_of_others_are_refused(tmp_path: Path) -> None:
    """Settings of ONNX Runtime's threads and of GPUs are errors for other engines."""
    assert "FILE:8: 'runtime.spinning'" in wrong(tmp_path, "openvino", "fp32", "", "[runtime]\nspinning = false\n")
    said = wrong(tmp_path, "onnxruntime", "fp32", "", "[device]\ncompute_capabilities = ['SM86']\n")
    assert "FILE:8: 'device.compute_capabilities'" in said


def test_what_does_something_is_taken(tmp_path: Path) -> None:
    """The same settings are taken where they are used, whatever their value."""
    path = tmp_path / "mine.toml"
    for backend, precision, build in (
        ("openvino", "int8", "max_drop = 0.01\nscheme = 'plain'"),
        ("openvino", "int4", "activation_group = 0\nweights_only = true"),
        ("onnxruntime", "int8", "scheme = 'static'\ncalibration = 'entropy'\nwithout = ['ConvAddFusion']"),
        ("fbgemm", "int8", "embeddings = true\ncalibration = 'min-max'"),
        ("tensorrt", "int8", "rest = 'fp16'\nfp32_ops = ['Softmax']"),
        ("fbgemm", "int8", "scheme = 'static'\nrecurrent = true\nsamples = 4"),  # their defaults ask for nothing
    ):
        path.write_text(f'name = "mine"\ndescription = "x"\nbackend = "{backend}"\nprecision = "{precision}"\n'
                        f"[parity]\ncosine_min = 0.9\n[build]\n{build}\n")  # fmt: skip
        assert load_checked_target(str(path)).backend == backend


def test_the_table_of_uses_names_settings() -> None:
    """Every backend has its precisions, and every setting in the table of uses is one of its backend's."""
    assert set(PRECISIONS) == set(BACKENDS)
    for backend, uses in used_settings._USED.items():
        assert set(uses) <= set(BACKENDS[backend].table.model_fields)


def test_optimizers_are_those_of_the_library() -> None:
    """Every optimizer that ONNX Runtime names when it opens a graph is known, and every known one is in the library."""
    pytest.importorskip("onnxruntime")
    code = (
        "import onnx, onnxruntime as ort\n"
        "from onnx import helper\n"
        "x, y = (helper.make_tensor_value_info(n, 1, [2]) for n in 'xy')\n"
        "graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])], 'g', [x], [y])\n"
        "model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)\n"
        "options = ort.SessionOptions()\n"
        "options.log_severity_level = 1\n"
        "ort.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    ran = set(re.findall(r"GraphTransformer (\w+) modified", done.stderr))
    assert len(ran) > 20 and ran <= ort_optimizers.NAMES | ALWAYS
    library = next((Path(importlib.util.find_spec("onnxruntime").origin).parent / "capi").glob("*pybind11_state*.so"))
    content = library.read_bytes()
    missing = [name for name in ort_optimizers.RULES if f"\0{name}\0".encode() not in content]
    assert missing == []


@pytest.mark.parametrize(("key", "value", "near"), [("backend", "onxruntime", "onnxruntime"), ("plain", "orrt", "ort")])
def test_a_profile_that_names_what_there_is_not(tmp_path: Path, key: str, value: str, near: str) -> None:
    """The file, the line, what it names and what is near must be told before anything is built."""
    text = (shipped.find("targets", "ort-int8", ".toml") or Path()).read_text()
    lines = [f'{key} = "{value}"' if line.startswith(f"{key} = ") else line for line in text.splitlines()]
    (tmp_path / "mine.toml").write_text("\n".join(lines))
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(tmp_path / "mine.toml"))
    number = 1 + lines.index(f'{key} = "{value}"')
    (told,) = caught.value.detail
    assert told.startswith(f"{tmp_path / 'mine.toml'}:{number}: {key} ") and repr(value) in told and near in told


def test_an_unknown_backend_is_told() -> None:
    """A backend that does not exist must be an error that names the nearest one."""
    with pytest.raises(UsageProblem) as caught:
        find_backend("onxruntime")
    assert "'onnxruntime'" in str(caught.value)


@pytest.mark.parametrize("refusal", [ModuleNotFoundError("no"), ValueError("openvino.__spec__ is None"), None])
def test_a_package_that_can_not_be_found_is_missing(refusal: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the import system does not find must be said to be missing, in whatever way that says so."""

    def find_spec(name: str) -> None:
        if refusal is not None:
            raise refusal

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    probe = find_backend("openvino").probe(load_checked_target("openvino"))
    assert not probe.available and "openvino" in probe.reason and probe.fix == "pip install 'deploytool[openvino]'"
