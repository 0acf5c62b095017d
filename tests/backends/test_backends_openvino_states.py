"""Language models in OpenVINO: the cache is kept in the engine, and nothing of what is computed changes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from workshop import Workshop, cosine

pytest.importorskip("openvino")
pytest.importorskip("nncf")
pytest.importorskip("transformers")

import openvino as ov
import tokenizers

from deploytool.artifact import Artifact
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.openvino import StatefulRunner, _imported, compile_ir
from deploytool.backends.openvino_attention import fuse_attention
from deploytool.backends.openvino_cut import OpenVinoGraph
from deploytool.backends.openvino_generate import KeptCache
from deploytool.backends.openvino_states import BEAMS, cache_pairs, keep_cache, without_states
from deploytool.bundle.selftest import open_openvino
from deploytool.decoding import Loop, decoder_of, greedy_tokens
from deploytool.errors import BackendFailed, InputRefused, UsageProblem
from deploytool.runner import Runner
from deploytool.signature import Outputs, Signature

PROMPT = [5, 9, 11, 30, 2]


@pytest.fixture(scope="module")
def stateless(workshop: Workshop) -> Artifact:
    return build_artifact(workshop.request("decoder", load_checked_target("openvino"), stateful=False), {})


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.get_type_name() for node in ov.Core().read_model(artifact.main_file).get_ops())


def run_all(runner: Runner, workshop: Workshop) -> list[Outputs]:
    return [runner.run(feeds) for feeds in workshop.feeds("decoder")]


def same(a: list[Outputs], b: list[Outputs]) -> bool:
    return all(np.allclose(array, other[name], rtol=1e-4, atol=1e-5)
               for one, other in zip(a, b, strict=True) for name, array in one.items())  # fmt: skip


def test_a_cache_is_kept_where_there_is_one(workshop: Workshop, stateless: Artifact) -> None:
    """Past and present are one variable, attention is one operator; without, the graph stays, and this is told."""
    artifact = workshop.artifact("decoder", "openvino")
    assert {key: artifact.settings[key] for key in ("stateful", "variables", "attention_fused")} == {
        "stateful": True, "variables": 4, "attention_fused": 2,
    }  # fmt: skip
    found = operators(artifact)
    assert (found["ReadValue"], found["Assign"], found["ScaledDotProductAttention"], found["Softmax"]) == (4, 4, 2, 0)
    assert stateless.settings["stateful"] is False and "generate.py" in stateless.settings["no_generator"]
    assert operators(stateless)["ReadValue"] == 0
    assert "stateful" not in workshop.artifact("attention", "openvino").settings


def test_the_engine_appends_in_place(workshop: Workshop) -> None:
    """What runs holds no join of old and new keys: the attention operator has the variables as its own."""
    with open_artifact(workshop.artifact("decoder", "openvino")) as runner:
        assert isinstance(runner, StatefulRunner)
        graph = runner.request.get_compiled_model().get_runtime_model()
    kept = [node for node in graph.get_ops() if _kind(node) == "MemoryInput"]
    readers = [_kind(target.get_node()) for node in kept for target in node.output(0).get_target_inputs()]
    assert readers and set(readers) <= {"ScaledDotProductAttention", "MemoryOutput"}


def _kind(node: ov.Node) -> str:
    return str(node.get_rt_info()["layerType"].value)


def test_every_output_is_that_of_eager(workshop: Workshop, stateless: Artifact) -> None:
    """Decoding, prompts, tokens after a past and rows padded at the left: the numbers are the stateless ones."""
    with open_artifact(workshop.artifact("decoder", "openvino")) as kept, open_artifact(stateless) as plain:
        found = run_all(kept, workshop)
        assert same(found, run_all(plain, workshop))
    for feeds, outputs in zip(workshop.feeds("decoder"), found, strict=True):
        assert list(outputs) == list(kept.signature.output_names)
        for name, array in workshop.reference("decoder", feeds).items():
            np.testing.assert_allclose(outputs[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("planted", [False, True])
def test_nothing_stays_between_requests(workshop: Workshop, planted: bool) -> None:
    """A request after others gives what it gives alone; without the reset it would not."""
    with open_artifact(workshop.artifact("decoder", "openvino")) as runner:
        first = run_all(runner, workshop)
        if planted:
            assert isinstance(runner, StatefulRunner)
            runner.request = _NeverReset(runner.request)
            with pytest.raises((AssertionError, BackendFailed)):
                assert same(run_all(runner, workshop), first)
        else:
            assert same(run_all(runner, workshop), first)


class _NeverReset:
    def __init__(self, request: ov.InferRequest) -> None:
        self._request = request
        self.infer = request.infer

    def reset_state(self) -> None:
        """The planted defect."""


def test_decoders_share_nothing(workshop: Workshop, stateless: Artifact) -> None:
    """Two sequences at once, requests in between and a prompt in pieces: each gets the stateless tokens."""
    other = [1, 2, 3]
    with open_artifact(stateless) as plain:
        expected = [greedy_tokens(Loop(plain), prompt, 12) for prompt in (PROMPT, other)]
    with open_artifact(workshop.artifact("decoder", "openvino")) as runner:
        one, two = decoder_of(runner, 17), decoder_of(runner, 17)
        assert isinstance(one, KeptCache)
        one.step(PROMPT[:2])
        fed = [PROMPT[2:], other]
        tokens: list[list[int]] = [[], []]
        for _ in range(12):
            for i, decoder in enumerate((one, two)):
                tokens[i].append(int(decoder.step(fed[i]).argmax()))
                fed[i] = tokens[i][-1:]
            runner.run(workshop.feeds("decoder")[2])
        assert tokens == expected == [greedy_tokens(Loop(runner), prompt, 12) for prompt in (PROMPT, other)]
        with pytest.raises(ValueError, match="capacity"):
            one.step([1] * 9)


@pytest.mark.parametrize(("name", "least"), [("openvino-weight-int8", 0.999), ("openvino-int4", 0.9),
                                             ("openvino-int8", 0.9)])  # fmt: skip
def test_other_precisions_keep_it_too(workshop: Workshop, name: str, least: float) -> None:
    """The cache is kept in every precision, what it holds is fp32, and the logits stay near."""
    artifact = workshop.artifact("decoder", name)
    assert artifact.settings["stateful"] and artifact.settings["variables"] == 4
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("decoder"):
            outputs = runner.run(feeds)
            assert cosine(outputs["logits"], workshop.reference("decoder", feeds)["logits"]) > least
            past = feeds["past_key_values.0.key"]
            assert np.array_equal(outputs["present.0.key"][:, :, : past.shape[2]], past)


def test_without_a_cache_it_is_refused(workshop: Workshop) -> None:
    """`stateful = true` for a model that has no cache is an error that says what one would be."""
    with pytest.raises(UsageProblem, match="without a cache") as caught:
        build_artifact(workshop.request("attention", load_checked_target("openvino"), stateful=True), {})
    assert "past_key_values" in str(caught.value.detail)


def test_a_cache_that_is_not_given_back_is_none(workshop: Workshop) -> None:
    """A model that gives no present for a past can't be turned, and is refused where this is asked for."""
    whole = workshop.source("decoder").signature
    cut = Signature(whole.inputs, tuple(spec for spec in whole.outputs if spec.name != "present.1.key"))
    model = ov.Core().read_model(workshop.portable("decoder").main_file)
    assert len(cache_pairs(whole)) == 4 and not cache_pairs(cut)
    assert keep_cache(model, cut, None) == {}
    with pytest.raises(UsageProblem):
        keep_cache(model, cut, True)


def test_unknown_attention_keeps_the_cache_all_the_same(workshop: Workshop) -> None:
    """Where one layer's attention is not known, none is fused, no rows are picked, and the numbers stay."""
    signature = workshop.source("decoder").signature
    model = ov.Core().read_model(workshop.portable("decoder").main_file)
    softmax = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"][-1]
    (target,) = softmax.output(0).get_target_inputs()
    target.replace_source_output(ov.opset13.relu(softmax.output(0)).output(0))
    assert fuse_attention(model, list(cache_pairs(signature))) == 0
    assert keep_cache(model, signature, True) == {"stateful": True, "variables": 4, "attention_fused": 0}
    assert BEAMS not in {port.any_name for port in model.inputs}
    runner = StatefulRunner(compile_ir(model, 1), signature)
    for feeds in workshop.feeds("decoder"):
        assert same([runner.run(feeds)], [workshop.reference("decoder", feeds)])


def test_states_become_inputs_again(workshop: Workshop, stateless: Artifact) -> None:
    """What looks into the graph sees the model of the signature: its inputs, its outputs, its numbers."""
    model = without_states(ov.Core().read_model(workshop.artifact("decoder", "openvino").main_file))
    assert not model.get_sinks()
    signature = stateless.signature
    assert {name for port in model.inputs for name in port.get_names()} >= set(signature.input_names)
    assert len(model.inputs) == len(signature.inputs)
    compiled = compile_ir(model, 1)
    for feeds in workshop.feeds("decoder"):
        found = compiled(dict(feeds))
        for name, array in workshop.reference("decoder", feeds).items():
            np.testing.assert_allclose(found[compiled.output(name)], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_it_can_be_cut(workshop: Workshop) -> None:
    """Bisection finds the cache as inputs and outputs of the graph, and computes every output from them."""
    graph = OpenVinoGraph(workshop.artifact("decoder", "openvino").main_file)
    feeds = workshop.feeds("decoder")[3]
    reference = workshop.reference("decoder", feeds)
    assert same([graph.run(list(reference), feeds)], [reference])
    made = {name for node in graph.nodes for name in node.outputs}
    assert made >= set(reference) and not {"ReadValue", "Assign"} & {node.kind for node in graph.nodes}


def test_a_graph_with_other_variables_is_refused(workshop: Workshop) -> None:
    """An IR whose variables are not the signature's cache does not open."""
    model = ov.Core().read_model(workshop.artifact("decoder", "openvino").main_file)
    signature = workshop.source("decoder").signature
    fewer = Signature(tuple(spec for spec in signature.inputs if ".1." not in spec.name),
                      tuple(spec for spec in signature.outputs if ".1." not in spec.name))  # fmt: skip
    with pytest.raises(BackendFailed, match="variables"):
        StatefulRunner(compile_ir(model, 1), fewer)


def test_the_self_test_runs_it(workshop: Workshop) -> None:
    """A bundle's self-test feeds the cache and reads it back, whatever ran before."""
    artifact = workshop.artifact("decoder", "openvino")
    names = list(artifact.signature.input_names), list(artifact.signature.output_names)
    engine = open_openvino(str(artifact.main_file), *names, 1)
    for feeds in [*workshop.feeds("decoder"), *workshop.feeds("decoder")]:
        assert same([engine(feeds)], [workshop.reference("decoder", feeds)])
    with pytest.raises(ValueError, match="variables"):
        open_openvino(str(artifact.main_file), names[0][:-1], names[1], 1)


def test_the_shipped_runner_generates(workshop: Workshop) -> None:
    """generate.py lies beside the model where there is a tokenizer, and runs with three packages and no others."""
    request = workshop.request("decoder", load_checked_target("openvino"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(request.out / "tokenizer.json"))
    artifact = build_artifact(request, {})
    code = """import json, runpy, sys
sys.argv = ["generate.py", "w3 w4 w5", "--tokens", "6"]
try:
    runpy.run_path(FILE, run_name="__main__")
except SystemExit:
    print(json.dumps(sorted({"torch", "deploytool", "onnxruntime"} & set(sys.modules))))
"""
    code = code.replace("FILE", repr(str(artifact.folder / "generate.py")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    with open_artifact(artifact) as runner:
        expected = greedy_tokens(Loop(runner), [3, 4, 5], 6)
    *said, modules = done.stdout.split()
    assert said == ["w3", "w4", "w5", *(f"w{token}" for token in expected)] and json.loads(modules) == []
    assert "tokens/s" in done.stderr
    assert {entry.path for entry in artifact.files} >= {"generate.py", "decoder.py", "model.xml"}


def test_what_the_format_cannot_hold_is_refused(workshop: Workshop) -> None:
    """A graph with ONNX Runtime's own attention must be refused by its nodes while it is built, not once opened."""
    graph = workshop.artifact("decoder", "ort").main_file
    with pytest.raises(InputRefused, match="OpenVINO's format has") as caught:
        _imported(graph)
    assert caught.value.code == "DT310" and "GroupQueryAttention: node" in caught.value.detail[0]
