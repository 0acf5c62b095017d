"""Which products of ONNX Runtime's int8 stay fp32, by what each really gains here and by what it costs.

A product whose int8 form is not faster on this machine stays fp32. Of the others those that gain the least for what
they cost the outputs are given back, until the loss on the calibration feeds is what the profile allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from deploytool.backends.base import Request
from deploytool.backends.measured import GIVEN_BACK, INT8, SLOWER, measured
from deploytool.backends.ort_profile import TURNS, timed_groups
from deploytool.errors import InputRefused
from deploytool.signature import Feeds

_LARGEST_BYTES = 1_900_000_000  # a graph in memory must stay below 2 GB
_GOOD_ENOUGH_SHARE = 0.75  # of the allowed loss of cosine: the worst of other inputs may lose more
_NOTHING = 1e-12  # a sensitivity that divides nothing by zero


@dataclass(frozen=True)
class Choice:
    """What the choice is between, and how it is seen what it costs.

    plain      the graph in fp32
    products   the nodes of it that can become int8
    rounded    the graph with all of them in int8
    effects    what each of the named ones costs the outputs alone: the loss of cosine
    loss       what all but the named ones cost together
    feeds      what is timed
    settings   those that the artifact will be opened with
    """

    plain: ModelProto
    products: Sequence[NodeProto]
    rounded: Callable[[], ModelProto]
    effects: Callable[[Sequence[str]], Mapping[str, float]]
    loss: Callable[[Sequence[str]], float]
    feeds: Sequence[Feeds]
    settings: Mapping[str, Any]


def weighed(request: Request, choice: Choice) -> dict[str, Any]:
    """What is measured of every product, and which stay fp32: see `kept`.

    cpu, threads, seconds, turns   where and how long it was measured
    loss, loss_allowed             of cosine, on the calibration feeds, with what was chosen
    operators                      per group of products that cannot be told apart: their names, microseconds in fp32
                                   and in int8 (medians of the turns, all feeds together), the share of turns in which
                                   int8 was quicker, what they cost the outputs alone, and the decision

    Raises InputRefused DT310 for a graph of 2 GB and more, and where what else is int8 loses more than the profile
    allows by itself: giving products back does not help then.
    """
    if choice.plain.ByteSize() > _LARGEST_BYTES:
        raise InputRefused("DT310", "a graph whose operators are timed must be below 2 GB", fix="take mixed out")
    cosine_min = request.target.parity.cosine_min
    table = measured(request, choice.settings, lambda: _weighed(choice, cosine_min))
    if table["loss"] > 1.0 - cosine_min:
        raise InputRefused("DT310", f"int8 must lose at most {1.0 - cosine_min:.3g} of cosine on the calibration feeds "
                           f"(it loses {table['loss']:.3g} with every product back in fp32: by operators that are not "
                           "weighed, such as recurrent layers)",
                           fix="name op_types without those, or choose an fp32 target")  # fmt: skip
    return table


def kept(table: Mapping[str, Any]) -> list[str]:
    """The products of a table that stay fp32."""
    return [name for row in table["operators"] if row["decision"] != INT8 for name in row["names"]]


def nothing_left(table: Mapping[str, Any]) -> InputRefused:
    """What to raise where no operator remains in int8."""
    rows = table["operators"]
    slower = sum(row["decision"] == SLOWER for row in rows)
    return InputRefused(
        "DT310", f"at least one product must become int8 (of {len(rows)} groups {slower} are not faster in it on this "
        f"machine, {len(rows) - slower} lose too much)", fix="choose an fp32 target, or another scheme",
        detail=[f"{row['names'][0]}: {row['fp32_us']} us in fp32, {row['int8_us']} us in int8" for row in rows[:5]],
    )  # fmt: skip


def _weighed(choice: Choice, cosine_min: float) -> dict[str, Any]:
    tensors = {node.name: node.output[0] for node in choice.products}
    groups = timed_groups(choice.plain, choice.rounded(), tensors, choice.feeds, choice.settings)
    slower = [group for group in groups if not group.faster]
    effects = choice.effects([name for group in groups if group.faster for name in group.products])
    costs = {group.products: sum(effects[name] for name in group.products) for group in groups if group.faster}
    ranked = sorted((group for group in groups if group.faster),
                    key=lambda group: group.gain_us / max(costs[group.products], _NOTHING))  # fmt: skip
    allowed = _GOOD_ENOUGH_SHARE * (1.0 - cosine_min)

    @cache
    def loss(count: int) -> float:
        return choice.loss([name for group in [*slower, *ranked[:count]] for name in group.products])

    count = _fewest(loss, len(ranked), allowed)
    back = {group.products for group in ranked[:count]}
    rows = [{"names": list(group.products), "fp32_us": _median(group.fp32_us), "int8_us": _median(group.int8_us),
             "gain_us": round(group.gain_us, 1), "faster_share": round(group.faster_share, 3),
             "sensitivity": costs.get(group.products),
             "decision": SLOWER if not group.faster else GIVEN_BACK if group.products in back else INT8}
            for group in groups]  # fmt: skip
    return {"turns": TURNS, "loss": loss(count), "loss_allowed": allowed, "operators": rows}


def _fewest(loss: Callable[[int], float], most: int, allowed: float) -> int:
    """The fewest groups given back with which the loss is allowed; `most` where it never is.

    More groups in fp32 lose less, but for rounding's luck: halving finds one count that holds while one less does not.
    """
    if most == 0 or loss(0) <= allowed:
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= allowed else (middle, high)
    return high


def _median(times: Sequence[float]) -> float:
    return round(float(np.median(times)), 1)
