"""Encodings under the names of the graph's constants, and engines that compute with them what PyTorch simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from deploytool.encoding import Coded, Encoding, read_coded, save_coded  # noqa: E402
from deploytool.load.grid import dequantize, quantize, snap  # noqa: E402
from deploytool.lower.encodings import coded, write_encodings  # noqa: E402
from deploytool.lower.onnx import lower_onnx  # noqa: E402
from deploytool.source import Source  # noqa: E402


def _encoding(rows: int, columns: int, group: int, bits: int = 4) -> Encoding:
    generator = torch.Generator().manual_seed(rows)
    groups = -(-columns // group)
    zero = torch.randint(1, 2**bits - 1, (rows, groups), generator=generator).float()
    return Encoding(bits, 0, group, torch.rand(rows, groups, generator=generator) * 0.1 + 0.01, zero)


@pytest.fixture
def quantized(make_source: Callable[..., Source]) -> Source:
    """Two linear layers with and without bias and a square one, all on grids; one layer in floats."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torch.nn.Sequential(
            torch.nn.Linear(80, 48, bias=False), torch.nn.ReLU(), torch.nn.Linear(48, 48), torch.nn.Linear(48, 6)
        ).eval().requires_grad_(False)  # fmt: skip
        x = torch.randn(3, 80)
    encodings = {"0.weight": _encoding(48, 80, 32), "2.weight": _encoding(48, 48, 48)}
    for name, encoding in encodings.items():
        layer = module.get_submodule(name.partition(".")[0])
        layer.weight = torch.nn.Parameter(snap(layer.weight, encoding), requires_grad=False)
    source = make_source(module, {"x": ("batch", 80)}, {"y": ("batch", 6)}, [(x,)])
    return dataclasses.replace(source, module=module, encodings=encodings)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_constants_are_found_by_content(quantized: Source, tmp_path: Path, exporter: Any) -> None:
    """Every encoded weight must be found in the graph of either exporter, and its codes give the constant exactly."""
    artifact = lower_onnx(quantized, tmp_path / "onnx", exporter=exporter)
    assert write_encodings(quantized, artifact.main_file, tmp_path / "e.npz") == []
    matrices = read_coded(tmp_path / "e.npz")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(artifact.main_file).graph.initializer}
    assert len(matrices) == 2 and set(matrices) <= set(constants)
    for name, matrix in matrices.items():
        constant = constants[name]
        assert any(np.array_equal(matrix.values(), array) for array in (constant, constant.T) if
                   array.shape == matrix.codes.shape)  # fmt: skip


def test_a_weight_that_is_not_in_the_graph_is_told(quantized: Source, tmp_path: Path) -> None:
    """An exporter that merged a weight with something else must not pass in silence."""
    artifact = lower_onnx(quantized, tmp_path / "onnx", exporter="torchscript")
    other = torch.nn.Sequential(*(torch.nn.Linear(m.in_features, m.out_features) if isinstance(m, torch.nn.Linear)
                                  else m for m in quantized.module))  # fmt: skip
    other[0].weight = quantized.module[0].weight
    moved = dataclasses.replace(quantized, module=other)
    assert write_encodings(moved, artifact.main_file, tmp_path / "e.npz") == ["2.weight"]


@pytest.mark.parametrize(("columns", "group", "sizes", "expected"), [
    (80, 32, (16, 32, 64), 32), (96, 48, (16, 32, 64), 16), (48, 48, (16, 32, 64), 64), (100, 100, (16, 32), 32),
    (576, 576, (16, 32, 64, 128, 256), 256), (40, 8, (16, 32), None), (130, 64, (16, 32, 64), 64),
])  # fmt: skip
def test_groups_become_blocks(columns: int, group: int, sizes: tuple[int, ...], expected: int | None) -> None:
    """Blocks must be of an allowed size, hold the same values, and be filled up with what counts as 0."""
    encoding = _encoding(5, columns, group)
    codes = quantize(torch.randn(5, columns), encoding)
    matrix = Coded(4, group, codes.numpy(), encoding.scale.numpy(), encoding.zero_point.numpy())
    np.testing.assert_array_equal(matrix.values(), dequantize(codes, encoding).numpy())
    cut = matrix.in_blocks(sizes)
    if expected is None:
        assert cut is None
        return
    assert cut is not None
    blocks, scale, zero = cut
    assert blocks.shape == (5, -(-columns // expected), expected) and scale.shape == zero.shape == blocks.shape[:2]
    values = ((blocks.astype(np.float32) - zero[..., None]) * scale[..., None]).reshape(5, -1)
    np.testing.assert_array_equal(values[:, :columns], matrix.values())
    assert not values[:, columns:].any()


def test_files_come_back(tmp_path: Path) -> None:
    """What is saved must be read again, names with dots and slashes included."""
    matrix = Coded(3, 4, np.ones((2, 4), np.uint8), np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32))
    save_coded(tmp_path / "e.npz", {"a.b/c": matrix, "d": matrix})
    back = read_coded(tmp_path / "e.npz")
    assert set(back) == {"a.b/c", "d"} and back["d"].bits == 3 and back["d"].group == 4
    np.testing.assert_array_equal(back["a.b/c"].codes, matrix.codes)


def _four_bit_product(matrix: Coded) -> bytes:
    """A graph of one MatMulNBits with a matrix's codes."""
    cut = matrix.in_blocks((16, 32, 64, 128, 256))
    assert cut is not None
    codes, scale, zero = cut
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    zeros = np.pad(zero.astype(np.uint8), ((0, 0), (0, zero.shape[1] % 2)))
    constants = {"codes": packed, "scale": scale, "zero": zeros[:, ::2] | (zeros[:, 1::2] << 4)}
    rows, columns = matrix.codes.shape
    node = onnx.helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=columns, N=rows,
                                 bits=4, block_size=codes.shape[2])  # fmt: skip
    graph = onnx.helper.make_graph(
        [node], "g", [onnx.helper.make_tensor_value_info("x", 1, ["n", columns])],
        [onnx.helper.make_tensor_value_info("y", 1, ["n", rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    return bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


def test_the_engine_computes_what_was_simulated(quantized: Source) -> None:
    """ONNX Runtime's 4-bit product on the codes must give the module's linear layer, both of whose groupings fit."""
    for name, columns in (("0.weight", 80), ("2.weight", 48)):
        matrix = coded(quantized, name)
        session = onnxruntime.InferenceSession(_four_bit_product(matrix), providers=["CPUExecutionProvider"])
        x = np.random.default_rng(0).normal(size=(7, columns)).astype(np.float32)
        expected = x @ quantized.module.get_parameter(name).numpy().T
        got = session.run(None, {"x": x})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
