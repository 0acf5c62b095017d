"""What users do wrong, and what machines do to them: the documented exit code, one clear message, nothing left over."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploytool.backends import base
from deploytool.cli.main import run

HEAD = "import os, sys, time\nfrom pathlib import Path\nimport torch\nfrom torch import nn\n"
BUILD = "def build():\n    torch.manual_seed(0)\n    return nn.Linear(8, 4)\n"
SAMPLES = "def samples(): return [{'input': torch.ones(n, 8)} for n in (1, 2, 3)]\n"
EXPORT = ("--target", "torchscript", "--no-bench", "-o", "out")
Result = tuple[int, Any, str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command with --json here: its exit code, its one document, and what it said. It leaves nothing."""

    def call(*arguments: str) -> Result:
        capfd.readouterr()
        code = run([*arguments, "--json"])
        printed, said = capfd.readouterr()
        return code, _checked(printed, said), said

    return call


def _checked(printed: str, said: str) -> Any:
    document = json.loads(printed)
    assert document["schema_version"] == "1.0" and "Traceback" not in said
    return document


def _nothing_left(out: Path = Path("out")) -> bool:
    """No output, or one without temporary files and with whole artifacts only."""
    folders = [p for p in out.iterdir() if p.is_dir()] if out.is_dir() else []
    return not [p for p in out.rglob("*") if p.name.startswith(".")] and all(
        (p / "artifact.json").is_file() for p in folders
    )


def _model(text: str, name: str = "m.py") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(HEAD + text)
    return name


def _process(*arguments: str, **popen: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "deploytool", *arguments, "--json"], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **popen)  # fmt: skip


def _done(*arguments: str, **popen: Any) -> Result:
    """The same in a process of its own."""
    with _process(*arguments, **popen) as process:
        printed, said = process.communicate(timeout=300)
    return process.returncode, _checked(printed, said), said


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.onnx", b""), ("cut.onnx", b"\x08\x0a\x12"), ("foreign.onnx", b"<!DOCTYPE html><html>"),
     ("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), ("weights.pt", b"PK\x03\x04"),
     ("notes.txt", b"hello")],
)  # fmt: skip
def test_files_that_are_no_models(name: str, content: bytes, called: Callable[..., Result]) -> None:
    """A file of another kind must be refused with 3 before any work."""
    Path(name).write_bytes(content)
    code, document, _ = called("export", name, *EXPORT)
    assert code == 3 and document["error"]["code"] in ("DT301", "DT307", "DT312") and not Path("out").exists()


def test_names_that_do_not_exist(called: Callable[..., Result]) -> None:
    """An unknown model, target or recipe is wrong usage, and what is near is named; so is a path that is not there."""
    code, document, said = called("export", "digist", *EXPORT)
    assert (code, document["error"]["code"]) == (2, "DT201") and "did you mean 'digits'?" in said
    code, document, said = called("export", "digits", "--target", "torchscrip", "-o", "out")
    assert (code, document["error"]["code"]) == (2, "DT201") and "did you mean 'torchscript'?" in said
    for arguments in (("export", "nowhere/m.py", *EXPORT), ("export", "digits", "-t", "./t.toml", "-o", "out"),
                      ("compress", "digits", "--recipe", "./r.toml", "-o", "out"), ("verify", "nowhere")):  # fmt: skip
        code, document, said = called(*arguments)
        assert (code, document["error"]["code"]) == (2, "DT201") and "does not exist" in said


def test_a_profile_tells_all_its_mistakes(called: Callable[..., Result]) -> None:
    """Every unknown key and wrong value must be told at once, with file, line and the nearest key."""
    Path("p.toml").write_text('name = "p"\ndescription = "d"\nbackend = "onnxruntime"\nprecison = "fp32"\n\n[parity]\n'
                              'cosine_min = 2\nsqnr_min = 1\n\n[build]\nx = 1\n')  # fmt: skip
    code, document, _ = called("export", "digits", "--target", "./p.toml", "-o", "out")
    detail = document["error"]["detail"]
    assert code == 2 and document["error"]["code"] == "DT202"
    assert [line.split(": ")[0] for line in detail] == ["p.toml", "p.toml:4", "p.toml:7", "p.toml:8", "p.toml:11"]
    assert "missing key 'precision'" in detail[0] and "did you mean 'precision'" in detail[1]
    assert "did you mean 'sqnr_db_min'" in detail[3] and "unknown key 'build.x'" in detail[4]
    Path("p.toml").write_bytes(b"\xff\xfe")
    code, document, _ = called("export", "digits", "--target", "./p.toml", "-o", "out")
    assert (code, document["error"]["code"]) == (2, "DT202")


def test_an_existing_output_is_not_touched(called: Callable[..., Result]) -> None:
    """What lies in the output must be as it was, and a file must not become a folder."""
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    before = os.stat("out").st_mtime_ns, os.stat("out/mine.txt").st_mtime_ns
    code, document, _ = called("export", "digits", *EXPORT)
    assert (code, document["error"]["code"]) == (2, "DT203")
    assert before == (os.stat("out").st_mtime_ns, os.stat("out/mine.txt").st_mtime_ns)
    Path("file").write_text("mine")
    assert called("export", "digits", "--target", "torchscript", "-o", "file")[0] == 2
    assert called("export", "digits", "--target", "torchscript", "-o", "file", "--overwrite")[0] == 4
    assert called("export", "digits", "--target", "torchscript", "-o", "file/deeper")[0] == 4
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [("--timeout", "0"), ("--timeout", "-1"), ("--timeout", "nan"), ("--timeout", "soon"), ("--memory-limit", "-1G"),
     ("--memory-limit", "inf"), ("--memory-limit", "0"), ("--bench-seconds", "-1"), ("--bench-seconds", "nan"),
     ("--seed", "x"), ("--exporter", "magic")],
)  # fmt: skip
def test_options_out_of_range(arguments: tuple[str, str], called: Callable[..., Result]) -> None:
    """A limit that limits nothing, and a time that is none, must be refused as usage."""
    code, document, _ = called("export", "digits", "--target", "torchscript", "-o", "out", *arguments)
    assert (code, document["error"]["code"]) == (2, "DT201") and not Path("out").exists()


def test_a_missing_backend_says_how_to_install_it(
    called: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target whose package is absent must end as 4 with the command that installs it, and leave nothing."""
    engine = base.Backend("absent", "source", (), ("no_such_engine",), "engine", base.tables.NoSettings)
    monkeypatch.setitem(base.BACKENDS, "absent", engine)
    Path("p.toml").write_text('name = "p"\ndescription = "d"\nbackend = "absent"\nprecision = "fp32"\n'
                              "[parity]\ncosine_min = 0.9\n")  # fmt: skip
    code, document, said = called("export", "digits", "--target", "./p.toml", "-o", "out")
    assert code == 4 and "pip install 'deploytool[engine]'" in said
    assert document["targets"][0]["status"] == "unavailable" and not Path("out").exists()


def _with_openvino(text: str, *options: str) -> Result:
    """Export to OpenVINO and TorchScript where `import openvino` runs `text`."""
    Path("shim").mkdir()
    Path("shim/openvino.py").write_text(text)
    Path("shim/nncf.py").write_text("")
    path = os.pathsep.join([str(Path("shim").absolute()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return _done("export", _model(BUILD + SAMPLES), "--target", "openvino", *EXPORT, *options,
                 env={**os.environ, "PYTHONPATH": path.strip(os.pathsep)})  # fmt: skip


def test_a_backend_that_does_not_import() -> None:
    """A package that is there but broken must end as 4 with its own words, and other targets must go on."""
    code, document, said = _with_openvino("raise ImportError('libtbb.so.12: cannot open shared object file')")
    by_name = {r["target"]: r for r in document["targets"]}
    assert by_name["torchscript"]["status"] == "ok", by_name["torchscript"]["reason"]
    assert code == 4 and by_name["openvino"]["status"] == "failed"
    assert by_name["openvino"]["error"]["code"] == "DT401" and "libtbb.so.12" in said
    assert "deploytool[openvino]" in by_name["openvino"]["error"]["fix"] and _nothing_left()


BACKENDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "crash": ("import os\nos.abort()", (), "DT501"),
    "hang": ("import time\ntime.sleep(600)", ("--timeout", "20"), "DT502"),
    "hog": ("import time\nheld = [bytearray(b'x') * 100_000_000 for _ in range(60) if not time.sleep(0.02)]",
            ("--memory-limit", "1500M"), "DT503"),
}  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_that_misbehave(name: str) -> None:
    """A backend that crashes, hangs or eats memory must end as 5 with its own code, the other target be whole."""
    text, options, error = BACKENDS[name]
    code, document, _ = _with_openvino(text, *options)
    by_name = {r["target"]: r for r in document["targets"]}
    assert (code, by_name["openvino"]["status"]) == (5, "failed")
    assert by_name["openvino"]["error"]["code"] == error
    assert by_name["torchscript"]["status"] == "ok", by_name["torchscript"]["reason"]
    assert {p.name for p in Path("out").iterdir()} == {"torchscript", "report.json"} and _nothing_left()


MODELS: dict[str, tuple[str, tuple[str, ...], int, str, str]] = {
    "nan": (BUILD.replace("return ", "m = ") + "    m.weight.data[0] = float('nan')\n    return m\n" + SAMPLES, (), 3,
            "DT304", "weight"),
    "names": (BUILD + SAMPLES.replace("'input'", "'x'"), (), 3, "DT303", "unknown: x"),
    "abort": ("def build(): os.abort()\n" + SAMPLES, (), 5, "DT501", "Fatal Python error: Aborted"),
    "exit": ("def build(): os._exit(0)\n" + SAMPLES, (), 5, "DT501", "must answer"),
    "hang": (BUILD + "def samples():\n    time.sleep(600)\n", ("--timeout", "12"), 5, "DT502", "must end within 12 s"),
    "hog": ("def build():\n    held = [torch.ones(25_000_000) for _ in range(60) if not time.sleep(0.02)]\n" + SAMPLES,
            ("--memory-limit", "1G"), 5, "DT503", "must stay under 1000 MB"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_misbehave(name: str) -> None:
    """A model file that is broken, crashes, hangs or eats memory must end as its own code and leave nothing."""
    text, options, code, error, sentence = MODELS[name]
    got, document, said = _done("export", _model(text), *EXPORT, *options)
    assert (got, document["error"]["code"]) == (code, error) and sentence in said
    assert not Path("out").exists()


def test_a_model_that_talks_too_much(cache: Path) -> None:
    """200 MB of output must neither reach stdout nor fill the disk, and the export must go on."""
    text = """
if not Path("said").exists():
    sys.stdout.write(("x" * 999 + chr(10)) * 100_000)
    sys.stderr.write(("y" * 999 + chr(10)) * 100_000)
    Path("said").touch()
"""
    code, document, _ = _done("export", _model(text + BUILD + SAMPLES), *EXPORT)
    assert code == 0 and document["targets"][0]["status"] == "ok" and Path("said").exists() and _nothing_left()
    assert sum(p.stat().st_size for p in (cache / "logs").iterdir()) < 50_000_000


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_everything(number: signal.Signals, code: int, here: Path, cache: Path) -> None:
    """A signal in the middle of the work must end all processes, remove what was begun, and print one document."""
    marker = here / "started"
    text = f"def samples():\n    Path({str(marker)!r}).touch()\n    time.sleep(600)\n"
    before = {p.name for p in (cache / "lowered").glob(".*")} if (cache / "lowered").is_dir() else set()
    with _process("export", _model(BUILD + text), *EXPORT) as process:
        deadline = time.monotonic() + 120
        while not marker.exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert process.returncode == code and said.endswith("interrupted\n")
    assert _checked(printed, said)["error"]["kind"] == "Interrupted"
    assert family and psutil.wait_procs(family, timeout=5)[1] == []
    assert not Path("out").exists() and {p.name for p in (cache / "lowered").glob(".*")} <= before


def test_a_full_disk(cache: Path) -> None:
    """When files cannot grow any more that must be told as 4, with nothing half-written, in cache or output."""
    text = BUILD.replace("nn.Linear(8, 4)", "nn.Sequential(nn.Linear(8, 60_000), nn.Linear(60_000, 4))")

    def no_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    before = {p.name for p in (cache / "lowered").iterdir()} if (cache / "lowered").is_dir() else set()
    code, document, said = _done("export", _model(text + SAMPLES), "--target", "ort", "--no-bench", "-o", "out",
                                 preexec_fn=no_space)  # fmt: skip
    assert (code, document["error"]["code"]) == (4, "DT403"), said
    assert not Path("out").exists() and {p.name for p in (cache / "lowered").iterdir()} <= before


def test_paths_of_every_kind() -> None:
    """Model and output may lie in folders of any name."""
    folder = "-dash, with space, ünïcödé 模型, new\nline and a'\"$(x)"
    model = _model(BUILD + SAMPLES, f"./{folder}/m.py")
    code, document, _ = _done("export", model, "--target", "torchscript", "--no-bench", f"--output={folder}/out")
    (result,) = document["targets"]
    assert code == 0 and result["artifact"] == f"{folder}/out/torchscript"
    assert Path(result["artifact"], "artifact.json").is_file() and _nothing_left(Path(folder, "out"))


def test_a_graph_is_not_compressed(called: Callable[..., Result]) -> None:
    """Steps rewrite modules: an ONNX file must be refused before any work, and samples for a model that has its own."""
    Path("m.onnx").write_bytes(b"\x08\x0a\x3a\x02\x12\x00")
    code, document, said = called("compress", "m.onnx", "--recipe", "digits-svd", "-o", "out")
    assert (code, document["error"]["code"]) == (2, "DT204") and "before it is exported" in said
    code, document, _ = called("export", "digits", *EXPORT, "--samples", "m.onnx")
    assert (code, document["error"]["code"]) == (2, "DT201") and not Path("out").exists()
    code, document, _ = called("export", "m.onnx", *EXPORT)
    assert code == 4 and "only its graph" in document["targets"][0]["reason"]
