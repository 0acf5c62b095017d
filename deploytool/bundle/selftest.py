#!/usr/bin/env python3
"""Self-test of a bundle: is every file the one that was released, and do the engines still say what they said?

    python selftest.py [--variant TARGET] [--json]

Needs Python 3.10, NumPy and the runtime of the variant; not the tool that made the bundle.

Exit codes: 0 every recorded case was replayed and agreed; 1 one did not, or nothing was replayed; 2 wrong usage;
4 a runtime or the right machine is missing; 6 a file is changed, missing or was added.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
# Nothing is imported from the bundle: a file there must not stand in for a package.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != HERE]

import numpy as np  # noqa: E402 - after the line above, on purpose

SUMS = "SHA256SUMS"
PASSED, FAILED, LACKING, BROKEN = 0, 1, 4, 6
MACHINES = {"AMD64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}

Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
Engine = Callable[[Arrays], Arrays]


class Lacking(Exception):
    """This machine lacks the runtime, or is another kind of machine."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", metavar="TARGET", help="test this variant only")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    problems = check_files(HERE)
    variants: list[Json] = []
    if not problems:
        with open(os.path.join(HERE, "deploytool.json"), encoding="utf-8") as file:
            manifest = json.load(file)
        known = [variant["target"] for variant in manifest["variants"]]
        if options.variant is not None and options.variant not in known:
            parser.error(f"the variant must be one of {', '.join(known)} (got {options.variant!r})")
        wanted = [v for v in manifest["variants"] if options.variant in (None, v["target"])]
        variants = [test_variant(variant, manifest.get("buckets") or []) for variant in wanted]
    code = exit_code(problems, [variant["status"] for variant in variants])
    result = {"schema_version": "1.0", "passed": code == PASSED, "exit_code": code, "problems": problems,
              "variants": variants}  # fmt: skip
    print(json.dumps(result, allow_nan=False) if options.json else as_text(result))
    return code


def check_files(folder: str) -> list[str]:
    """What is wrong with the files of the bundle, by SHA256SUMS; empty when nothing is."""
    try:
        with open(os.path.join(folder, SUMS), encoding="utf-8") as file:
            sums = {name: sha for sha, _, name in (line.rstrip("\n").partition("  ") for line in file)}
    except (OSError, ValueError) as error:
        return [f"unreadable: {SUMS} ({error})"]
    there = set(walk(folder)) - {SUMS}
    problems = [f"missing: {name}" for name in sums if name not in there]
    problems += [f"added: {name}" for name in sorted(there) if name not in sums]
    problems += [f"changed: {n}" for n, sha in sums.items() if n in there and sha256(os.path.join(folder, n)) != sha]
    return problems or ([] if sums else [f"empty: {SUMS}"])


def walk(folder: str) -> Iterator[str]:
    """Every file of a folder, relative, with slashes."""
    for root, _, names in os.walk(folder):
        for name in names:
            yield os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")


def sha256(path: str) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


def test_variant(variant: Json, buckets: list[Json]) -> Json:
    """Replay the recorded cases of a variant; where there are buckets, say where the feeds of each would go."""
    result: Json = {"target": variant["target"], "status": "passed", "reason": "", "cases": []}
    folder = os.path.join(HERE, "variants", variant["target"])
    if variant["format"] == "source":
        return {**result, "status": "skipped", "reason": "a model in its framework can't be tested without its source"}
    entry, result["reason"] = tested_file(variant)
    try:
        if not result["reason"]:
            check_machine(variant)
        engine = open_engine(variant, os.path.join(folder, entry))
    except Lacking as error:
        return {**result, "status": "lacking", "reason": str(error)}
    except Exception as error:  # whatever a runtime raises for a file that it refuses
        return {**result, "status": "failed", "reason": f"the engine does not open: {error}"[:2000]}
    names = sorted(n for n in os.listdir(os.path.join(folder, "golden")) if n.endswith(".npz"))
    result["cases"] = [replay(variant, engine, os.path.join(folder, "golden", name), buckets) for name in names]
    if not names:
        return {**result, "status": "failed", "reason": "no recorded cases"}
    if not all(case["passed"] for case in result["cases"]):
        result["status"] = "failed"
    return result


def tested_file(variant: Json) -> tuple[str, str]:
    """The file that is opened, and why it is not the engine ("" when it is)."""
    if not variant["executes"]:
        return variant["entry"], "the engine is for another device; the graph that its compiler was given is tested"
    if variant["format"] == "tensorrt":
        # The graph lies beside the engine; a name with a folder in it could lead out of the bundle.
        settings = variant["settings"]
        return os.path.basename(str(settings.get("parity_graph", settings.get("graph", "model.onnx")))), (
            "the graph that TensorRT was given was tested, on ONNX Runtime, NOT THE ENGINE: this self-test does not "
            "run TensorRT engines"
        )
    return variant["entry"], ""


def check_machine(variant: Json) -> None:
    """Code for a processor, and int8 that was proved on one, run on such a machine only."""
    machine = MACHINES.get(platform.machine(), platform.machine())
    wanted = variant["device"].get("architecture", machine)
    if wanted not in (machine, "any"):
        raise Lacking(f"the variant is for {wanted} (this machine is {machine})")


def pick(buckets: list[Json], specs: list[Json], feeds: Arrays) -> str | None:
    """The target that takes the feeds: that of the first bucket they fit into; None when they are too large for all."""
    sizes = {dim: size for spec in specs for dim, size in zip(spec["shape"], feeds[spec["name"]].shape, strict=True)}
    fitting = (b["target"] for b in buckets if all(sizes[dim] <= most for dim, most in b["sizes"].items()))
    return next(fitting, None)


def replay(variant: Json, engine: Engine, path: str, buckets: list[Json]) -> Json:
    """Run one recorded case and compare."""
    case: Json = {"case": os.path.basename(path), "passed": False, "milliseconds": None, "outputs": {}, "problems": []}
    with np.load(path, allow_pickle=False) as file:
        feeds = {key[3:]: file[key] for key in file.files if key.startswith("in.")}
        recorded = {key[4:]: file[key] for key in file.files if key.startswith("out.")}
    ranks = {spec["name"]: len(spec["shape"]) for spec in variant["signature"]["inputs"]}
    if (recorded_ranks := {name: array.ndim for name, array in feeds.items()}) != ranks:
        return {**case, "problems": [f"inputs must be of ranks {ranks} (recorded: {recorded_ranks})"]}
    if buckets:
        case["goes_to"] = pick(buckets, variant["signature"]["inputs"], feeds)
    started = time.perf_counter()
    try:
        outputs = engine(feeds)
    except Exception as error:  # whatever a runtime raises
        return {**case, "problems": [f"the engine does not run: {error}"[:2000]]}
    case["milliseconds"] = round(1000 * (time.perf_counter() - started), 3)
    expected = [spec["name"] for spec in variant["signature"]["outputs"]]
    if not recorded or sorted(recorded) != sorted(expected) or sorted(outputs) != sorted(expected):
        return {**case, "problems": [f"outputs must be {expected} (recorded: {sorted(recorded)}, "
                                     f"got: {sorted(outputs)})"]}  # fmt: skip
    for spec in variant["signature"]["outputs"]:
        name = spec["name"]
        rows = bool(spec["shape"]) and isinstance(spec["shape"][0], str)
        measured, problem = compare(outputs[name], recorded[name], rows, variant["tolerance"])
        case["outputs"][name] = measured
        case["problems"] += [f"{name}: {problem}"] if problem else []
    return {**case, "passed": not case["problems"]}


def compare(got: np.ndarray, recorded: np.ndarray, rows: bool, tolerance: Json) -> tuple[Json, str]:
    """What was measured of the worst sample, and what is wrong with it ("" for nothing)."""
    if got.shape != recorded.shape or got.dtype != recorded.dtype:
        return {}, f"must be {recorded.dtype}{list(recorded.shape)} (got {got.dtype}{list(got.shape)})"
    if not np.issubdtype(recorded.dtype, np.floating):
        agreement = float(np.mean(got == recorded)) if recorded.size else 1.0
        problem = f"agreement {agreement:.4f} is below {tolerance['agreement_min']}"
        return {"agreement": agreement}, problem if agreement < tolerance["agreement_min"] else ""
    masked = np.isinf(recorded) & (got == recorded)  # a masked score is minus infinity on both sides
    shape = (got.shape[0], -1) if rows and got.size else (1, -1)
    a, b = (np.where(masked, 0.0, x.astype(np.float64)).reshape(shape) for x in (got, recorded))
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return {}, "holds NaN or infinity"
    size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    floor = 1e-6 * (size_b.max(initial=0.0) or 1.0)  # a sample of zeros has no angle and no relative error
    error = np.linalg.norm(a - b, axis=1) / np.maximum(size_b, floor)
    nothing = (size_a <= floor) & (size_b <= floor)
    cosine = np.where(nothing, 1.0, (a * b).sum(axis=1) / np.maximum(size_a * size_b, floor**2))
    measured = {"cosine": float(min(cosine.min(initial=1.0), 1.0)), "relative_error": float(error.max(initial=0.0))}
    if measured["cosine"] < tolerance["cosine_min"]:
        return measured, f"cosine {measured['cosine']:.6f} is below {tolerance['cosine_min']}"
    if measured["relative_error"] > tolerance["relative_error_max"]:
        return measured, f"relative error {measured['relative_error']:.4g} is above {tolerance['relative_error_max']}"
    return measured, ""


def open_engine(variant: Json, path: str) -> Engine:
    """The engine of a variant, opened with its runtime."""
    inputs = [spec["name"] for spec in variant["signature"]["inputs"]]
    outputs = [spec["name"] for spec in variant["signature"]["outputs"]]
    threads = int(variant["settings"].get("threads", 0))
    # An engine that is not run lies beside the ONNX graph that it was made from.
    kind = "onnx" if path.endswith(".onnx") else variant["format"]
    if kind == "onnx":
        return open_onnx(path, outputs, threads, onnx_settings(variant))
    if kind == "openvino":
        return open_openvino(path, inputs, outputs, threads, str(variant["settings"].get("hint", "latency")))
    if kind in ("torchscript", "pt2"):
        choose_kernels(variant)
        return open_torch(path, inputs, outputs, threads, bool(variant["settings"].get("optimize", False)))
    if kind == "executorch":
        return open_executorch(path, inputs, outputs, threads, variant["settings"].get("needs", {}))
    raise Lacking(f"this self-test can't run engines of format {kind!r}")


def runtime(name: str) -> Any:
    """A runtime's module."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise Lacking(f"{name} must be installed ({error})") from error


def onnx_settings(variant: Json) -> Json:
    """How the graph is to be opened; what stands for a TensorRT engine computes in floats what lies between grids."""
    if variant["backend"] == "tensorrt":
        settings = variant["settings"]
        return {"fuse_qdq": settings.get("fuse_qdq", variant["precision"] != "int8"),
                "without": settings.get("without", ())}  # fmt: skip
    return dict(variant["settings"])


def open_onnx(path: str, outputs: list[str], threads: int, settings: Json) -> Engine:
    """A session with the settings that the release was verified with."""
    ort = runtime("onnxruntime")
    options = ort.SessionOptions()
    for entry, on in (("intra_op.allow_spinning", settings.get("spinning", True)),
                      ("set_denormal_as_zero", settings.get("flush", False)),
                      ("disable_prepacking", not settings.get("packing", True)),
                      ("disable_quant_qdq", not settings.get("fuse_qdq", True)),
                      ("x64quantprecision", True)):  # fmt: skip
        options.add_session_config_entry(f"session.{entry}", str(int(on)))
    options.enable_cpu_mem_arena = bool(settings.get("arena", True))
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = {"disabled": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED"}
    level = levels.get(str(settings.get("optimization", "all")), "ORT_ENABLE_ALL")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"],
                                   disabled_optimizers=list(settings.get("without", ())))  # fmt: skip

    def run(feeds: Arrays) -> Arrays:
        tokens = feeds.get("input_ids")
        if settings.get("rows") == "single" and tokens is not None and len(tokens) > 1 and tokens.shape[1] > 1:
            rows = [session.run(outputs, {n: a[i : i + 1] for n, a in feeds.items()}) for i in range(len(tokens))]
            return {name: np.concatenate(parts) for name, parts in zip(outputs, zip(*rows, strict=True), strict=True)}
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    return run


def open_openvino(path: str, inputs: list[str], outputs: list[str], threads: int, hint: str = "latency") -> Engine:
    ov = runtime("openvino")
    # Processors with bf16 units would compute in bf16 unless told otherwise.
    settings: dict[str, object] = {"PERFORMANCE_HINT": hint.upper(), "INFERENCE_PRECISION_HINT": "f32",
                                   "KV_CACHE_PRECISION": "f32"}  # fmt: skip
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = ov.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    if request.query_state():
        return keeping_cache(ov, compiled, request, inputs, outputs)

    def run(feeds: Arrays) -> Arrays:
        result = compiled([feeds[name] for name in inputs])
        return {name: np.array(result[i]) for i, name in enumerate(outputs)}

    for ports, names in ((compiled.inputs, inputs), (compiled.outputs, outputs)):
        if len(ports) != len(names) or any(p.names and n not in p.names for p, n in zip(ports, names, strict=True)):
            raise ValueError(f"the engine must have {', '.join(names)} in this order")
    return run


def keeping_cache(ov: Any, compiled: Any, request: Any, inputs: list[str], outputs: list[str]) -> Engine:
    """A language model whose engine keeps the cache: a variable has the names of its input and output, joined."""
    states = {state.name: state for state in request.query_state()}
    pairs = {name: f"present.{name.removeprefix('past_key_values.')}" for name in inputs
             if name.startswith("past_key_values.")}  # fmt: skip
    ports = {name for port in compiled.inputs for name in port.get_names()}
    if states.keys() != {a + b for a, b in pairs.items()} or ports - {"beam_idx"} != set(inputs) - pairs.keys():
        raise ValueError("the engine must keep the cache of the signature as its variables, and take what is left")
    given = {name: compiled.output(name) for name in outputs if name not in pairs.values()}

    def run(feeds: Arrays) -> Arrays:
        request.reset_state()
        for past, present in pairs.items():
            if feeds[past].size:
                states[past + present].state = ov.Tensor(np.ascontiguousarray(feeds[past]))
        rows = {"beam_idx": np.arange(len(feeds["input_ids"]), dtype=np.int32)}
        result = request.infer({**{name: feeds[name] for name in inputs if name not in pairs},
                                **({} if "beam_idx" not in ports else rows)})  # fmt: skip
        found = {name: np.array(result[port]) for name, port in given.items()}
        return {**found, **{b: np.array(states[a + b].state.data) for a, b in pairs.items()}}

    return run


def open_torch(path: str, inputs: list[str], outputs: list[str], threads: int, optimize: bool) -> Engine:
    """A script, or a package of AOTInductor's."""
    torch = runtime("torch")
    if threads:
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of the format's age is not news to who runs this
        if path.endswith(".pt2"):
            script = runtime("torch._inductor").aoti_load_package(path)
        else:
            script = torch.jit.load(path, map_location="cpu")
            script = torch.jit.optimize_for_inference(script) if optimize else script

    def run(feeds: Arrays) -> Arrays:
        with torch.inference_mode():
            found = script(*(torch.from_numpy(np.array(feeds[name])) for name in inputs))
        tensors = (found,) if isinstance(found, torch.Tensor) else tuple(found)
        return {name: tensor.numpy() for name, tensor in zip(outputs, tensors, strict=True)}

    return run


def choose_kernels(variant: Json) -> None:
    """Of torch's engines for int8 the one that the release was verified with, or that of this kind of processor."""
    if variant["backend"] == "fbgemm":
        engines = runtime("torch").backends.quantized
        wanted = (variant["settings"].get("engine", "fbgemm"), "fbgemm", "qnnpack")
        chosen = next((name for name in wanted if name in engines.supported_engines), None)
        if chosen is None:
            raise Lacking(f"torch must have an engine for int8 (it has {', '.join(engines.supported_engines)})")
        engines.engine = chosen


def open_executorch(path: str, inputs: list[str], outputs: list[str], threads: int, needs: Json) -> Engine:
    """A program of ExecuTorch's, where the runtime has what it needs."""
    torch = runtime("torch")
    native = runtime("executorch.extension.pybindings._C")  # the runtime without the compiler around it
    with silent():  # it tells what of the processor it cannot read
        if any(name.startswith("quantized_decomposed::") for name in needs.get("operators", ())):
            runtime("executorch.kernels.quantized")
        known = {*native._get_operator_names(), *native._get_registered_backend_names()}
        absent = [name for names in needs.values() for name in names if name not in known]
        if absent:
            raise Lacking(f"this executorch has no {', '.join(absent)}")
        if threads:
            native._unsafe_reset_threadpool(threads)
        program = native._load_program(path)
        opened = program, program.load_method("forward")  # the method reads the program's memory

    def run(feeds: Arrays) -> Arrays:
        found = opened[1]([torch.from_numpy(np.array(feeds[name])) for name in inputs])
        return {name: tensor.numpy() for name, tensor in zip(outputs, found, strict=True)}

    return run


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what libraries write to the standard error themselves."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def exit_code(problems: list[str], statuses: list[str]) -> int:
    if problems:
        return BROKEN
    if "failed" in statuses:
        return FAILED
    if "lacking" in statuses:
        return LACKING
    return PASSED if "passed" in statuses else FAILED


def as_text(result: Json) -> str:
    lines = list(result["problems"])
    for variant in result["variants"]:
        for case in variant["cases"]:
            numbers = [f"{name} " + ", ".join(f"{what} {value:.6g}" for what, value in measured.items())
                       for name, measured in case["outputs"].items()]  # fmt: skip
            word = "ok  " if case["passed"] else "FAIL"
            lines.append(f"{word} {variant['target']} {case['case']}: {'; '.join(case['problems'] or numbers)}")
        reason = f" ({variant['reason']})" if variant["reason"] else ""
        lines.append(f"{variant['target']}: {variant['status']}{reason}")
    words = {PASSED: "passed", FAILED: "failed", LACKING: "a runtime or the right machine is missing; --variant "
             "names the one for this machine", BROKEN: "the files are not those that were released"}  # fmt: skip
    return "\n".join([*lines, f"self-test: {words[result['exit_code']]}"])


if __name__ == "__main__":
    sys.exit(main())
