"""What the `[build]` table of a profile may hold, one class per backend. Light: nothing heavy is imported here.

A value left out takes its default. Layer and node names are those of the model (`encoder.layer.0.output.dense`) or of
the lowered graph (`/encoder/layer.0/output/dense/MatMul`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from deploytool.backends import ort_optimizers
from deploytool.errors import nearest
from deploytool.settings import Table


class NoSettings(Table):
    """A backend without build settings."""


class TorchScriptBuild(Table):
    """`optimize`: run `torch.jit.optimize_for_inference` when the artifact is opened.

    method   "trace"; "script": torch.jit.script, of the modules whose code decides by values where tracing finds them,
             else of the model; "auto": the first, or where it is wrong the other
    """

    optimize: bool = True
    method: Literal["auto", "trace", "script"] = "auto"


class InductorBuild(Table):
    """`cpu`: the instructions to compile for: "native" of the machine that builds, or "avx2".

    keep_program   leave the exported program beside the package, for `verify --bisect`; it is no part of the artifact
    """

    cpu: Literal["native", "avx2"] = "native"
    keep_program: bool = True


class ExecuTorchBuild(Table):
    """`largest` maps free dimensions to the largest size that the program takes; left out: the samples' largest.

    The rest is of int8.

    scheme        "dynamic": inputs of linears are rounded in ranges taken on every call, those of convolutions in
                  ranges fixed by calibration; "static": all are fixed, sums and products of tensors too; "auto": the
                  first of both, or where convolutions prevail the other, unless it loses too much on calibration feeds
    exclude       names of layers that stay fp32; a name that does not exist is refused
    calibration_samples   how many calibration feeds are read
    """

    largest: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    scheme: Literal["auto", "dynamic", "static"] = "auto"
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    calibration_samples: int = Field(default=32, ge=1, le=10_000)


class KeepFp32(Table):
    """Which layers a quantizer leaves alone.

    keep_fp32   how many of the most sensitive layers stay fp32; left out: the backend's own default for this model
    exclude     names of layers that stay fp32 in any case; a name that does not exist is refused
    samples     how many of the calibration feeds the ranking reads
    """

    keep_fp32: int | None = Field(default=None, ge=0, le=10_000)
    exclude: tuple[str, ...] = Field(default=(), strict=False)
    samples: int = Field(default=4, ge=1, le=10_000)


class FbgemmBuild(KeepFp32):
    """`weight_bits` 7 cannot saturate on CPUs without VNNI; 8 is more exact where the CPU has it.

    scheme        "dynamic": ranges of activations are taken on every call, linear and recurrent layers only; "static":
                  they are fixed by calibration, convolutions and linears; "auto": those that the model has learned,
                  else static where convolutions prevail
    calibration   of "static": how ranges follow from the feeds. "percentile" leaves out 0.01 % at either end
    embeddings    of "dynamic": embedding tables as 8-bit rows, four times smaller, a little less exact
    engine        which of torch's engines computes int8: "auto" is "fbgemm", or "qnnpack" on ARM; "x86" has oneDNN's
                  convolutions on CPUs with VNNI, "onednn" its products too
    method        as in TorchScriptBuild
    """

    scheme: Literal["auto", "dynamic", "static"] = "auto"
    calibration: Literal["histogram", "min-max", "percentile"] = "histogram"
    weight_bits: Literal[7, 8] = 7
    recurrent: bool = True
    embeddings: bool = False
    engine: Literal["auto", "fbgemm", "x86", "onednn", "qnnpack"] = "auto"
    method: Literal["auto", "trace", "script"] = "auto"


class InductorInt8Build(KeepFp32, InductorBuild):
    """`weight_bits` 7 cannot saturate on CPUs without VNNI; 8 is more exact where the CPU has it.

    scheme                "dynamic": linears, with ranges of activations taken on every call; "static": convolutions and
                          linears, in ranges that calibration fixes; "auto": those that the model has learned, else
                          convolutions static, and linears too where convolutions prevail, else dynamic
    calibration           of static layers: how ranges follow from the feeds. "percentile" leaves out 0.01 % at either
                          end; "auto" takes the one that loses least on the feeds
    calibration_samples   how many calibration feeds are read

    `keep_fp32` and `samples` are for dynamic layers.
    """

    scheme: Literal["auto", "dynamic", "static"] = "auto"
    calibration: Literal["auto", "histogram", "min-max", "percentile"] = "auto"
    calibration_samples: int = Field(default=32, ge=1, le=10_000)
    weight_bits: Literal[7, 8] = 7


_DYNAMIC_OPS = ("MatMul", "LSTM", "Attention")
_INT8_OPS = {"static": ("MatMul", "Conv"), "weights": ()}
# What ONNX Runtime calls the inputs that a product of low-bit weights computes with.
ACCURACY_LEVELS = {"fp32": 1, "int8": 4}
GROUPS = (16, 32, 64, 128)


class OnnxRuntimeBuild(KeepFp32):
    """`optimization` and what is of the session hold for every precision.

    optimization   how far ONNX Runtime rewrites the graph when it is opened
    without        names of ONNX Runtime's optimizers that are left out of that, such as "SkipLayerNormFusion"
    arena          whether the session keeps the memory that it took: faster, and larger after a long input
    flush          whether denormal numbers count as zero: arithmetic on them is many times slower on x86. The first
                   session of a process decides for all
    fuse           of fp32 and weights alone: a language model's attention, norms and products become ONNX Runtime's own
                   operators
    scheme         int8: "dynamic" rounds the inputs of products too, in ranges taken on every call; "static" in ranges
                   that calibration fixes; "weights" the weights alone. int4 rounds weights
    op_types       operators that become int8. Dynamic: "MatMul" (which covers Gemm), "LSTM", "Attention", "Gather",
                   "Conv", the first three where left out; static: "MatMul" and "Conv"
    reduce_range   dynamic and static: 7-bit weights where 8 bits could saturate on CPUs without VNNI
    format         "ort": the optimized graph in ONNX Runtime's own format, with the file of the operators that it
                   needs, from which a smaller runtime can be built
    mixed          dynamic and static: "sensitivity" leaves the products in fp32 that cost the outputs most; "measured"
                   those that are no faster in int8 on the machine that builds, and of the others those that gain least
                   for what they cost, until the loss is three quarters of what is allowed (see docs/targets.md)
    fp32_ops       fp16: operators that stay fp32, beside those that always do
    calibration    static: how ranges follow from the feeds; "percentile" leaves out 0.001 % at either end, "entropy"
                   cuts where least information is lost, "auto" takes the one that loses least on the feeds
    calibration_samples   static and fp16: how many calibration feeds are read
    group          weights alone: how many weights of a row share a scale
    activations    weights alone: the inputs of a product as "fp32", or per group as "int8", which is faster.
                   "measured", here and in `group`: the quickest on the machine that builds, of all that keep to the
                   profile's limits on the recorded cases
    int8_share     int4: the share of the weights that gets 8 bits, those that lose most

    For weights alone `exclude` takes patterns of weights' names ("*lm_head*"), and `keep_fp32` is not used.
    """

    optimization: Literal["disabled", "basic", "extended", "all"] = "all"
    without: tuple[str, ...] = Field(default=(), strict=False)
    arena: bool = True
    flush: bool = False
    fuse: bool = True
    format: Literal["onnx", "ort"] = "onnx"
    fp32_ops: tuple[str, ...] = Field(default=(), strict=False)
    scheme: Literal["dynamic", "static", "weights"] = "dynamic"
    op_types: tuple[Literal["MatMul", "LSTM", "Attention", "Gather", "Conv"], ...] = Field(default=(), strict=False)
    mixed: Literal["sensitivity", "measured"] = "sensitivity"
    reduce_range: bool = True
    calibration: Literal["auto", "min-max", "percentile", "entropy"] = "auto"
    calibration_samples: int = Field(default=32, ge=1, le=10_000)
    group: Literal[16, 32, 64, 128, "measured"] = 64
    activations: Literal["fp32", "int8", "measured"] = "int8"
    int8_share: float = Field(default=0.0, ge=0, le=1)

    @property
    def int8_ops(self) -> tuple[str, ...]:
        """`op_types`, or where they are left out those of the scheme."""
        return self.op_types or _INT8_OPS.get(self.scheme, _DYNAMIC_OPS)

    @model_validator(mode="after")
    def _known_to_the_scheme(self) -> Self:
        if unknown := [name for name in self.without if name not in ort_optimizers.NAMES]:
            raise ValueError("must have names of ONNX Runtime's optimizers in without, which it passes over otherwise "
                             f"(got {', '.join(unknown)}; {nearest(unknown[0], ort_optimizers.NAMES)})")  # fmt: skip
        if self.scheme == "static" and (others := set(self.op_types) - set(_INT8_OPS["static"])):
            raise ValueError(f'must have "MatMul" and "Conv" alone in op_types for static int8 (got {sorted(others)})')
        if self.mixed == "measured" and self.keep_fp32 is not None:
            raise ValueError('must leave keep_fp32 out with mixed = "measured", which counts by itself '
                             f"(got {self.keep_fp32})")  # fmt: skip
        return self


class OpenVinoBuild(KeepFp32):
    """`stateful` and `hint` hold for every precision, the rest for int8 and int4 only.

    hint                  "latency": all threads work on one request; "throughput": they are divided, for a server that
                          has several requests under way, of which each takes longer
    stateful              a language model's cache is kept in the engine while it decodes; left out: where it has one
    weights_only          weights in int8 (or int4, which is always so), activations as `activation_group` says
    activation_group      numbers of a row of activations that the engine rounds to 8 bits together, with a scale that
                          it finds as it runs: 0 leaves them in floating point, "widest" is the most that all products
                          take; left out: the engine's own choice, 32 on CPUs that multiply bytes. Of weights_only
    method                of int4: "plain" rounds to the nearest; the others read calibration feeds
    group_size            of int4: weights that share a scale, along the input; smaller where it does not divide them
    int4_share            of int4: share of the weights that become int4, least sensitive first; the rest is int8
    scheme                "transformer" leaves softmax and norms alone and moves outliers from activations to weights;
                          "unsmoothed" does not move them; "plain" quantizes everything; "auto" takes the ranges that
                          the model has learned; else, by the loss on the calibration feeds, of the first two where the
                          graph holds attention, and of all three elsewhere
    preset                "mixed": asymmetric activations; "performance": symmetric ones
    calibration_samples   how many calibration feeds NNCF reads
    max_drop              of int8: the share of the model's first metric that may be lost, by its own evaluate(): layers
                          go back to fp32, those that cost most first, until it is kept
    """

    hint: Literal["latency", "throughput"] = "latency"
    stateful: bool | None = None
    weights_only: bool = False
    activation_group: Annotated[int, Field(ge=0, le=65536)] | Literal["widest"] | None = None
    method: Literal["plain", "scale-estimation", "awq", "gptq"] = "gptq"
    group_size: int = Field(default=64, ge=8, le=4096)
    int4_share: float = Field(default=1.0, gt=0, le=1)
    scheme: Literal["auto", "transformer", "unsmoothed", "plain"] = "auto"
    preset: Literal["mixed", "performance"] = "mixed"
    calibration_samples: int = Field(default=32, ge=1, le=10_000)
    max_drop: float | None = Field(default=None, ge=0, le=1)


class SizeRange(Table):
    """Sizes of one free dimension that an engine takes, and the one that it is tuned for."""

    min: int = Field(ge=0)  # a cache may be empty
    opt: int = Field(ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError("must hold min <= opt <= max")
        return self


class TensorRtBuild(KeepFp32):
    """`profile` maps free dimensions to sizes; those left out are read from calibration feeds and parity cases.

    `fp32_ops` are operators of the ONNX graph that stay fp32 in what is fp16 or bf16, beside those that always do.
    `calibration` and `calibration_samples` are for int8 and fp8 of a model without learned scales, as in ONNX Runtime's
    static int8, but with ranges around zero; int4 reads as many feeds.

    rest    of int8, fp8 and int4: what computes between the grids, and the layers that `keep_fp32` leaves alone
    group   of int4: how many inputs share a scale, smaller where it does not divide them
    """

    profile: dict[str, SizeRange] = Field(default_factory=dict)
    fp32_ops: tuple[str, ...] = Field(default=(), strict=False)
    calibration: Literal["auto", "min-max", "percentile", "entropy"] = "auto"
    calibration_samples: int = Field(default=32, ge=1, le=10_000)
    rest: Literal["fp32", "fp16", "bf16"] = "fp32"
    group: Literal[16, 32, 64, 128] = 64
