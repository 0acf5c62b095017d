"""What TensorRT does not take, in words: which operator, which node, why, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from deploytool.errors import BackendFailed, InputRefused

_SHOWN = 5
_NO_OPERATOR = "TensorRT has no such operator"
_TOO_OLD = re.compile(
    r"Cannot compile (?:for target\(s\) (?P<devices>[\w, ]+), because the model contains HW-specific datatypes: "
    r"(?P<types>[\w, ]+)|operation '(?P<node>[^']*)' for (?P<device>[^:]+): (?P<why>[^.]*))"
)
# By operators, or by what the parser says of any.
_FLOATS = "give the float model: precision = "
_ADVICE = (
    (r"^(DFT|STFT)$", "write the transform as products with fixed matrices of cosines and sines"),
    (r"zero.?point", _FLOATS + '"int8" in the profile makes grids around zero, which it takes'),
    (r"^(DynamicQuantizeLinear|MatMulInteger|ConvInteger|QLinear\w+)$",
     _FLOATS + '"int8" in the profile makes the Q/DQ pairs that it takes'),
    (r"^(MatMulNBits|GatherBlockQuantized)$", _FLOATS + '"int4" in the profile rounds weights'),
    (r"String|Tokenizer|Unsupported data type", "turn text into numbers before the model"),
    (r"^(\w*Attention|(Skip|Embed|Simplified)\w*Normalization|RotaryEmbedding|FusedMatMul|FastGelu|BiasGelu)$",
     "give the graph as it was exported, without ONNX Runtime's fusions"),
    (r"^(Sequence\w+|ConcatFromSequence|SplitToSequence)$", "write lists of tensors as one tensor"),
)  # fmt: skip


class Refusal(NamedTuple):
    """One error of the parser."""

    operator: str
    node: str
    words: str


def refused(errors: Sequence[Refusal]) -> InputRefused:
    """The error for operators that the parser did not take, each with its node."""
    detail = [f"operator {e.operator or '?'}, node {e.node or '?'}: {_why(e.words)}"[:300] for e in errors[:_SHOWN]]
    advice = dict.fromkeys(text for e in errors for pattern, text in _ADVICE
                           if re.search(pattern, e.operator) or re.search(pattern, e.words, re.IGNORECASE))  # fmt: skip
    fix = ", or ".join([*(advice or ["replace these operators in the model"]), "choose another target"])
    return InputRefused(
        "DT310", f"TensorRT must know every operator of the graph (got {len(errors)} that it does not take)",
        detail=detail, fix=fix,
    )  # fmt: skip


def not_built(lines: Sequence[str]) -> BackendFailed:
    """The error for an engine that the compiler did not give, in its own words; names device and node where it does."""
    found = next((match for line in lines if (match := _TOO_OLD.search(line))), None)
    message, fix = "(it gave none)", "change [build.profile], or the compute capabilities of the profile"
    if found is not None:
        devices = (found["devices"] or found["device"]).upper()
        message = (f"for {devices} (they have no {found['types']})" if found["types"]
                   else f"for {devices} (node {found['node']!r}: {found['why']})")  # fmt: skip
        fix = "take these compute capabilities out of the profile, or let the node compute in fp16"
    return BackendFailed("DT504", f"TensorRT must build the engine {message}", detail=lines[-_SHOWN:], fix=fix)


def _why(words: str) -> str:
    """The parser's words without its source code; "false" is all that it says of an operator that it has not."""
    if words in ("", "false") or "plugin" in words.lower():
        return _NO_OPERATOR
    words = words.partition("Assertion failed: ")[2] or words
    plain = re.split(r"&& \"|(?<!:): (?=[A-Za-z])", words, maxsplit=1)[-1]
    return plain.rstrip('"')
