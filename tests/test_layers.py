"""The import rules of docs/architecture.md, checked on the source itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "deploytool"
# A room may import from itself and from the rows above its own; rooms of one row do not know each other.
LAYERS = (
    {"errors"},
    {"shipped", "storage", "processes", "child", "signature", "settings", "results", "encoding", "processor"},
    {"artifact", "cases", "difference", "target", "source", "runner"},
    {"worker", "decoding"},
    {"load"},
    {"lower"},
    {"cache", "backends"},
    {"train"},
    {"compress", "verify", "bench", "bundle", "gate", "report"},
    {"pipeline"},
    {"tune"},
    {"cli"},
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
BY_NAME = re.compile(r"deploytool\.(\w+)[\w.]*:\w+")  # what a worker process is told to import


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "deploytool":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deploytool."):
            yield str(node.module).split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("deploytool."))
        elif isinstance(node, ast.Constant) and (found := BY_NAME.fullmatch(str(node.value))):
            yield found[1]


def wrong_imports(package: Path) -> list[str]:
    """Every import of a room that does not stand below the importing one."""
    wrong = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).with_suffix("").parts[0]
        if not room.startswith("__"):
            others = {other for other in _imported(ast.parse(path.read_text(encoding="utf-8"))) if other != room}
            wrong += [f"{path.relative_to(package)} imports {o}" for o in others if RANK[o] >= RANK[room]]
    return wrong


def test_rooms_import_only_from_lower_layers() -> None:
    """A room must import only from rooms above it in LAYERS, so that no cycle and no shortcut between stages exists."""
    assert wrong_imports(PACKAGE) == []


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    """Imports of a higher layer, of a sibling stage, and by a worker's name must each be reported."""
    for room in ("verify", "storage", "bench"):
        (tmp_path / room).mkdir()
    (tmp_path / "verify" / "a.py").write_text("def f():\n    from deploytool.bench.compare import compare\n")
    (tmp_path / "storage" / "b.py").write_text("from deploytool import cache\n")
    (tmp_path / "bench" / "c.py").write_text('JOB = "deploytool.pipeline.export:export"\n')
    assert wrong_imports(tmp_path) == [
        "bench/c.py imports pipeline", "storage/b.py imports cache", "verify/a.py imports bench",
    ]  # fmt: skip
