"""What an AOTInductor package runs: it does not tell."""

from __future__ import annotations

from deploytool.artifact import Artifact
from deploytool.backends.ran import Node
from deploytool.signature import Feeds


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """Raises NotImplementedError: products are compiled into one library and called past torch's dispatcher."""
    raise NotImplementedError("the kernels of a compiled package are not seen by torch's profiler; all are fp32")
