"""What products gain by int8 in ONNX Runtime on this machine: the times of both graphs' nodes by its own profiler.

Fusions rename nodes and join them, but a tensor that is left keeps its name: what lies between the tensors that both
optimized graphs have computes the same in both, and is compared. Products that no such tensor parts (queries, keys and
values of one rounded input; a chain of int8 convolutions) are one group. Nothing is matched by the names of nodes.
Groups that run the same operators on the same shapes, such as those of equal layers, pool their times.
"""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto

from deploytool.backends.ort_generate import session_options
from deploytool.errors import BackendFailed
from deploytool.signature import Feeds

TURNS = 11  # of either graph
_FASTER_SHARE = 0.7  # of the turns: 8 of 11, by chance once in 9 times where both are the same (sign test)
_SLOT_SECONDS = 0.05  # of one graph on one feed in a turn, so that short runs are many
_LEAST_RUNS, _MOST_RUNS = 3, 50
_REST_SECONDS, _REST_STEP_SECONDS = 0.5, 0.01
_NODE = "_kernel_time"


@dataclass(frozen=True)
class Group:
    """Products that are timed together: microseconds in fp32 and in int8, all feeds added up.

    Of each turn, and of each turn of the groups that are alike.
    """

    products: tuple[str, ...]
    fp32_us: tuple[float, ...]
    int8_us: tuple[float, ...]

    @property
    def gains(self) -> list[float]:
        """What int8 saves in each turn, smallest first."""
        return sorted(a - b for a, b in zip(self.fp32_us, self.int8_us, strict=True))

    @property
    def gain_us(self) -> float:
        """The median of the turns."""
        return float(np.median(self.gains))

    @property
    def faster(self) -> bool:
        """Whether int8 was quicker in so many turns that it is hardly chance; a few may be another program's."""
        return self.faster_share >= _FASTER_SHARE

    @property
    def faster_share(self) -> float:
        """In which share of the turns int8 was quicker."""
        return sum(gain > 0 for gain in self.gains) / len(self.gains)


def timed_groups(
    plain: ModelProto, rounded: ModelProto, products: Mapping[str, str], feeds: Sequence[Feeds],
    settings: Mapping[str, Any],
) -> list[Group]:  # fmt: skip
    """The products in groups with their times on the feeds.

    `products` maps each one's name to the tensor that it makes in `plain`; `rounded` is the same graph with all of them
    in int8; `settings` are those that the artifact will be opened with. Raises BackendFailed DT504 where the profiler
    does not name the nodes of a graph one by one, or nothing that both graphs have lies behind a product.
    """
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        sides = [_Side(model, settings, f"{folder}/{name}") for name, model in (("fp32", plain), ("int8", rounded))]
        found = grouped_products(plain.graph, [side.graph for side in sides], products)
        runs = [max(pair) for pair in zip(*(side.warm_up(feeds) for side in sides), strict=True)]
        for turn in range(TURNS):
            for side in sides if turn % 2 else sides[::-1]:
                side.turn(feeds, runs)
                rest()
        times = [side.times(runs) for side in sides]
    alike: dict[Any, list[tuple[float, ...]]] = {}
    kinds = [tuple(side.kind(nodes) for side, nodes in zip(sides, places, strict=True)) for _, places in found]
    for kind, (_, places) in zip(kinds, found, strict=True):
        pooled = alike.setdefault(kind, [(), ()])
        pooled[:] = [seen + _added(times[place], places[place]) for place, seen in enumerate(pooled)]
    return [Group(names, *alike[kind]) for kind, (names, _) in zip(kinds, found, strict=True)]


def grouped_products(
    plain: GraphProto, graphs: Sequence[GraphProto], products: Mapping[str, str]
) -> list[tuple[tuple[str, ...], list[list[str]]]]:
    """The products in groups, each with the names of the nodes that compute it in each of the optimized graphs."""
    made = [{name for node in graph.node for name in node.output if name} for graph in graphs]
    shared = set.intersection(*made)
    parts = _Parts()
    for place, graph in enumerate(graphs):
        for node in graph.node:
            own = [name for name in node.input if name in made[place] - shared]
            parts.join((place, node.name), *((name if name in shared else (place, f"{name}:made"))
                                             for name in [*filter(None, node.output), *own]))  # fmt: skip
    reached = {product: _behind(plain, tensor, shared) for product, tensor in products.items()}
    for product, names in reached.items():
        if not names:
            raise BackendFailed("DT504", f"ONNX Runtime's graphs must have a tensor behind {product} in common")
        parts.join(*names)
    found: dict[Any, list[str]] = {}
    for product, names in reached.items():
        found.setdefault(parts.of(names[0]), []).append(product)
    return [(tuple(names), [[node.name for node in graph.node if parts.of((place, node.name)) == part]
                            for place, graph in enumerate(graphs)]) for part, names in found.items()]  # fmt: skip


def _behind(plain: GraphProto, tensor: str, shared: Set[str]) -> list[str]:
    """The first shared tensors that follow from one: itself, or those of the nodes that read it."""
    users: dict[str, list[str]] = {}
    for node in plain.node:
        for name in node.input:
            users.setdefault(name, []).extend(node.output)
    ahead, seen, found = [tensor], {tensor}, []
    while ahead:
        name = ahead.pop()
        if name in shared:
            found.append(name)
            continue
        fresh = [after for after in users.get(name, ()) if after not in seen]
        seen.update(fresh)
        ahead += fresh
    return found


class _Parts:
    """Disjoint sets of anything that can be hashed."""

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def of(self, one: Any) -> Any:
        """What stands for the set that this is in."""
        while (above := self._above.setdefault(one, one)) != one:
            one = above
        return one

    def join(self, first: Any, *others: Any) -> None:
        for other in others:
            self._above[self.of(other)] = self.of(first)


class _Side:
    """One graph's session, which writes down what it runs; `graph` is what ONNX Runtime made of it."""

    def __init__(self, model: ModelProto, settings: Mapping[str, Any], prefix: str) -> None:
        options = session_options(settings)
        options.optimized_model_filepath = f"{prefix}.onnx"
        options.enable_profiling, options.profile_file_prefix = True, prefix
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"],
                                                 disabled_optimizers=list(settings.get("without", ())))  # fmt: skip
        except Exception as error:  # the library raises a class of its own per status, without a common base
            raise BackendFailed("DT504", f"ONNX Runtime must open the graph (got: {error})"[:2000]) from error
        self.graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        self._warm = 0
        # Node -> its operator and shapes; the profiler does not show those of weights that were packed.
        weights = {tensor.name: list(tensor.dims) for tensor in self.graph.initializer}
        self._seen = {node.name: {f"{node.op_type} {[weights.get(name) for name in node.input]}"}
                      for node in self.graph.node}  # fmt: skip

    def warm_up(self, feeds: Sequence[Feeds]) -> list[int]:
        """Run each feed twice; how many runs of each fill its part of a turn."""
        counts = []
        for one in feeds:
            self._session.run(None, dict(one))
            start = time.perf_counter()
            self._session.run(None, dict(one))
            seconds = time.perf_counter() - start
            counts.append(1 + min(_MOST_RUNS, max(_LEAST_RUNS, round(_SLOT_SECONDS / seconds))))
        self._warm = 2 * len(feeds)
        return counts

    def turn(self, feeds: Sequence[Feeds], runs: Sequence[int]) -> None:
        for one, count in zip(feeds, runs, strict=True):
            for _ in range(count):
                self._session.run(None, dict(one))

    def kind(self, nodes: Sequence[str]) -> tuple[Any, ...]:
        """What these nodes were seen to run, and on which shapes: the same for those of equal layers."""
        return tuple(sorted(tuple(sorted(self._seen[name])) for name in nodes))

    def times(self, runs: Sequence[int]) -> dict[str, np.ndarray]:
        """Microseconds of each node, by turn: of each feed the mean of the quicker half of its runs, added up.

        The first run of a feed in a turn is left out: it finds threads asleep and caches full of something else.
        """
        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
        shape = (len(starts), len(self.graph.node))
        place = {node.name: index for index, node in enumerate(self.graph.node)}
        nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_NODE)]
        unknown = {event["name"].removesuffix(_NODE) for event in nodes} - place.keys()
        if unknown or len(place) < len(self.graph.node) or len(starts) != self._warm + TURNS * sum(runs):
            got = ", ".join(sorted(unknown)[:3]) or "two of one name, or runs left out"
            raise BackendFailed("DT504", f"ONNX Runtime's profiler must name each node of its graph once (got {got})")
        seen = np.zeros(shape)
        for event in nodes:
            run = bisect.bisect_right(starts, event["ts"]) - 1
            name, about = event["name"].removesuffix(_NODE), event["args"]
            seen[run, place[name]] += event["dur"]
            self._seen[name].add(f"{about['input_type_shape']} {about['output_type_shape']}")
        turns = seen[self._warm :].reshape(TURNS, sum(runs), -1)
        ends = np.cumsum(runs)
        quick = sum(_quicker(turns[:, end - count + 1 : end]) for end, count in zip(ends, runs, strict=True))
        return {name: np.asarray(quick)[:, index] for name, index in place.items()}


def _quicker(times: np.ndarray) -> np.ndarray:
    """[turns, runs, nodes] -> [turns, nodes]: the mean of the quicker half of the runs.

    What other programs take is only ever added; and a mean, since the clock counts whole microseconds.
    """
    mean: np.ndarray = np.sort(times, axis=1)[:, : (times.shape[1] + 1) // 2].mean(axis=1)
    return mean


def _added(times: Mapping[str, np.ndarray], nodes: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(turn) for turn in sum((times[name] for name in nodes), np.zeros(TURNS)))


def rest() -> None:
    """Wait until this process's idle threads sleep: those of ONNX Runtime spin on, beside what is timed next."""
    end = time.perf_counter() + _REST_SECONDS
    while time.perf_counter() < end:
        used = time.process_time()
        time.sleep(_REST_STEP_SECONDS)
        if time.process_time() - used < 0.1 * _REST_STEP_SECONDS:
            return
