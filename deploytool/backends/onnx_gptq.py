"""GPTQ in NumPy for blocks of int4: inputs are rounded one by one, and those that follow make good what was lost.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023 (arXiv 2210.17323), algorithm 1. Here weights are [inputs, outputs], as MatMul has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, helper

from deploytool.signature import Feeds

_DAMPING = 0.01  # of the mean of the diagonal
_RAISES = 6  # times that it grows tenfold where the matrix is not positive definite

Scale = Callable[[np.ndarray, np.ndarray], np.ndarray]


def grams(model: ModelProto, nodes: Sequence[NodeProto], feeds: Sequence[Feeds]) -> dict[str, np.ndarray]:
    """X^T X / rows, float32 [inputs, inputs], of each node's first input over the feeds, by the node's name.

    Nodes that read one tensor share one array.
    """
    if not nodes:
        return {}
    probe = ModelProto()
    probe.CopyFrom(model)
    there = {value.name for value in probe.graph.output}
    names = sorted({node.input[0] for node in nodes})
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in there)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sums: dict[str, np.ndarray] = {}
    rows = dict.fromkeys(names, 0)
    for one in feeds:
        for name, array in zip(names, session.run(names, dict(one)), strict=True):
            x = array.reshape(-1, array.shape[-1])
            sums[name] = sums.get(name, np.float32(0)) + x.T @ x
            rows[name] += len(x)
    return {node.name: sums[node.input[0]] / np.float32(max(rows[node.input[0]], 1)) for node in nodes}


def gptq(
    weight: np.ndarray, gram: np.ndarray, block: int, scale_of: Scale, levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes [inputs, outputs] of whole numbers up to `levels` from zero, and scales [blocks, outputs], float32.

    scale_of   the scale [1, outputs] of a block [block, outputs] of weights with these counts [block] of errors
    """
    rest, root = weight.astype(np.float32), _inverse_root(gram)
    codes = np.empty_like(rest)
    scales = []
    for start in range(0, len(rest), block):
        end = start + block
        scale = scale_of(rest[start:end], np.diag(gram)[start:end])
        scales.append(scale)
        errors = np.empty((block, rest.shape[1]), np.float32)
        for at in range(start, end):
            codes[at] = np.clip(np.round(rest[at] / scale[0]), -levels, levels)
            errors[at - start] = (rest[at] - codes[at] * scale[0]) / root[at, at]
            rest[at + 1 : end] -= np.outer(root[at, at + 1 : end], errors[at - start])
        rest[end:] -= root[start:end, end:].T @ errors
    return codes, np.concatenate(scales)


def _inverse_root(gram: np.ndarray) -> np.ndarray:
    """U, upper triangular, with (H + d I)^-1 = U^T U; inputs that are always zero get a one on the diagonal."""
    wide = gram.astype(np.float64)
    dead = np.diag(wide) == 0
    wide[dead, dead] = 1.0
    damping = _DAMPING * float(np.mean(np.diag(wide)))
    for _ in range(_RAISES):
        try:
            inverse = np.linalg.inv(wide + damping * np.eye(len(wide)))
            return np.asarray(np.linalg.cholesky(inverse).T, np.float32)
        except np.linalg.LinAlgError:
            damping *= 10
    return np.eye(len(wide), dtype=np.float32)  # nothing is carried over: rounding to the nearest
