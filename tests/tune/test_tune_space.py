"""What a search may vary."""

from __future__ import annotations

import pytest

from deploytool.backends.base import find_backend
from deploytool.target import Target, load_target, target_names
from deploytool.tune import space
from deploytool.tune.space import CHOICES, Config, bases, build_choices, everything, runtime_choices


def test_every_choice_is_a_setting_of_its_backend() -> None:
    """Every value worth trying must be one that the backend's own table takes."""
    for (backend, _), choices in CHOICES.items():
        for key, values in choices.items():
            for value in values:
                find_backend(backend).table.model_validate({key: value}, strict=False)


def test_changes_reach_the_target() -> None:
    """A change of a build or runtime setting stands in the target, and nothing else is changed."""
    plain = Config(load_target("ort-int8"))
    changed = plain.with_change("build.keep_fp32", 0).with_change("runtime.threads", 1)
    assert changed.name == "ort-int8 keep_fp32=0 threads=1"
    assert changed.target.build == {**plain.target.build, "keep_fp32": 0}
    assert changed.runtime == {"threads": 1, "spinning": True}
    data = changed.target.to_json()
    assert {**data, "build": None, "runtime": None} == {**plain.target.to_json(), "build": None, "runtime": None}


def test_eight_bits_only_where_they_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that saturate on CPUs without VNNI are offered only where the CPU has it."""
    for flags, offered in (([], False), (["avx2", "avx512_vnni"], True)):
        monkeypatch.setattr(space, "environment", lambda flags=flags: {"cpu_flags": flags})
        assert (("build.reduce_range", False) in build_choices(load_target("ort-int8"), "latency")) is offered
        assert (("build.weight_bits", 8) in build_choices(load_target("fbgemm"), "latency")) is offered


def test_settings_that_do_nothing_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights alone are rounded, settings of rounded inputs would build the same again; in 4 bits groups vary."""
    monkeypatch.setattr(space, "environment", lambda: {"cpu_flags": ["avx512_vnni"]})
    names = ("ort-int8", "ort-weight-int8", "ort-int4", "openvino-int8", "openvino-weight-int8")
    offered = {name: {key for key, _ in build_choices(load_target(name), "latency")} for name in names}
    assert "build.reduce_range" in offered["ort-int8"] and "build.reduce_range" not in offered["ort-weight-int8"]
    for name in ("ort-int4", "ort-weight-int8"):
        assert {"build.group", "build.activations"} <= offered[name]
    assert not {"build.group", "build.activations"} & offered["ort-int8"]
    assert "build.scheme" in offered["openvino-int8"] and "build.scheme" not in offered["openvino-weight-int8"]


def test_smaller_files_are_tried_for_size_only() -> None:
    """Embeddings in 8 bits are offered where size is asked for."""
    profile = load_target("fbgemm")
    assert ("build.embeddings", True) in build_choices(profile, "size")
    assert ("build.embeddings", True) not in build_choices(profile, "latency")


@pytest.mark.parametrize("name", [n for n in target_names() if not n.startswith("trt")])
def test_every_combination(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All combinations have names of their own, hold the profile itself, and each is a valid target."""
    monkeypatch.setattr(space, "usable_cores", lambda: 4)
    profile = load_target(name)
    configs = list(everything(Config(profile), "latency"))
    assert len({config.name for config in configs}) == len(configs) and configs[0].target == profile
    for config in configs:
        assert isinstance(config.target, Target)
        find_backend(profile.backend).check(config.target)
    singles = set(build_choices(profile, "latency") + runtime_choices(profile))
    assert {c.changes[0] for c in configs if len(c.changes) == 1} == singles


@pytest.mark.parametrize(
    ("usable", "physical", "threads"),
    [(1, 1, []), (2, 2, [1]), (3, 3, [1]), (4, 2, [1]), (4, 4, [1, 2]), (8, 8, [1, 4]), (8, 4, [1, 2]), (8, 16, [1, 4]),
     (8, None, [1, 4])],
)  # fmt: skip
def test_fewer_threads(usable: int, physical: int | None, threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is offered where there are more, half of the physical cores from four on, and none that is set."""
    monkeypatch.setattr(space, "usable_cores", lambda: usable)
    monkeypatch.setattr(space, "environment", lambda: {"cpu_flags": [], "cores_physical": physical})
    for name in ("ort", "openvino"):
        found = runtime_choices(load_target(name))
        assert [value for key, value in found if key == "runtime.threads"] == threads
    set_to_half = Config(load_target("ort")).with_change("runtime.threads", 4).target
    assert ("runtime.threads", 4) not in runtime_choices(set_to_half)
    names = [config.name for config in everything(Config(load_target("openvino")), "latency")]
    assert names == ["openvino", *(f"openvino threads={n}" for n in threads)]


def test_quick_builds_come_first() -> None:
    """Unquantized targets are tried before quantized ones: the anchor is one of them."""
    found = [config.profile.name for config in bases([load_target(n) for n in ("ort-int8", "openvino", "ort")], ())]
    assert found == ["ort", "openvino", "ort-int8"]
