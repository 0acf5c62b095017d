"""The stations of a search on a Ray cluster: one per node, which holds all of the node's processors meanwhile.

A node does one piece of work at a time, so that nothing of the search runs beside a timing, and Ray places nothing else
there. Only nodes that are like this machine take part, since timings of others stand for other artifacts. Every node
must see the search's folder, the models and deploytool's cache at the same paths.
Source: https://docs.ray.io/en/latest/ray-core/scheduling/index.html (node affinity).
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deploytool.errors import BackendFailed, DeployError, EnvironmentLacking, from_json
from deploytool.tune.engine import Nowhere
from deploytool.tune.station import Station, Terms, machine

T = TypeVar("T")
R = TypeVar("R")

_JOIN_SECONDS = 120.0
_LOOK_SECONDS = 1.0
_KNOCK_SECONDS = 10.0
# Ray sets some of these for its workers: an engine must have the threads and devices that it has without Ray.
_SAME = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
         "DEPLOYTOOL_CACHE")  # fmt: skip
_LOCAL = "local"


def import_ray(address: str | None) -> Any:
    """Ray, told to report nothing to anybody; without an address it stays on this machine's loopback.

    Raises EnvironmentLacking (DT401) where it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # by its effect: listen on 127.0.0.1 alone
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray writes one to the home folder
    try:
        import ray
    except ImportError as error:
        raise EnvironmentLacking("DT401", f"--engine ray must be able to import ray (got: {error})",
                                 fix="pip install 'deploytool[ray]'") from error  # fmt: skip
    return ray


class Member:
    """A node's process: it does pieces of work and answers with JSON-like data, errors included."""

    def __init__(self, make: Callable[[Terms], Station], terms: Terms, folder: str, variables: Mapping[str, str]):
        for name in _SAME:
            os.environ.pop(name, None)
        os.environ.update(variables)
        self._folder, self._make, self._terms = folder, make, terms
        self._station: Station | None = None

    def join(self) -> dict[str, Any]:
        """Open the station; what timings depend on here."""
        os.chdir(self._folder)
        for path in self._terms.cases:
            path.stat()
        self._station = self._make(self._terms)
        return machine()

    def do(self, piece: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """{"value": what a piece of work gave} or {"error": what it raised}."""
        try:
            return {"value": getattr(self._station, piece)(**arguments)}
        except DeployError as error:
            return {"error": error.to_json()}


class Cluster:
    """The engine: members of the nodes that can be used; `ray` is the module, connected."""

    def __init__(self, ray: Any, terms: Terms, make: Callable[[Terms], Station], say: Callable[[str], None]):
        self._ray, self._terms, self._make, self._say = ray, terms, make, say
        self._free: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._members: dict[str, Any] = {}
        self._left_out: list[str] = []
        self._closed = False
        for name, member in self._joined(self._nodes()).items():
            self._members[name] = member
            self._free.put((name, member))
        self.width = len(self._members)
        if not self.width:
            raise EnvironmentLacking("DT406", "a node of the cluster must be free and like this machine (none is)",
                                     detail=self._left_out[:12],
                                     fix="wait until nodes are free, or start the search on one of them")  # fmt: skip
        self._pool = ThreadPoolExecutor(self.width)

    def close(self) -> None:
        """Let the nodes go, whatever they do."""
        self._closed = True
        for member in self._members.values():
            self._ray.kill(member)
        self._pool.shutdown(cancel_futures=True)

    def run(self, piece: str, /, **arguments: Any) -> Any:
        """Do a piece of work at the next free node; BackendFailed (DT501) when the process there dies.

        A round of many is no one's fault: it is done once more.
        """
        try:
            return self._run(piece, arguments)
        except BackendFailed as error:
            if piece != "round" or error.code != "DT501" or self._closed:
                raise
            return self._run(piece, arguments)

    def _run(self, piece: str, arguments: Mapping[str, Any]) -> Any:
        name, member = self._next()
        try:
            answer: dict[str, Any] = self._ray.get(member.do.remote(piece, arguments))
        except self._ray.exceptions.RayActorError as error:
            if not self._closed:
                self._replace(name)
            raise BackendFailed("DT501", f"the worker on node {name} must answer (it died)",
                                detail=str(error).splitlines()[:1]) from error  # fmt: skip
        except BaseException:
            self._free.put((name, member))
            raise
        self._free.put((name, member))
        if "error" in answer:
            raise from_json(answer["error"])
        return answer["value"]

    def _next(self) -> tuple[str, Any]:
        while self._members and not self._closed:
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=_LOOK_SECONDS)
        raise Nowhere("DT406", "a node of the cluster must be left (all are gone)", detail=self._left_out[:12])

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function of every item, in the items' order, at all nodes."""
        return list(self._pool.map(function, items))

    def clear(self) -> None:
        """End every process that was opened for timing; a member that has died meanwhile is replaced."""

        def cleared(_: int) -> None:
            with contextlib.suppress(BackendFailed):
                self.run("clear")

        self.map(cleared, range(len(self._members)))  # all are free, and each waits once behind the others

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]

    def _joined(self, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The members of those nodes that have joined in time and are like this machine, by a short name."""
        asked = {node["NodeID"]: self._member(node) for node in nodes}
        joins = {member.join.remote(): (node, member) for node, member in asked.items()}
        ready, late = self._ray.wait(list(joins), num_returns=len(joins), timeout=_JOIN_SECONDS) if joins else ([], [])
        found = {}
        for answer in [*ready, *late]:
            node, member = joins[answer]
            reason = "it is not free" if answer in late else self._unlike(answer)
            if reason:
                self._left_out.append(f"node {node[:8]}: {reason}")
                self._say(f"{self._left_out[-1]}; it is left out")
                self._ray.kill(member)
            else:
                found[node[:8]] = member
        return found

    def _member(self, node: Mapping[str, Any]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        kind = self._ray.remote(num_cpus=node["Resources"]["CPU"], scheduling_strategy=there)(Member)
        same = {name: os.environ[name] for name in _SAME if name in os.environ}
        return kind.remote(self._make, self._terms, os.getcwd(), same)

    def _unlike(self, answer: Any) -> str:
        """Why a node that answered cannot take part; "" where it can."""
        try:
            theirs, ours = self._ray.get(answer), machine()
        except Exception as error:  # whatever joining raised there
            return f"it cannot join ({(str(error).strip() or repr(error)).splitlines()[-1][:300]})"
        other = [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
        return f"it is another kind of machine: {'; '.join(other)}"[:300] if other else ""

    def _replace(self, name: str) -> None:
        """A new member where one died; without one the node is out.

        Until that is known the node counts as there: whoever waits for a free one must not give up.
        """
        self._ray.kill(self._members[name])  # one that only could not be reached would hold the node
        found = self._joined([node for node in self._nodes() if node["NodeID"].startswith(name)])
        if name in found:
            self._members[name] = found[name]
            self._free.put((name, found[name]))
        else:
            del self._members[name]


def _knock(address: str | None) -> None:
    """Raise OSError where nobody listens: Ray would try for ten minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.rpartition("/")[2], int(port)), _KNOCK_SECONDS).close()


@contextlib.contextmanager
def cluster(
    terms: Terms, address: str | None, say: Callable[[str], None], make: Callable[[Terms], Station] = Station
) -> Iterator[Cluster]:
    """Connect to a cluster, "auto" being the one that runs here; without an address one is started for the while.

    Raises EnvironmentLacking (DT406) where it cannot be reached, or no node can be used.
    """
    ray = import_ray(address)
    local = {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))} if address is None else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _knock(address)
        ray.init(address=address or _LOCAL, log_to_driver=False, configure_logging=False, **local)
        for number, handler in handlers.items():  # Ray puts its own in their place, with another exit code
            signal.signal(number, handler)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        said = (str(error).strip() or repr(error)).splitlines()[0][:300]
        raise EnvironmentLacking("DT406", f"the Ray cluster at {address or _LOCAL} must be reachable (got: {said})",
                                 fix="give --address as `ray start --head` printed it") from error  # fmt: skip
    try:
        stations = Cluster(ray, terms, make, say)
        try:
            yield stations
        finally:
            stations.close()
    finally:
        ray.shutdown()
