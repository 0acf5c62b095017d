"""What training wins and costs, as JSON, one part at a time.

python scripts/bench/training.py tsld       2-bit language model: token-scaled against logit distillation
python scripts/bench/training.py qat        8 bits trained, against fp32, and each int8 engine with the learned scales
                                            against its own quantizer: digits and mnistcnn
python scripts/bench/training.py half       half the blocks of digits, or with --model of MiniLM: metric kept, speed,
                                            eager and ONNX Runtime
python scripts/bench/training.py killed     SIGKILL at 20 random moments, then the weights of a quiet run?
python scripts/bench/training.py memory     resident memory over 10,000 steps, and what gradient checkpointing saves
python scripts/bench/training.py precision  accuracy of digits, trained from random weights in fp32, bf16 and fp16
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from deploytool.backends.onnxruntime import open_session
from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress, measure
from deploytool.load.compressed import save_compressed
from deploytool.load.model import open_source
from deploytool.load.modelfile import read_model_file
from deploytool.load.resolve import resolve
from deploytool.lower.onnx import lower_onnx
from deploytool.pipeline.export import Options, export, make_plan
from deploytool.source import Source
from deploytool.train.checkpoint import Saving, sha256
from deploytool.train.loop import fit
from deploytool.train.schedule import Schedule

HERE = Path(__file__).parent
LM = HERE / "training_lm.py"
KILLED_STEPS = 600
Feeds = dict[str, np.ndarray]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(model: str, recipe: str, seed: int = 0) -> tuple[Source, dict[str, Any]]:
    return compress(open_source(resolve(model)), parse_recipe(tomllib.loads(recipe), recipe, where="bench"), seed=seed,
                    progress=say)  # fmt: skip


def step(**settings: Any) -> str:
    return "[[compress]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


def tsld(arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of each seed, from one fp32 model trained here, at equal steps."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "lm.pt"
        os.environ["TRAINING_LM_WEIGHTS"] = str(weights)
        trained, report = run(
            str(LM), step(step="finetune", epochs=arguments.epochs, learning_rate=0.003, warmup_steps=50)
        )
        torch.save(trained.module.state_dict(), weights)
        grid = {"step": "qat", "bits": 2, "group": "channel", "symmetric": False, "activations": "none",
                "exclude": ["head"], "epochs": 9, "steps": arguments.steps, "learning_rate": 0.001}  # fmt: skip
        losses: dict[str, dict[str, Any]] = {
            "logit": {"towards": "original", "match": "kl", "temperature": 1.0},
            "logit and labels": {"towards": "both", "match": "kl", "temperature": 1.0},
            "tsld": {"towards": "both", "match": "tsld", "token_temperature": 10.0},
        }
        found: dict[str, list[float]] = {name: [] for name in losses}
        for seed in arguments.seeds:
            for name, settings in losses.items():
                _, done = run(str(LM), step(**grid, **settings), seed)
                found[name].append(done["after"]["metrics"]["perplexity"])
                say(f"{name} seed {seed}: {found[name][-1]:.4f}")
        _, rounded = run(str(LM), step(step="rtn", bits=2, group="channel", search=True, exclude=["head"]))
    return {"fp32": report["after"]["metrics"]["perplexity"], "rounded": rounded["after"]["metrics"]["perplexity"],
            "steps": arguments.steps, "epochs": arguments.epochs, **found}  # fmt: skip


def qat(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of fp32, after training, and of every int8 engine built from what was trained and from fp32."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model, epochs in (("digits", 3), ("mnistcnn", 1)):
            original, out = open_source(resolve(model)), Path(folder) / model
            trained, report = run(model, step(step="qat", epochs=epochs, learning_rate=0.0003))
            save_compressed(trained, original, report, out, overwrite=False)
            results[model] = {"fp32": report["before"]["metrics"], "qat": report["after"]["metrics"],
                              "seconds": report["steps"][0]["seconds"]}  # fmt: skip
            for name, source in (("learned", str(out)), ("calibrated", model)):
                results[model][name] = _exported(source, arguments.targets, Path(folder) / f"{model}-{name}")
    return results


def _exported(model: str, targets: list[str], out: Path) -> dict[str, Any]:
    """By target: its accuracy, how far it is from what it was built from, and which share of it runs in int8."""
    options = Options(out=out, bench_seconds=0)
    found = {}
    for result in export(make_plan(model, targets, options), options, say)["targets"]:
        name = result["target"]
        say(f"{model} {name}: {result['status']} {result['reason'] or ''}")
        found[name] = {
            "status": result["status"], "metrics": {k: v["candidate"] for k, v in result["quality"].items()},
            "relative_error": max((o["relative_error"] for o in (result["parity"] or {}).get("outputs", {}).values()),
                                  default=None),
            "int8_share": ((result["ran"] or {}).get("compute_by_precision") or {}).get("int8", 0.0),
        }  # fmt: skip
    return found


def half(arguments: argparse.Namespace) -> dict[str, Any]:
    """The metric, and the time of one input and of several: the two models take turns, eager and in ONNX Runtime."""
    text = (HERE.parents[1] / "models" / "recipes" / f"{arguments.model}-half.toml").read_text()
    student, report = run(arguments.model, text)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sources = {"whole": open_source(resolve(arguments.model)), "half": student}
        ways: dict[str, dict[str, Callable[[Feeds], object]]] = {"eager": {}, "ort": {}}
        for name, source in sources.items():
            session = open_session(lower_onnx(source, Path(folder) / name).main_file, torch.get_num_threads())
            ways["eager"][name] = lambda feeds, flat=source.flat: flat(*map(torch.from_numpy, feeds.values()))  # type: ignore[misc]
            ways["ort"][name] = lambda feeds, session=session: session.run(None, feeds)  # type: ignore[misc]
        speed = {way: {rows: _in_turns(runs, _feeds(sources["whole"], rows)) for rows in (1, arguments.rows)}
                 for way, runs in ways.items()}  # fmt: skip
    [(metric, before)] = report["before"]["metrics"].items()
    after = report["after"]["metrics"][metric]
    return {"model": arguments.model, "metric": metric, "before": before, "after": after, "kept": after / before,
            "threads": torch.get_num_threads(), "seconds": [step["seconds"] for step in report["steps"]],
            **speed}  # fmt: skip


def _feeds(source: Source, rows: int) -> Feeds:
    """The first row of the first sample, which is the one that models are timed with, so many times."""
    first = next(iter(source.samples()))
    return {n: first[n][:1].repeat(rows, *[1] * (first[n].ndim - 1)).numpy() for n in source.signature.input_names}


def _in_turns(runs: dict[str, Callable[[Feeds], object]], feeds: Feeds) -> dict[str, float]:
    """Median milliseconds of each, and of the ratios of calls that follow one another."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(320):
        for name, call in runs.items():
            started = time.perf_counter()
            call(feeds)
            if turn >= 20:  # the first warm up
                times[name].append((time.perf_counter() - started) * 1e3)
    ratios = [whole / thin for whole, thin in zip(times["whole"], times["half"], strict=True)]
    return {**{name: statistics.median(took) for name, took in times.items()}, "speedup": statistics.median(ratios)}


def _digits(folder: Path | None, steps: int, pause: float = 0.0, begun: Callable[[], object] | None = None) -> str:
    """Train the digits model for some steps and give the hash of its weights; `begun` is called after two of them."""
    source = open_source(resolve("digits"))
    assert source.train_batches is not None and source.loss is not None
    own, batches = source.loss, source.train_batches
    calls = itertools.count()

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if next(calls) == 2 and begun is not None:
            begun()
        time.sleep(pause)
        return own(source.module(image=batch["image"]), batch)

    fit(source.module, lambda epoch: batches(epoch=epoch), loss, Schedule(99, 1e-3, steps=steps),  # type: ignore[call-arg, arg-type]
        saving=None if folder is None else Saving(folder, 2))  # fmt: skip
    return sha256(source.module.state_dict())


def killed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each life ends a random moment after its first checkpoint; `reached`: the steps that were kept then."""
    moments, reached = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        quiet = _digits(None, KILLED_STEPS)
        while True:
            child = subprocess.Popen([sys.executable, __file__, "child", folder], stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None and child.stdout.readline() == "training\n"
            if len(reached) < 20:
                time.sleep(moments.uniform(0.0, 1.0))
                child.send_signal(signal.SIGKILL)
            said = child.communicate()[0].split()
            if child.returncode == 0:
                return {"kills": len(reached), "reached": reached, "steps": KILLED_STEPS, "same": said == [quiet],
                        "sha256": quiet}  # fmt: skip
            names = sorted(path.stem for path in Path(folder).glob("step-*.safetensors"))
            reached.append(int(names[-1].removeprefix("step-")) if names else 0)
            say(f"killed after step {reached[-1]}")


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident bytes after every 2,000 of 10,000 steps; bytes kept for the backward pass with and without."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    resident: list[int] = []

    def watch(number: int, total: int) -> None:
        if number % 2000 == 1999:
            resident.append(psutil.Process().memory_info().rss)

    fit(model, lambda epoch: [{"x": torch.randn(8, 32)} for _ in range(100)],
        lambda batch: model(batch["x"]).square().mean(), Schedule(100, 1e-4), before_step=watch)  # fmt: skip
    kept = {}
    for on in (False, True):
        source = open_source(resolve("digits"))
        sizes: dict[int, int] = {}

        def loss(batch: Any, source: Source = source, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes.clear()
            keep = lambda t, sizes=sizes: sizes.setdefault(t.data_ptr(), t.numel() * t.element_size()) and t  # noqa: E731
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                return source.module(image=batch["image"])["logits"].square().mean()

        fit(source.module, lambda epoch: [{"image": torch.randn(256, 1, 8, 8)}], loss,
            Schedule(1, 1e-5, gradient_checkpointing=on))  # fmt: skip
        kept["checkpointed" if on else "plain"] = sum(sizes.values())
    return {"resident_bytes": resident, "kept_for_backward_bytes": kept}


def precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of each seed and milliseconds of a step, by the precision of the products."""
    code = read_model_file(resolve("digits")).code
    found: dict[str, Any] = {kind: {"accuracy": [], "ms_per_step": []} for kind in ("fp32", "bf16", "fp16")}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        weights = code.DigitTransformer().state_dict()
        for kind, told in found.items():
            source = open_source(resolve("digits"))
            source.module.load_state_dict(weights)
            done = fit(source.module, lambda epoch: code.train_batches(epoch),
                       lambda batch, source=source: code.loss(source.module(image=batch["image"]), batch),  # type: ignore[misc]
                       Schedule(30, 1e-3, warmup_steps=20, seed=seed, precision=kind))  # type: ignore[arg-type] # fmt: skip
            told["accuracy"].append(measure(source, evaluate=True)["metrics"]["accuracy"])
            told["ms_per_step"].append(1e3 * done.seconds / len(done.losses))
            say(f"{kind} seed {seed}: {told['accuracy'][-1]:.4f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"tsld": tsld, "qat": qat, "half": half, "killed": killed, "memory": memory,
             "precision": precision}  # fmt: skip
    parser.add_argument("part", choices=[*parts, "child"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--targets", nargs="+", default=["ort-int8", "openvino-int8", "fbgemm"], help="of qat")
    parser.add_argument("--model", default="digits", choices=["digits", "minilm"], help="of half")
    parser.add_argument("--rows", type=int, default=32, help="of half: the larger batch that is timed")
    parser.add_argument("--steps", type=int, default=80, help="of two-bit training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of the fp32 language model")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments.part == "child":
        print(_digits(arguments.folder, KILLED_STEPS, 0.01, lambda: print("training", flush=True)), flush=True)
        return
    print(json.dumps({arguments.part: parts[arguments.part](arguments)}, indent=2))


if __name__ == "__main__":
    main()
