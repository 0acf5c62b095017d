"""Things of one kind, one for each sample, of which memory holds few; the others lie in a file.

    calls = Shelf(expected=len(samples))
    calls.append(call)                      # tensors in tuples, lists, dicts and objects
    for call in calls: ...                  # one at a time in memory

So memory does not grow with the samples. The file lies in the temporary folder (`TMPDIR` names another) and has no
name: nothing of it is left when the process has ended, however it ended. It is read and written, not mapped: pages of
mapped files count as the process's own while it looks at them.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import IO, Any, TypeVar, overload

import torch
from torch import Tensor

from deploytool.errors import EnvironmentLacking

_IN_MEMORY = 2**20  # bytes of one shelf's things that stay in memory
_PREFIX = "deploytool-calibration-"

T = TypeVar("T")
_Name = int | tuple[Any, ...]  # a tensor's number in the first thing; or its own, where it begins, and its form
_Place = tuple[int, int]  # where in the file the pickled thing begins, and how long it is


class Shelf(Sequence[T]):
    """See the module's docstring. Whoever takes a thing leaves it as it is, since some are given again and again; what
    `fresh` gives may be written into.

    Tensors of the first thing that are in others too are held once, and come back as the same objects. What cannot be
    pickled stays in memory.

    expected  how many things there will be, where that is known: the disk is asked for room for all of them at once
    """

    def __init__(self, things: Iterable[T] = (), *, expected: int = 0) -> None:
        self._held: dict[int, T] = {}
        self._forms: dict[int, tuple[bytes, list[Tensor]]] = {}  # of those that are held: pickled, and their tensors
        self._places: dict[int, _Place] = {}
        self._first: list[Tensor] = []
        self._bytes, self._expected = 0, expected
        self._file: IO[bytes] | None = None
        for thing in things:
            self.append(thing)

    def append(self, thing: T, *, changing: bool = False) -> None:
        """Put one more at the end; raises EnvironmentLacking where the disk has no room for it.

        `changing` says that the thing may still be written into, which does not change what is kept.
        """
        index = len(self)
        if changing and self._bytes <= _IN_MEMORY:
            thing = copy.deepcopy(thing)
        try:
            pickled, tensors = _pickled(thing, self._first)
        except (pickle.PicklingError, TypeError, AttributeError, RuntimeError):
            self._held[index] = thing
            return
        if not index:  # its tensors are shared with all that come, and with itself
            self._first, (pickled, tensors) = tensors, _pickled(thing, tensors)
        size = sum(map(_span, tensors))
        if index == 0 or self._bytes + size <= _IN_MEMORY:
            self._held[index], self._forms[index] = thing, (pickled, tensors)
            self._bytes += size
            return
        if self._file is None:
            self._file = self._opened(size)
        try:
            self._places[index] = _write(self._file, pickled, tensors)
        except OSError as error:
            raise _no_room(error.strerror) from error

    def _opened(self, size: int) -> IO[bytes]:
        wanted = size * max(1, self._expected - len(self))
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if wanted > free:
            raise _no_room(f"{wanted / 1e6:.0f} MB to write, {free / 1e6:.0f} MB free")
        try:
            file = tempfile.TemporaryFile(prefix=_PREFIX)  # noqa: SIM115  # it is closed with the shelf
        except OSError as error:
            raise _no_room(error.strerror) from error
        weakref.finalize(self, file.close)
        return file

    def __len__(self) -> int:
        return len(self._held) + len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        return self._held[number] if number in self._held else self._loaded(number, self._first.__getitem__)

    def fresh(self, index: int) -> T:
        """A copy of one, shared with nobody."""
        if index in self._places:
            return self._loaded(index, self._copied)
        if index not in self._forms:
            return copy.deepcopy(self._held[index])
        pickled, tensors = self._forms[index]
        made: T = _Reader(pickled, self._copied, lambda name: copy.deepcopy(tensors[name[0]])).load()
        return made

    def _copied(self, number: int) -> Tensor:
        return copy.deepcopy(self._first[number])  # a clone would have other strides

    def _loaded(self, index: int, shared: Callable[[int], Tensor]) -> T:
        file, (start, length) = self._file, self._places[index]
        assert file is not None
        pickled = _read(file, start, length).numpy().tobytes()
        found: T = _Reader(pickled, shared, partial(_read_tensor, file, start + length)).load()
        return found


def fresh(things: Sequence[T], index: int) -> T:
    """A copy of one of a shelf or of another sequence, shared with nobody."""
    return things.fresh(index) if isinstance(things, Shelf) else copy.deepcopy(things[index])


class _Writer(pickle.Pickler):
    """Pickles all but the tensors, which it collects; those of the first thing are named by their number there."""

    def __init__(self, into: IO[bytes], first: Sequence[Tensor]) -> None:
        super().__init__(into, protocol=pickle.HIGHEST_PROTOCOL)
        self._names: dict[int, _Name] = {id(tensor): number for number, tensor in enumerate(first)}
        self._end = 0
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> _Name | None:
        if type(value) is not Tensor or not _is_plain(value):
            return None
        if id(value) not in self._names:
            form = value.dtype, tuple(value.shape), value.stride()
            self._names[id(value)] = (len(self.tensors), self._end, *form)
            self.tensors.append(value)
            self._end += _span(value)
        return self._names[id(value)]


class _Reader(pickle.Unpickler):
    """Makes one thing; one tensor is one object, in how many places of it it stands."""

    def __init__(self, pickled: bytes, shared: Callable[[int], Tensor], own: Callable[[Any], Tensor]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._shared, self._own = shared, own
        self._made: dict[_Name, Tensor] = {}

    def persistent_load(self, name: _Name) -> Tensor:
        if name not in self._made:
            self._made[name] = self._shared(name) if isinstance(name, int) else self._own(name)
        return self._made[name]


def _pickled(thing: Any, first: Sequence[Tensor]) -> tuple[bytes, list[Tensor]]:
    """The thing without its tensors, and these, but not those that are the first thing's too."""
    into = io.BytesIO()
    writer = _Writer(into, first)
    writer.dump(thing)
    return into.getvalue(), writer.tensors


def _is_plain(tensor: Tensor) -> bool:
    return (tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.requires_grad
            and not tensor.is_quantized and not tensor.is_complex())  # fmt: skip


def _elements(shape: Sequence[int], stride: Sequence[int]) -> int:
    """How much of its storage a tensor reaches over."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def _span(tensor: Tensor) -> int:
    return _elements(tensor.shape, tensor.stride()) * tensor.element_size()


def _write(file: IO[bytes], pickled: bytes, tensors: Iterable[Tensor]) -> _Place:
    start = file.seek(0, os.SEEK_END)
    file.write(pickled)
    for tensor in tensors:
        start_byte = tensor.storage_offset() * tensor.element_size()
        span = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), start_byte, (_span(tensor),), (1,))
        file.write(span.numpy().data)
    file.flush()
    return start, len(pickled)


def _read(file: IO[bytes], start: int, length: int) -> Tensor:
    into = torch.empty(length, dtype=torch.uint8)
    file.seek(start)
    if file.readinto(into.numpy().data) != length:  # type: ignore[attr-defined]
        raise OSError("a file of the temporary folder was cut off")
    return into


def _read_tensor(file: IO[bytes], start: int, name: tuple[Any, ...]) -> Tensor:
    _, offset, dtype, shape, stride = name
    empty = torch.empty(0, dtype=dtype)
    data = _read(file, start + offset, _elements(shape, stride) * empty.element_size())
    made: Tensor = empty.set_(data.untyped_storage(), 0, shape, stride)
    return made


def _no_room(got: str | None) -> EnvironmentLacking:
    return EnvironmentLacking(
        "DT405", f"{tempfile.gettempdir()} must hold what calibration keeps of the samples (got: {got})",
        fix="free some space there, let TMPDIR name another folder, or calibrate with fewer samples",
    )  # fmt: skip
