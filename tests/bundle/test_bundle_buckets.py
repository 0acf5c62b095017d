"""Several artifacts as one: the table says which takes which feeds, and what fits into none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from tiny_artifact import SIGNATURE, WEIGHT, make

from deploytool.bundle.buckets import open_buckets, pick
from deploytool.bundle.manifest import MANIFEST, Bucket, read_manifest
from deploytool.bundle.pack import pack
from deploytool.bundle.trial import selftest
from deploytool.cli.main import run
from deploytool.errors import InputRefused, UsageProblem
from deploytool.signature import Signature, TensorSpec

TABLE = [Bucket(sizes={"batch": 4}, target="large"), Bucket(sizes={"batch": 2}, target="small")]


def feeds(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).standard_normal((batch, 4)).astype(np.float32)}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small and a large one."""
    small, large = make(tmp_path / "a", "small"), make(tmp_path / "b", "large")
    pack([small, large], tmp_path / "bundle", name="tiny", version="1", buckets=TABLE)
    return tmp_path / "bundle"


@pytest.mark.parametrize(
    ("sizes", "target"), [((1, 8), "a"), ((1, 16), "a"), ((2, 16), "b"), ((1, 17), "c"), ((2, 32), "c")]
)
def test_the_first_that_fits(sizes: tuple[int, int], target: str) -> None:
    """Feeds go to the first bucket that is nowhere smaller than they are."""
    table = [Bucket(sizes={"n": n, "m": m}, target=t) for n, m, t in ((1, 16, "a"), (2, 16, "b"), (2, 32, "c"))]
    assert pick(table, dict(zip("nm", sizes, strict=True))) == target


def test_what_fits_into_none_is_refused() -> None:
    """The refusal says what was given and what would fit."""
    with pytest.raises(InputRefused, match=r"fit into a bucket \(got batch=5\)") as caught:
        pick(TABLE, {"batch": 5})
    assert caught.value.code == "DT308" and "up to batch=2: small" in caught.value.detail


def test_the_runner_picks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call goes to the engine of its bucket, which is opened when first needed, and the outputs are right."""
    from deploytool.bundle import buckets

    opened: list[str] = []
    right = buckets.open_artifact
    monkeypatch.setattr(buckets, "open_artifact", lambda a: opened.append(a.target["name"]) or right(a))
    with open_buckets(bundle) as runner:
        for batch, ran in ((2, ["small"]), (1, ["small"]), (3, ["small", "large"]), (4, ["small", "large"])):
            given = feeds(batch)
            np.testing.assert_allclose(runner.run(given)["logits"], given["x"] @ WEIGHT, rtol=1e-5)
            assert opened == ran
        with pytest.raises(InputRefused, match="fit into a bucket"):
            runner.run(feeds(5))
        with pytest.raises(InputRefused, match="must be named x"):
            runner.run({"y": feeds(1)["x"]})


def test_a_bundle_without_a_table_has_no_runner(tmp_path: Path) -> None:
    """Without a table nothing says who runs: it is refused, not guessed."""
    pack([make(tmp_path / "a")], tmp_path / "plain", name="tiny", version="1")
    with pytest.raises(InputRefused, match="must have a table"), open_buckets(tmp_path / "plain"):
        pass


def test_the_self_test_tells_where_cases_go(bundle: Path) -> None:
    """Every recorded case is replayed by every variant, and names the variant that the table sends it to."""
    result = selftest(bundle)
    cases = [case for variant in result["variants"] for case in variant["cases"]]
    assert len(cases) == 6 and {case["goes_to"] for case in cases} == {"small"}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([({"batch": 2}, "smal")], "did you mean 'small'"),
        ([({"bach": 2}, "small")], "did you mean 'batch'"),
        ([({"batch": 2}, "small"), ({"batch": 2}, "large")], "same sizes"),
        ([({"batch": 2}, "small"), ({"batch": 2}, "other")], "same inputs and outputs"),
        ([({"batch": 2}, "away")], "not here"),
    ],
)
def test_a_table_that_does_not_fit(table: list[tuple[dict[str, int], str]], said: str, tmp_path: Path) -> None:
    """Unknown names, sizes that are named twice, other signatures and devices are refused when packing and reading."""
    other = Signature(SIGNATURE.inputs, (*SIGNATURE.outputs[:1], TensorSpec("label", "int64", ("n",))))
    artifacts = [make(tmp_path / "a", "small"), make(tmp_path / "b", "large")]
    artifacts += [make(tmp_path / "c", "other", signature=other), make(tmp_path / "d", "away", executes=False)]
    buckets = [Bucket(sizes=sizes, target=target) for sizes, target in table]
    with pytest.raises(UsageProblem) as caught:
        pack(artifacts, tmp_path / "bundle", name="tiny", version="1", buckets=buckets)
    assert said in " ".join(caught.value.detail)
    manifest: Any = json.loads(pack(artifacts, tmp_path / "bundle", name="tiny", version="1").to_bytes())
    assert "buckets" not in manifest
    manifest["buckets"] = [bucket.model_dump() for bucket in buckets]
    with pytest.raises(InputRefused) as refused:
        read_manifest(json.dumps(manifest).encode(), "x")
    assert said in " ".join(refused.value.detail)


@pytest.mark.parametrize("signature", [{}, {"inputs": [7]}, {"inputs": 7}])
def test_a_table_over_inputs_without_shapes_is_refused(signature: dict[str, Any], tmp_path: Path) -> None:
    """A manifest is a stranger's: what it says of a variant's inputs may be anything."""
    manifest: Any = json.loads(pack([make(tmp_path / "a", "small")], tmp_path / "b", name="t", version="1").to_bytes())
    manifest["buckets"] = [{"sizes": {"batch": 1}, "target": "small"}]
    manifest["variants"][0]["signature"] = signature
    with pytest.raises(InputRefused) as refused:
        read_manifest(json.dumps(manifest).encode(), "x")
    assert "inputs with shapes" in " ".join(refused.value.detail)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`package --bucket` writes the table, smallest first; packed again it stays, and verify and self-test pass."""
    make(tmp_path / "a", "small"), make(tmp_path / "b", "large")
    parts, out, again = [str(tmp_path / name) for name in "ab"], str(tmp_path / "x"), str(tmp_path / "y.tar")
    assert run(["package", *parts, "-o", out, "--bucket", "batch=4:large", "--bucket", "batch=2:small"]) == 0
    assert "up to batch=2: small\n  up to batch=4: large" in capsys.readouterr().out
    assert run(["package", out, "-o", again]) == 0
    assert run(["bundle", "verify", again]) == 0 and run(["bundle", "selftest", again]) == 0
    table = read_manifest((tmp_path / "x" / MANIFEST).read_bytes(), "x").buckets
    assert table and [b.target for b in table] == ["small", "large"]
    with open_buckets(Path(again)) as runner:
        assert runner.run(feeds(4))["logits"].shape == (4, 3)
    make(tmp_path / "c", "third")
    assert run(["package", again, str(tmp_path / "c"), "-o", str(tmp_path / "z")]) == 0
    assert f"{again}: its table of buckets is left out" in capsys.readouterr().err
    assert read_manifest((tmp_path / "z" / MANIFEST).read_bytes(), "z").buckets is None
    for wrong in ("batch=4", "batch=0:large", ":large"):
        assert run(["package", *parts, "-o", out, "--overwrite", "--bucket", wrong]) == 2
