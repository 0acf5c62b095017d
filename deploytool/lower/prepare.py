"""What every target needs, made once per model in one process: reference outputs, calibration feeds, the ONNX graph.

Written to a folder of the cache:

    signature.json        the model's signature
    prepared.json         what was done: model, seconds, versions, whether the samples are synthetic
    cases/NNN.npz         inputs and the eager module's outputs; 000 is the example that is timed
    original/NNN.npz      for a compressed model: the same inputs and the uncompressed module's outputs
    calibration/NNN.npz   inputs only: rows of training batches where the model has them, else its samples
    onnx/                 the portable artifact
    encodings.npz         for a quantized model: the codes of the graph's constants
    assets/               tokenizer and the like
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.encoding import ENCODINGS
from deploytool.errors import InputRefused
from deploytool.load.digest import weight_bytes, weights_digest
from deploytool.load.infer import refused_size
from deploytool.load.model import open_source
from deploytool.load.track import tracking
from deploytool.load.variants import further_rows, parity_feeds, shapes
from deploytool.lower.encodings import write_encodings
from deploytool.lower.fast_path import fast_path_differs
from deploytool.lower.onnx import Exporter, lower_onnx
from deploytool.lower.onnx_take import take_onnx
from deploytool.signature import Outputs, Signature
from deploytool.source import ModelRef, Source
from deploytool.storage import sha256_file, write_json

_CALIBRATION_SAMPLES = 32
_CALIBRATION_ROWS = 4  # of each training batch: quantizers run every feed many times, and more rows change little


def prepare_job(ref: Mapping[str, str], out: str, exporter: Exporter | None, seed: int) -> dict[str, Any]:
    """Fill the folder `out` for a model; returns prepared.json's content and the files it depends on, with SHA-256.

    Without an exporter no ONNX graph is made: for targets that take the module itself.
    """
    torch.manual_seed(seed)
    folder = Path(out)
    started = time.perf_counter()
    source = open_source(ModelRef(**ref))
    loaded = time.perf_counter()
    hashing = ThreadPoolExecutor(1)  # beside torch: it takes as long as reading the weights
    digests = {path: hashing.submit(sha256_file, path) for path in source.dependencies if path.is_file()}
    feeds = parity_feeds(source.signature, map(_arrays, source.samples()))
    if source.original is None:  # what the original of a compressed model takes is not known here
        feeds += [feed for feed in further_rows(source.signature, feeds) if _takes(source, feed)]
    _record_cases(source, feeds, folder / "cases", source.seen)  # the first feeds are the samples
    weights = {source.ref.path: weights_digest(source.module)}
    if source.original is not None:
        weights[source.original.path] = _record_original(source, source.original, feeds, folder / "original")
    with tracking() as opened:  # train_batches() may read files of its own
        _record_calibration(source, folder / "calibration")
    recorded = time.perf_counter()
    portable = _portable(source, folder / "onnx", exporter) if exporter else None
    unplaced = write_encodings(source, portable.main_file, folder / ENCODINGS) if portable and source.encodings else []
    _copy_assets(source, folder / "assets")
    prepared = {
        "name": source.ref.name,
        "synthetic": source.synthetic,
        "notes": list(source.notes),
        "weights": weights,
        "weight_bytes": weight_bytes(source.module),
        "shapes": shapes(source.signature, feeds),
        "cases": len(feeds),
        "lower_is_better": list(source.lower_is_better),
        "has_evaluate": source.evaluate is not None,
        "has_prompts": source.prompts is not None,
        "fast_path": fast_path_differs(source, folder / "cases"),
        "original": None if source.original is None else vars(source.original),
        "exporter": portable.history[-1].settings["exporter"] if portable else None,
        "encodings": {"of": len(source.encodings), "not_in_graph": unplaced},
        "seconds": {"load": loaded - started, "reference": recorded - loaded,
                    "lower": time.perf_counter() - recorded},
    }  # fmt: skip
    write_json(folder / "signature.json", source.signature.to_json())
    write_json(folder / "prepared.json", prepared)
    digests |= {path: hashing.submit(sha256_file, path) for path in opened if path not in digests and path.is_file()}
    hashing.shutdown()
    found = {path: digests[path].result() if path in digests else None for path in {*source.dependencies, *opened}}
    return {**prepared, "dependencies": {str(path): digest for path, digest in sorted(found.items())}}


def _portable(source: Source, folder: Path, exporter: Exporter) -> Artifact:
    return lower_onnx(source, folder, exporter=exporter) if source.ref.has_module else take_onnx(source, folder)


def _record_cases(
    source: Source, feeds: Sequence[Outputs], folder: Path, seen: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Run the eager module on every feed, but for those whose outputs were `seen`, and keep what it gives."""
    for index, inputs in enumerate(feeds):
        try:
            known = seen.get(index)
            outputs = _run(source, inputs) if known is None else {name: t.numpy() for name, t in known.items()}
        except Exception as error:
            raise refused_size(error, source.signature.bind(inputs)) from error
        _refuse_nan(outputs, index)
        Case(inputs, reference=outputs).save(folder / f"{index:03d}.npz")


def _record_original(source: Source, ref: ModelRef, feeds: Sequence[Outputs], folder: Path) -> str:
    """Record the uncompressed model on the same feeds; the digest of its weights."""
    original = open_source(ref)
    if original.signature != source.signature:
        raise InputRefused("DT303", "a compressed model must have the inputs and outputs of its original",
                           detail=[f"original: {original.signature}", f"compressed: {source.signature}"])  # fmt: skip
    _record_cases(original, feeds, folder, {})  # its own samples may be others
    return weights_digest(original.module)


def _run(source: Source, feeds: Outputs) -> Outputs:
    with torch.inference_mode():
        # Of copies: a module may change its inputs in place.
        tensors = source.flat(*(torch.from_numpy(feeds[name].copy()) for name in source.signature.input_names))
    return {name: t.numpy() for name, t in zip(source.signature.output_names, tensors, strict=True)}


def _takes(source: Source, feeds: Outputs) -> bool:
    """Whether the model gives numbers for a feed that no sample asks of it."""
    try:
        outputs = _run(source, feeds)
    except Exception:  # the module's own words about a number of rows; verify says which were not compared
        return False
    return not any(array.dtype.kind == "f" and np.isnan(array).any() for array in outputs.values())


def _refuse_nan(outputs: Outputs, index: int) -> None:
    bad = [name for name, array in outputs.items() if array.dtype.kind == "f" and np.isnan(array).any()]
    if bad:
        raise InputRefused("DT304", f"the model's outputs must be numbers (case {index}: NaN in {', '.join(bad)})",
                           fix="mend the model or the sample; nothing can be compared with NaN")  # fmt: skip


def _record_calibration(source: Source, folder: Path) -> None:
    batches: Iterable[Mapping[str, Tensor]] = source.samples()
    hook = "samples" if source.train_batches is None else "train_batches"
    try:
        if source.train_batches is not None:
            batches = (_first_rows(source.signature, batch) for batch in source.train_batches())
        taken = list(itertools.islice(batches, _CALIBRATION_SAMPLES))
        feeds = [_arrays({name: batch[name] for name in source.signature.input_names}) for batch in taken]
    except Exception as error:
        raise InputRefused("DT303", f"{hook}() of {source.ref.name!r} must give batches with the model's inputs "
                           f"(got {type(error).__name__}: {str(error)[:300]})") from error  # fmt: skip
    if not feeds:
        raise InputRefused("DT303", f"{hook}() of {source.ref.name!r} must give at least one batch (got none)")
    for index, inputs in enumerate(feeds):
        Case(inputs).save(folder / f"{index:03d}.npz")


def _first_rows(signature: Signature, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A training batch cut to a few rows, where all inputs begin with the free dimension `batch`."""
    free = all(spec.shape[:1] == ("batch",) for spec in signature.inputs)
    return {name: batch[name][:_CALIBRATION_ROWS] if free else batch[name] for name in signature.input_names}


def _arrays(sample: Mapping[str, Tensor]) -> Outputs:
    return {name: np.array(tensor.detach().numpy(), order="C") for name, tensor in sample.items()}


def _copy_assets(source: Source, folder: Path) -> None:
    folder.mkdir()
    for name, text in (source.made_assets() if source.made_assets else {}).items():
        if Path(name).name != name:
            raise InputRefused("DT302", f"assets() must name plain files (got {name!r})")
        (folder / name).write_text(text, encoding="utf-8")
    for path in source.assets:
        shutil.copyfile(path, folder / path.name)
