"""Where the work of a search is done: at one station or at several, each doing one piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from deploytool.errors import EnvironmentLacking
from deploytool.tune.station import Station, Terms

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """The stations of a search. `width` is how many there are."""

    @property
    def width(self) -> int: ...

    def run(self, piece: str, /, **arguments: Any) -> Any:
        """Do one piece of work, a method of Station, at a station that is free; raises what it raises."""
        ...

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """The function of every item, in the items' order; as many at once as there are stations."""
        ...

    def clear(self) -> None:
        """End every process that was opened for timing, everywhere."""
        ...


class Nowhere(EnvironmentLacking):
    """No station is left: the search ends, whatever is being tried."""


class Here:
    """One station, in this process."""

    width = 1

    def __init__(self, station: Station):
        self._station = station

    def run(self, piece: str, /, **arguments: Any) -> Any:
        return getattr(self._station, piece)(**arguments)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]

    def clear(self) -> None:
        self._station.clear()


@contextmanager
def here(terms: Terms) -> Iterator[Here]:
    """The engine of a search that needs nothing beyond this machine."""
    with Station(terms) as station:
        yield Here(station)


Start = Callable[[Terms], AbstractContextManager[Engine]]
