"""ONNX Runtime's own format, for runtimes that are built small: the optimized graph, and the operators that it needs.

The file of operators is what `build.sh --include_ops_by_config` of ONNX Runtime takes to leave every other kernel out:
https://onnxruntime.ai/docs/build/custom.html
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import onnxruntime as ort
from onnxruntime.tools.ort_format_model import create_config_from_models

from deploytool.errors import BackendFailed

ENTRY = "model.ort"
OPERATORS = "required_operators.config"
_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}


def write_ort(graph: Path, optimization: str, without: list[str]) -> str:
    """Replace a graph by `model.ort` beside it, and write the operators; returns the optimization that was saved.

    What "all" adds to "extended" are layouts of the CPU at hand, which are not for a file. Raises BackendFailed.
    """
    level = optimization if optimization in _LEVELS else "extended"
    out = graph.parent / ENTRY
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = _LEVELS[level]
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)  # the tool's own
            create_config_from_models([out], graph.parent / OPERATORS, False)
    except Exception as error:  # the library raises a class of its own per status, without a common base
        raise BackendFailed("DT504", f"ONNX Runtime must write its own format (got: {error})"[:2000],
                            fix='set format = "onnx"') from error  # fmt: skip
    _without_paths(graph.parent / OPERATORS)
    for path in graph.parent.glob(f"{graph.name}*"):
        path.unlink()
    return level


def _without_paths(config: Path) -> None:
    """Comments name the folder that the file was made in."""
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
