"""Several artifacts of one model as one: a table says which of them takes feeds of which sizes.

A bucket takes feeds none of whose free dimensions is larger than it says; of several the first in the table does, which
has the smallest first. Feeds that are larger than every bucket are refused: nothing was measured there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.bundle.manifest import VARIANTS, Bucket, Manifest
from deploytool.bundle.trial import unpacked
from deploytool.bundle.verify import verify_bundle
from deploytool.errors import InputRefused
from deploytool.runner import Runner
from deploytool.signature import Feeds, Outputs, Signature


def pick(buckets: Sequence[Bucket], sizes: Mapping[str, int]) -> str:
    """The target whose artifact takes feeds of these sizes; raises InputRefused (DT308) where no bucket does."""
    for bucket in buckets:
        if all(sizes[dim] <= most for dim, most in bucket.sizes.items()):
            return bucket.target
    asked = _words({dim: sizes[dim] for dim in buckets[0].sizes})
    raise InputRefused("DT308", f"the feeds must fit into a bucket (got {asked})",
                       detail=[f"up to {_words(bucket.sizes)}: {bucket.target}" for bucket in buckets],
                       fix="give less at once, or tune again with a larger bucket")  # fmt: skip


def _words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{dim}={size}" for dim, size in sizes.items())


class BucketRunner:
    """A Runner over a bundle with a table: each call goes to the engine that the feeds' sizes name.

    Engines are opened when they are first needed, and stay open.
    """

    def __init__(self, manifest: Manifest, artifacts: Mapping[str, Artifact]):
        if not manifest.buckets:
            raise InputRefused("DT311", f"the bundle {manifest.name!r} must have a table of buckets (got none)",
                               fix="pack it with --bucket, or open one of its artifacts")  # fmt: skip
        self._buckets = manifest.buckets
        self._artifacts = artifacts
        self._open: dict[str, Runner] = {}
        self._stack = ExitStack()
        self.signature: Signature = artifacts[manifest.buckets[0].target].signature

    def run(self, feeds: Feeds) -> Outputs:
        """Named outputs; raises InputRefused for feeds that do not fit the signature, or no bucket."""
        target = pick(self._buckets, self.signature.bind(feeds))
        if target not in self._open:
            self._open[target] = self._stack.enter_context(open_artifact(self._artifacts[target]))
        return self._open[target].run(feeds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@contextmanager
def open_buckets(path: Path) -> Iterator[BucketRunner]:
    """The runner of a bundle, which is verified first; raises what that raises, and InputRefused without a table."""
    with unpacked(path) as folder:
        manifest = verify_bundle(folder)
        artifacts = {v.target: Artifact.load(folder / VARIANTS / v.target, check=False) for v in manifest.variants}
        with BucketRunner(manifest, artifacts) as runner:
            yield runner
