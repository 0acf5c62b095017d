"""TensorRT engines built on a machine without a GPU."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from workshop import TINY, Workshop

pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

from deploytool.backends.base import build_artifact, importable, load_checked_target, nvidia_driver  # noqa: E402
from deploytool.backends.build import build_job  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.backends.tables import SizeRange  # noqa: E402
from deploytool.backends.tensorrt_devices import check_devices  # noqa: E402
from deploytool.backends.tensorrt_layers import UNASKED  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused, UsageProblem  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402
from deploytool.source import ModelRef  # noqa: E402
from deploytool.target import Target  # noqa: E402

pytestmark = pytest.mark.skipif(nvidia_driver(), reason="with a GPU the engine itself is the entry")


def test_the_engine_and_its_graph_are_both_there(workshop: Workshop) -> None:
    """Without a GPU the artifact must hold the engine, say that it was not run, and open the engine's graph."""
    artifact = workshop.artifact("attention", "trt")
    assert not artifact.executes
    assert artifact.settings["not_executed"] == "no NVIDIA driver here"
    assert (artifact.entry, artifact.settings["engine"]) == ("model.onnx", "model.engine")
    assert (artifact.folder / "model.engine").stat().st_size > 10_000
    half = onnx.load(artifact.main_file)
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in half.graph.initializer)


def test_sizes_come_from_the_samples(workshop: Workshop) -> None:
    """Free dimensions must range over the samples' sizes, tuned for the first, unless the profile says otherwise."""
    sizes = workshop.artifact("attention", "trt").settings["profile"]
    assert sizes == {"batch": {"min": 1, "opt": 1, "max": 3}, "length": {"min": 6, "opt": 8, "max": 11}}
    mine = {"batch": {"min": 1, "opt": 4, "max": 64}}
    artifact = build_artifact(workshop.request("attention", load_checked_target("trt"), profile=mine), {})
    assert artifact.settings["profile"]["batch"] == mine["batch"]
    assert "tokens:64x11" in artifact.settings["rebuild"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of a model that is calibrated on batches of 7 and 16, with parity taken on 1, 2 and 5."""
    pytest.importorskip("onnxscript")
    from deploytool.lower.prepare import prepare_job

    folder = tmp_path_factory.mktemp("trained")
    prepare_job(asdict(ModelRef("python", "trained", str(TINY / "trained.py"))), str(folder), "torchscript", 0)
    return folder


def test_sizes_hold_calibration_and_parity(trained: Path, tmp_path: Path) -> None:
    """The engine must take every size that parity is taken on, also where calibration has others: tuned for case 0."""
    ref = asdict(ModelRef("python", "trained", str(TINY / "trained.py")))
    built = build_job(load_checked_target("trt").to_json(), str(trained), ref, "f" * 64, str(tmp_path), 0)
    assert built["settings"]["profile"] == {"batch": {"min": 1, "opt": 2, "max": 5}}
    assert "--minShapes=input:1x24 --optShapes=input:2x24 --maxShapes=input:5x24" in built["settings"]["rebuild"]


def test_a_profile_that_leaves_a_case_outside_is_refused(trained: Path, tmp_path: Path) -> None:
    """A size that parity passes and the engine would refuse must be an error that names the dimension and the sizes."""
    target = load_checked_target("trt")
    build = {"profile": {"batch": {"min": 2, "opt": 4, "max": 4}}}
    ref = asdict(ModelRef("python", "trained", str(TINY / "trained.py")))
    with pytest.raises(UsageProblem) as caught:
        build_job({**target.to_json(), "build": build}, str(trained), ref, "f" * 64, str(tmp_path), 0)
    assert caught.value.code == "DT202"
    assert "batch: 2 to 4 leaves out 1, 5" in str(caught.value)


@pytest.mark.parametrize(("usable", "reason"), [(False, "GPU that torch can use"), (True, "must load the engine")])
def test_a_driver_alone_does_not_execute(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, usable: bool, reason: str
) -> None:
    """With a driver but no engine that opens, the artifact must say "not executed" and why, and open the graph."""
    torch = pytest.importorskip("torch")
    backend = importlib.import_module("deploytool.backends.tensorrt")
    monkeypatch.setattr(backend, "nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    artifact = build_artifact(workshop.request("mlp", load_checked_target("trt")), {})
    assert (artifact.executes, artifact.entry) == (False, "model.onnx")
    assert reason in artifact.settings["not_executed"]
    feeds = workshop.feeds("mlp")[0]
    with backend.BACKEND.open(artifact) as runner:
        assert runner.run(feeds)["output"].shape == (1, 6)


LAYERS = {"layers": 2, "by_precision": {"fp16": 2}, "fused": 1}


def test_an_engine_that_opens_is_executed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine that was built opens, it must be the entry, and its inspector be asked; no GPU is here, so that
    the opening is stood in for."""
    pytest.importorskip("torch")
    opened: list[bytes] = []

    def open_engine(trt: object, log: object, plan: bytes, signature: object) -> nullcontext[SimpleNamespace]:
        opened.append(plan)
        return nullcontext(SimpleNamespace(layers=lambda: LAYERS))

    backend = importlib.import_module("deploytool.backends.tensorrt")
    monkeypatch.setattr(backend, "nvidia_driver", lambda: True)
    monkeypatch.setattr("deploytool.backends.tensorrt_engine.open_engine", open_engine)
    artifact = build_artifact(workshop.request("mlp", load_checked_target("trt")), {})
    assert (artifact.executes, artifact.entry) == (True, "model.engine")
    assert opened == [artifact.main_file.read_bytes()]
    assert "not_executed" not in artifact.settings
    assert artifact.settings["engine_layers"] == LAYERS
    assert artifact.settings["inspector"] == "2 layers (2 in fp16), 1 of them fused"


def test_without_a_driver_no_layer_is_told(workshop: Workshop) -> None:
    """The engine's layers must not be guessed: without a driver the report says that they are not available."""
    artifact = workshop.artifact("mlp", "trt")
    assert artifact.settings["inspector"] == UNASKED and "engine_layers" not in artifact.settings
    with Asked(artifact) as asked:
        asked.run(workshop.feeds("mlp")[0])
        ran = asked.ran(workshop.feeds("mlp")[0])
    assert ran is not None and "not available: the engine's inspector needs a driver" in ran["source"]


def test_types_alone_are_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of published types has the library's name: it must not be taken for the library."""
    (tmp_path / "only_types").mkdir()
    (tmp_path / "only_types" / "__init__.pyi").write_text("")
    (tmp_path / "a_module.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert [importable(name) for name in ("only_types", "a_module", "absent_module")] == [False, True, False]


def test_an_unknown_dimension_is_refused(workshop: Workshop) -> None:
    """A size range for a dimension that the model lacks must be an error that names the nearest one."""
    request = workshop.request(
        "attention", load_checked_target("trt"), profile={"batsh": {"min": 1, "opt": 1, "max": 2}}
    )
    with pytest.raises(UsageProblem, match="batsh") as caught:
        build_artifact(request, {})
    assert "'batch'" in str(caught.value)


def test_an_unknown_device_is_refused(workshop: Workshop) -> None:
    """A compute capability that the compiler does not know must be an error that lists those that it knows."""
    target = load_checked_target("trt")
    device = target.device.model_copy(update={"compute_capabilities": ("SM90",)})
    with pytest.raises(UsageProblem, match="SM89"):
        build_artifact(workshop.request("mlp", target.model_copy(update={"device": device})), {})


REFUSED = {
    "transform": ([("Unsqueeze", "x axes", "u", {}), ("DFT", "u", "y", {"axis": 1})], "DFT", "fixed matrices"),
    "zero point": ([("QuantizeLinear", "x scale zero", "q", {}), ("DequantizeLinear", "q scale zero", "y", {})],
                   "QuantizeLinear", 'precision = "int8" in the profile makes grids around zero'),
    "dynamic": ([("DynamicQuantizeLinear", "x", "q s z", {}), ("DequantizeLinear", "q s z", "y", {})],
                "DynamicQuantizeLinear", 'precision = "int8" in the profile makes the Q/DQ pairs'),
    "low bits": ([("MatMulNBits", "x codes scales", "y", {"K": 24, "N": 8, "bits": 4, "block_size": 32})],
                 "MatMulNBits", 'precision = "int4" in the profile'),
    "text": ([("Cast", "x", "t", {"to": 8}), ("StringNormalizer", "t", "n", {}), ("Cast", "n", "y", {"to": 1})],
             "StringNormalizer", "turn text into numbers"),
    "fused": ([("SkipLayerNormalization", "x x gamma", "y", {})], "SkipLayerNormalization", "without ONNX Runtime's"),
    "unknown": ([("Mine", "x", "y", {})], "Mine", "replace these operators in the model, or choose another target"),
}  # fmt: skip
OTHERS = {"MatMulNBits": "com.microsoft", "SkipLayerNormalization": "com.microsoft", "Mine": "my.own"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_operator_is_named(name: str, tmp_path: Path) -> None:
    """The refusal of a graph must name operator and node, in words, and say what to do about that operator."""
    steps, operator, advice = REFUSED[name]
    constants = {"axes": np.array([2], np.int64), "scale": np.float32(0.1), "zero": np.uint8(128),
                 "codes": np.zeros((8, 1, 16), np.uint8), "scales": np.ones(8, np.float32),
                 "gamma": np.ones(24, np.float32)}  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    make = onnx.helper.make_node
    nodes = [make(kind, given.split(), made.split(), name=f"the_{kind}", domain=OTHERS.get(kind), **how)
             for kind, given, made, how in steps]  # fmt: skip
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 24])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    used = [tensor for tensor in tensors if any(tensor.name in node.input for node in nodes)]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], used)
    opset = [onnx.helper.make_opsetid("", 18), *(onnx.helper.make_opsetid(d, 1) for d in sorted(set(OTHERS.values())))]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "model.onnx")
    compile_engine = importlib.import_module("deploytool.backends.tensorrt").compile_engine
    signature = Signature((TensorSpec("x", "float32", ("batch", 24)),), (TensorSpec("y", "float32", ("batch", 8)),))
    sizes = {"batch": SizeRange(min=1, opt=2, max=4)}
    with pytest.raises(InputRefused) as caught:
        compile_engine(tmp_path / "model.onnx", signature, sizes, load_checked_target("trt"))
    assert caught.value.code == "DT310"
    told = "\n".join(caught.value.detail)
    assert f"operator {operator}, node the_{operator}: " in told and "false" not in told and "Assertion" not in told
    assert caught.value.fix is not None and advice in caught.value.fix


def _for(target: Target, *capabilities: str, precision: str = "fp16") -> Target:
    """The target for these GPUs and in this precision."""
    device = target.device.model_copy(update={"compute_capabilities": capabilities})
    return target.model_copy(update={"device": device, "precision": precision})


def test_a_failed_build_shows_the_compilers_words(workshop: Workshop) -> None:
    """Where the compiler gives no engine, GPU and node must be named beside its own log: SM75 has no fp32 products."""
    target = _for(load_checked_target("trt"), "SM75")
    with pytest.raises(BackendFailed) as caught:
        build_artifact(workshop.request("mlp", target, fp32_ops=["Gemm", "MatMul"]), {})
    assert caught.value.code == "DT504"
    assert "TURING (SM75) (node '/module/" in caught.value.message and "FP32 GEMM" in caught.value.message
    assert any("Cannot compile operation" in line for line in caught.value.detail)


@pytest.mark.parametrize(
    ("precision", "build", "capabilities", "said"),
    [
        ("fp32", {}, ("SM75", "SM80"), "SM80 or newer for precision = 'fp32' (got SM75)"),
        ("bf16", {}, ("SM75",), "SM80 or newer for precision = 'bf16'"),
        ("int8", {}, ("SM75",), "SM80 or newer for precision = 'int8' with rest = 'fp32'"),
        ("int8", {"rest": "bf16"}, ("SM75",), "with rest = 'bf16'"),
        ("int4", {"rest": "fp16"}, ("SM75",), "SM80 or newer for precision = 'int4'"),
        ("fp8", {"rest": "fp16"}, ("SM80", "SM86", "SM89"), "SM89 or newer for precision = 'fp8' (got SM80, SM86)"),
    ],
)
def test_a_precision_that_a_gpu_lacks_is_refused_early(
    precision: str, build: dict[str, str], capabilities: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    """A profile for GPUs without products of its precision must be refused when it is read, before any build."""
    table = "\n".join(f'{key} = "{value}"' for key, value in build.items())
    (tmp_path / "mine.toml").write_text(
        f'name = "mine"\ndescription = "x"\nbackend = "tensorrt"\nprecision = "{precision}"\n[device]\n'
        f"compute_capabilities = {list(capabilities)}\n[parity]\ncosine_min = 0.9\n[build]\n{table}\n"
    )
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(tmp_path / "mine.toml"))
    assert caught.value.code == "DT202" and said in caught.value.message
    assert caught.value.fix is not None and capabilities[0] in caught.value.fix


@pytest.mark.parametrize(
    ("precision", "rest", "capability"),
    [(p, r, c) for c in ("SM75", "SM80", "SM86", "SM89", "SM120")
     for p, r in (("fp32", ""), ("fp16", ""), ("bf16", ""), ("int8", "fp32"), ("int8", "fp16"), ("int8", "bf16"),
                  ("fp8", "fp16"), ("int4", "fp16"))],
)  # fmt: skip
def test_what_is_not_refused_is_built(workshop: Workshop, precision: str, rest: str, capability: str) -> None:
    """What each GPU takes must be the compiler's own: what is let through builds, what is refused does not."""
    target = _for(load_checked_target("trt"), capability, precision=precision)
    build = {"rest": rest, "keep_fp32": 0} if rest else {}
    build |= {"calibration": "min-max"} if precision in ("int8", "fp8") else {}
    request = workshop.request("mlp", target, **build)
    try:
        check_devices(request.target)
    except UsageProblem:
        engine = importlib.import_module("deploytool.backends.tensorrt").BACKEND
        with pytest.raises(BackendFailed, match="Cannot compile"):
            engine.build(request)
    else:
        assert (build_artifact(request, {}).folder / "model.engine").stat().st_size > 5_000
