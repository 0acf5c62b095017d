"""Interleaving, with a clock of our own: what is planted must be found, whatever the machine does meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from deploytool.bench.blocks import Block, measure, undisturbed
from deploytool.bench.compare import summarize
from deploytool.bench.noise import noise_floor
from deploytool.errors import InputRefused

COSTS = {"load_s": 0.5, "cold_start_ms": 600.0, "peak_rss_bytes": 1000}


class Machine:
    """A clock, and a factor by which everything is slower at a time."""

    def __init__(self, slowness: Callable[[float], float] = lambda now: 1.0):
        self.now = 0.0
        self.slowness = slowness

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float) -> float:
        taken = seconds * self.slowness(self.now)
        self.now += taken
        return taken * 1e3

    def guard(self) -> float:
        return self.spend(0.01)


class Program:
    """Takes `milliseconds` with lognormal noise; keeps who ran in `trace`."""

    def __init__(self, name: str, machine: Machine, milliseconds: float, noise: float = 0.015, seed: int = 0):
        self.name, self.machine, self.seconds, self.noise = name, machine, milliseconds / 1e3, noise
        self.rng = np.random.default_rng([seed, *name.encode()])
        self.trace: list[str] = []

    def time_block(self, seconds: float) -> list[float]:
        self.trace.append(self.name)
        end = self.machine.now + seconds
        times = []
        while not times or self.machine.now < end:
            times.append(self.machine.spend(self.seconds * float(np.exp(self.noise * self.rng.standard_normal()))))
        return times

    def rest(self) -> None:
        self.machine.spend(0.02)


def verdicts(machine: Machine, references: dict[str, float], seed: int, budget: float = 10.0) -> dict[str, str]:
    """The verdicts on a candidate of 10 ms against references of so many milliseconds."""
    programs = {name: Program(name, machine, ms, seed=seed) for name, ms in references.items()}
    blocks = measure(Program("candidate", machine, 10.0, seed=seed), programs, machine.guard,
                     budget_seconds=budget, seed=seed, clock=machine.clock)  # fmt: skip
    result = summarize(blocks, dict.fromkeys(["", *references], COSTS), seed=seed)
    return {name: entry["verdict"] for name, entry in result["against"].items()}


@pytest.mark.parametrize(
    "slowness",
    [lambda now: 1.0, lambda now: 1 + 0.02 * now, lambda now: 1.15 if int(now / 3) % 2 else 1.0],
    ids=["steady", "drifting", "stepping"],
)
def test_planted_twelve_percent(slowness: Callable[[float], float]) -> None:
    """A candidate that is 12 % slower is called slower, and an equal one is not, on any kind of machine."""
    for seed in range(10):
        found = verdicts(Machine(slowness), {"quicker": 10 / 1.12, "equal": 10.0, "lazier": 11.2}, seed, budget=20)
        assert (found["quicker"], found["lazier"]) == ("slower", "faster")
        assert found["equal"] in ("same", "undecided")


def test_equal_programs_are_the_same() -> None:
    """On a steady machine equal programs are called the same."""
    assert [verdicts(Machine(), {"equal": 10.0}, seed)["equal"] for seed in range(10)] == ["same"] * 10


def test_blocks_are_interleaved_in_random_order() -> None:
    """Every block is ABBA or BAAB, both occur, each reference gets as many, and the seed fixes the order."""
    machine = Machine()
    programs = {name: Program(name, machine, 5.0) for name in ("r", "s")}
    candidate = Program("c", machine, 5.0)
    blocks = measure(candidate, programs, machine.guard, budget_seconds=20, seed=3, clock=machine.clock)
    assert {b.order for b in blocks} == {"ABBA", "BAAB"}
    assert abs(sum(b.reference == "r" for b in blocks) - sum(b.reference == "s" for b in blocks)) == 0
    assert all(len(b.candidate_ms) == len(b.reference_ms) == 2 for b in blocks)
    machine = Machine()
    programs = {name: Program(name, machine, 5.0) for name in ("r", "s")}
    again = measure(Program("c", machine, 5.0), programs, machine.guard, budget_seconds=20, seed=3, clock=machine.clock)
    assert again == blocks


def test_engine_rests_before_another_is_timed() -> None:
    """Whoever was timed waits for its threads to sleep before the other side, or the guard, has its turn."""
    events: list[str] = []

    class Recorder(Program):
        def time_block(self, seconds: float) -> list[float]:
            events.append(self.name)
            return super().time_block(seconds)

        def rest(self) -> None:
            events.append(f"{self.name} rests")

    machine = Machine()

    def guard() -> float:
        events.append("guard")
        return machine.guard()

    measure(Recorder("a", machine, 5.0), {"b": Recorder("b", machine, 5.0)}, guard,
            budget_seconds=3, seed=0, clock=machine.clock)  # fmt: skip
    for now, following in pairwise(events):
        if now in ("a", "b"):
            assert following in (now, f"{now} rests")


def test_disturbed_blocks_are_not_used() -> None:
    """Blocks next to which the guard kernel moved by more than 25 % are counted and left out."""
    quiet = [Block("r", "ABBA", ((10.0,), (10.0,)), ((20.0,), (20.0,)), (1.0, 1.01))] * 8
    loud = [Block("r", "ABBA", ((99.0,), (99.0,)), ((20.0,), (20.0,)), (1.0, 1.4))] * 2
    assert undisturbed(quiet + loud) == quiet
    result = summarize(quiet + loud, {"": COSTS, "r": COSTS}, seed=0)
    assert (result["blocks"], result["disturbed_blocks"]) == (8, 2)
    assert result["against"]["r"]["speedup"] == pytest.approx(2)
    assert result["p50_ms"] == 10.0
    assert [raw["used"] for raw in result["block_medians_ms"]["r"]] == [True] * 8 + [False] * 2


def test_noisy_machine_ends_undecided() -> None:
    """When the guard never stands still, the measurement ends within twice the budget, and decides nothing."""
    rng = np.random.default_rng(0)
    machine = Machine(lambda now: float(np.exp(rng.choice([-1.0, 1.0]))))
    programs = {"r": Program("r", machine, 30.0)}
    blocks = measure(Program("c", machine, 10.0), programs, machine.guard, budget_seconds=5, seed=0,
                     clock=machine.clock)  # fmt: skip
    assert machine.now < 2 * 5 + 5
    result = summarize(blocks, {"": COSTS, "r": COSTS}, seed=0)
    assert result["against"]["r"]["verdict"] == "undecided"
    assert result["disturbed_blocks"] > 0
    assert any("disturbed" in note for note in result["notes"])


def test_reference_with_disturbed_blocks_only() -> None:
    """A reference all of whose blocks were disturbed is told, but nothing is decided from it."""
    quiet = [Block("r", "ABBA", ((10.0,), (10.0,)), ((20.0,), (20.0,)), (1.0, 1.0))] * 8
    loud = [Block("s", "ABBA", ((10.0,), (10.0,)), ((30.0,), (30.0,)), (1.0, 2.0))] * 6
    against = summarize(quiet + loud, {"": COSTS, "r": COSTS, "s": COSTS}, seed=0)["against"]
    assert against["r"]["verdict"] == "faster"
    assert against["s"]["verdict"] == "undecided"
    assert (against["s"]["p50_ms"], against["s"]["speedup"]) == (30.0, pytest.approx(3.0))
    assert against["s"]["speedup_ci"] is None and against["s"]["speedup_range"] == pytest.approx([3.0, 3.0])


def test_four_blocks_have_a_range_and_no_interval() -> None:
    """With too few blocks for it, the lowest and highest ratio must not pass for a 95 % interval."""
    blocks = [Block("r", "ABBA", ((10.0,), (10.0,)), ((t,), (t,)), (1.0, 1.0)) for t in (18.0, 19.0, 21.0, 24.0, 20.0)]
    few, enough = (summarize(b, {"": COSTS, "r": COSTS}, seed=0)["against"]["r"] for b in (blocks[:4], blocks))
    assert few["speedup_ci"] is None and few["speedup_range"] == pytest.approx([1.8, 2.4])
    assert few["speedup"] == pytest.approx((1.9 * 2.1) ** 0.5) and few["verdict"] == "undecided"
    assert enough["speedup_range"] == pytest.approx([1.8, 2.4]) and enough["speedup_ci"] != enough["speedup_range"]


def test_noise_of_too_few_blocks_is_unknown() -> None:
    """The smallest difference that can be seen follows from an interval: without one it is not told."""
    block = Block("itself", "ABBA", ((10.0,), (10.0,)), ((11.0,), (11.0,)), (1.0, 1.0))
    few, enough = (noise_floor(summarize([block] * n, {"": COSTS, "itself": COSTS}, seed=0)) for n in (3, 5))
    assert few["detectable"] is None and few["run_noise"] == 0.0 and enough["detectable"] == pytest.approx(0.0)


def test_too_short_a_budget_is_said() -> None:
    """One block is timed however small the budget; then the notes say what is missing, and nothing is decided."""
    machine = Machine()
    blocks = measure(Program("c", machine, 5000.0), {"r": Program("r", machine, 9000.0)}, machine.guard,
                     budget_seconds=1, seed=0, clock=machine.clock)  # fmt: skip
    result = summarize(blocks, {"": COSTS, "r": COSTS}, seed=0)
    against = result["against"]["r"]
    assert (against["blocks"], against["verdict"]) == (1, "undecided")
    assert against["speedup_ci"] is None and against["speedup_range"] == [against["speedup"], against["speedup"]]
    assert any("a verdict needs 5); its figures are of all blocks" in note for note in result["notes"])
    assert any("p99 is an estimate: 662 runs" in note for note in result["notes"])


def test_alone() -> None:
    """Without a reference the candidate is timed by itself, and all its runs count."""
    machine = Machine()
    blocks = measure(Program("c", machine, 1.0), {}, machine.guard, budget_seconds=5, seed=0, clock=machine.clock)
    result = summarize(blocks, {"": COSTS}, seed=0)
    assert result["against"] == {}
    assert result["runs"] == sum(len(s) for b in blocks for s in b.candidate_ms + b.reference_ms)
    assert result["p50_ms"] == pytest.approx(1.0, rel=0.02)
    assert result["p50_ms"] < result["p90_ms"] < result["p99_ms"]


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_refuses_no_budget(budget: float) -> None:
    """A budget that is not above zero is refused."""
    machine = Machine()
    with pytest.raises(InputRefused, match="budget"):
        measure(Program("c", machine, 1.0), {}, machine.guard, budget_seconds=budget, seed=0, clock=machine.clock)
