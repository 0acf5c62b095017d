"""What an AOTInductor package runs: what was written down of the graph when it was compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.ran import Node
from deploytool.signature import Feeds
from deploytool.storage import read_json

KERNELS = "kernels.json"


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """The products, with the flops that they have for `feeds`, and the loops of elementwise code around them.

    Raises ValueError where the code does not call as many whole-number kernels as the graph had: then the graph is not
    what runs.
    """
    told = read_json(artifact.folder / KERNELS)
    sizes = artifact.signature.bind(feeds)
    products = [Node(entry["op"], entry["precision"], _evaluated(entry["flops"], sizes)) for entry in told["products"]]
    whole, called = sum(node.precision == "int8" for node in products), int8_calls(told["calls"])
    if whole != called:
        raise ValueError(f"the compiled graph has {whole} whole-number products, and its code calls {called}")
    return "the graph that AOTInductor compiled", [*products, *(Node("loop", "fp32", 0, True),) * told["loops"]]


def int8_calls(calls: Mapping[str, int]) -> int:
    """How many calls of the written code are whole-number products."""
    return sum(count for name, count in calls.items() if name.startswith(("qlinear", "qconv")))


def _evaluated(terms: Sequence[Sequence[Any]] | None, sizes: Mapping[str, int]) -> int | None:
    if terms is None:
        return None
    total: int = sum(int(factor) * math.prod(sizes[dim] ** int(power) for dim, power in powers.items())
                     for factor, powers in terms)  # fmt: skip
    return total
