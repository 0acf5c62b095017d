"""Language models in ONNX Runtime: what is fused, and that nothing of what they compute changes."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tokenizers
from workshop import Workshop, cosine

from deploytool.artifact import Artifact
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.ort_decoder import fuse_decoder
from deploytool.bench.decoding import measure_decoding
from deploytool.decoding import Loop, decoder_of, greedy_tokens
from deploytool.encoding import Coded, save_coded
from deploytool.verify.generation import greedy
from deploytool.worker import Limits

pytest.importorskip("transformers")


def operators(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(artifact.main_file, load_external_data=False).graph.node)


def test_a_decoder_is_fused(workshop: Workshop) -> None:
    """Attention, norms and the products of one input become one operator each, and the artifact says how many."""
    artifact = workshop.artifact("decoder", "ort")
    assert artifact.settings["fused"] == {"attention": 2, "norms": 5, "products_joined": 6}
    found = operators(artifact)
    assert (found["GroupQueryAttention"], found["SkipSimplifiedLayerNormalization"]) == (2, 4)
    assert found["MatMul"] == 4 * 2 + 1
    assert not found["Softmax"]


def test_a_fused_decoder_gives_eagers_numbers(workshop: Workshop) -> None:
    """Every output of every sample agrees: decoding, prompts, tokens after a past, rows padded at the left."""
    with open_artifact(workshop.artifact("decoder", "ort")) as runner:
        for feeds in workshop.feeds("decoder"):
            reference = workshop.reference("decoder", feeds)
            for name, array in runner.run(feeds).items():
                np.testing.assert_allclose(array, reference[name], rtol=1e-4, atol=2e-4, err_msg=name)


def test_a_decoder_is_fused_as_a_whole(workshop: Workshop) -> None:
    """Where one layer's attention is not known, none is fused: decoding gives every layer's cache one buffer."""
    model = ir.load(workshop.portable("decoder").main_file)
    last = [node for node in model.graph if node.op_type == "Softmax"][-1]
    extra = ir.node("Identity", [last.outputs[0]])
    last.outputs[0].replace_all_uses_with(extra.outputs[0])
    extra.replace_input_with(0, last.outputs[0])
    model.graph.insert_after(last, extra)
    before = len(model.graph)
    assert fuse_decoder(model) == {} and len(model.graph) == before
    assert fuse_decoder(ir.load(workshop.portable("decoder").main_file))["attention"] == 2


def test_fusing_can_be_left_out(workshop: Workshop) -> None:
    """With fuse = false the graph is the portable one."""
    artifact = build_artifact(workshop.request("decoder", load_checked_target("ort"), fuse=False), {})
    assert "fused" not in artifact.settings
    assert artifact.main_file.read_bytes() == workshop.portable("decoder").main_file.read_bytes()


def test_the_fused_graph_refuses_what_it_would_get_wrong(workshop: Workshop) -> None:
    """Several rows of several tokens given to the bare graph fail; the operator would fill the cache wrongly."""
    artifact = workshop.artifact("decoder", "ort")
    session = ort.InferenceSession(str(artifact.main_file), providers=["CPUExecutionProvider"])
    feeds = next(f for f in workshop.feeds("decoder") if min(f["input_ids"].shape) > 1)
    with pytest.raises(Exception, match="Reshape"):
        session.run(None, feeds)


@pytest.mark.parametrize(("name", "bits", "least"), [("ort-weight-int8", 8, 0.999), ("ort-int4", 4, 0.9)])
def test_weights_are_stored_in_few_bits(workshop: Workshop, name: str, bits: int, least: float) -> None:
    """Every product and the embedding read codes, the tied table is stored once, and the outputs stay near."""
    artifact = workshop.artifact("decoder", name)
    model = onnx.load(artifact.main_file)
    found = operators(artifact)
    assert (found["MatMulNBits"], found["GatherBlockQuantized"], found["MatMul"]) == (9, 1, 0)
    tables = [t for t in model.graph.initializer if t.dims[:1] == [64] and t.name.endswith("embed_tokens.weight.codes")]
    assert len(tables) == 1
    assert not [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2
                and "scales" not in t.name]  # fmt: skip
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("decoder"):
            reference, outputs = workshop.reference("decoder", feeds), runner.run(feeds)
            assert cosine(outputs["logits"], reference["logits"]) > least


def test_eight_bits_for_those_that_lose_most(workshop: Workshop) -> None:
    """`int8_share` gives 8 bits to the head and some more, and the logits come nearer than with 4 bits alone."""
    losses = []
    for share in (0.0, 0.6):
        artifact = build_artifact(workshop.request("decoder", load_checked_target("ort-int4"), int8_share=share), {})
        assert bool(artifact.settings["int8_weights"]) == (share > 0)
        assert ("model.model.embed_tokens.weight" in artifact.settings["int8_weights"]) == (share > 0)  # the head
        feeds = workshop.feeds("decoder")[2]
        with open_artifact(artifact) as runner:
            losses.append(1 - cosine(runner.run(feeds)["logits"], workshop.reference("decoder", feeds)["logits"]))
    assert losses[1] < losses[0]


def test_excluded_weights_stay(workshop: Workshop) -> None:
    """`exclude` takes patterns of names: those matrices stay fp32."""
    request = workshop.request("decoder", load_checked_target("ort-weight-int8"), exclude=["*embed_tokens*"])
    found = operators(build_artifact(request, {}))
    assert (found["MatMulNBits"], found["MatMul"], found["GatherBlockQuantized"]) == (8, 1, 0)


def test_decoding_is_that_of_the_portable_graph(workshop: Workshop) -> None:
    """Greedy decoding with the fused graph gives the very tokens of the graph that it was made from."""
    prompt = [5, 9, 11, 30, 2]
    with (
        open_artifact(workshop.artifact("decoder", "ort")) as fused,
        open_artifact(workshop.portable("decoder")) as own,
    ):
        assert greedy(fused, prompt, 20)[0] == greedy(own, prompt, 20)[0]


def test_encodings_are_written_as_they_are(workshop: Workshop, tmp_path: Path) -> None:
    """Codes that the model brings are what the products read, joined products included; the rest gets 8 bits."""
    names = [f"model.model.layers.0.self_attn.{part}_proj.weight.T" for part in "qkv"]
    rng = np.random.default_rng(0)
    coded = {
        name: Coded(4, 32, rng.integers(0, 16, (rows, 64), dtype=np.uint8), rng.random((rows, 2), np.float32) / 50,
                    np.full((rows, 2), 7, np.float32))
        for name, rows in zip(names, (64, 32, 32), strict=True)
    }  # fmt: skip
    save_coded(tmp_path / "encodings.npz", coded)
    request = workshop.request("decoder", load_checked_target("ort-int4"))
    artifact = build_artifact(replace(request, encodings=tmp_path / "encodings.npz"), {})
    assert (artifact.settings["encoded"], artifact.settings["encodings_not_taken"]) == (1, {})
    assert artifact.settings["weights"] == {"int4 group 32": 1, "int8 group 32": 2, "int8 group 64": 6}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(artifact.main_file).graph.initializer}
    packed = stored["+".join(names) + ".codes"].reshape(128, -1)
    codes = np.concatenate([coded[name].codes for name in names])
    assert np.array_equal(packed & 15, codes[:, ::2])
    assert np.array_equal(packed >> 4, codes[:, 1::2])


def test_encodings_that_do_not_fit_are_told(workshop: Workshop, tmp_path: Path) -> None:
    """Zero points between codes have no fast kernel: the weight gets 8 bits, and the artifact says why."""
    name = "model.model.layers.0.mlp.down_proj.weight.T"
    coded = Coded(4, 32, np.zeros((64, 96), np.uint8), np.ones((64, 3), np.float32), np.full((64, 3), 7.5, np.float32))
    save_coded(tmp_path / "encodings.npz", {name: coded})
    request = workshop.request("decoder", load_checked_target("ort-int4"))
    settings = build_artifact(replace(request, encodings=tmp_path / "encodings.npz"), {}).settings
    assert settings["encoded"] == 0
    assert "whole numbers" in settings["encodings_not_taken"][name]


def test_prefill_and_decoding_are_timed_in_processes(workshop: Workshop) -> None:
    """Both artifacts run in turns, and their rates are told."""
    artifacts = {"ort": workshop.artifact("decoder", "ort"), "eager": workshop.artifact("decoder", "eager")}
    found = measure_decoding(artifacts, Limits(seconds=60), prompt=8, new=4, rounds=2)
    assert found["decode_tokens_per_s"] > 0
    assert set(found["against"]) == {"eager"}


@pytest.mark.parametrize("fuse", [True, False])
def test_the_engines_own_decoder_gives_the_same_tokens(workshop: Workshop, fuse: bool) -> None:
    """Decoding with a cache in place, or handed on, gives what feeding the outputs back gives, in pieces too."""
    artifact = build_artifact(workshop.request("decoder", load_checked_target("ort"), fuse=fuse), {})
    prompt = [3, 4, 5, 60, 7]
    with open_artifact(artifact) as runner:
        expected = greedy_tokens(Loop(runner), prompt, 12)
        own = decoder_of(runner, 17)
        assert not isinstance(own, Loop)
        own.step(prompt[:2])  # a prompt may come in pieces
        assert greedy_tokens(own, prompt[2:], 12) == expected
        with pytest.raises(ValueError, match="capacity"):
            own.step([1] * 9)


def shipped(workshop: Workshop, **build: object) -> Artifact:
    """A decoder with a tokenizer of one word per token, and so with generate.py."""
    request = workshop.request("decoder", load_checked_target("ort"), **build)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(request.out / "tokenizer.json"))
    return build_artifact(request, {})


@pytest.mark.parametrize("form", ["onnx", "ort"])
def test_the_shipped_runner_generates(workshop: Workshop, form: str) -> None:
    """generate.py lies beside the model where there is a tokenizer, and runs with three packages and no others."""
    artifact = shipped(workshop, format=form)
    code = ("import runpy, sys; sys.argv = ['generate.py', 'w3 w4 w5', '--tokens', '6']\n"
            "try: runpy.run_path(sys.path.pop(0) or FILE, run_name='__main__')\n"
            "finally: print(sorted({'torch', 'deploytool', 'transformers', 'onnx'} & set(sys.modules)))")  # fmt: skip
    code = code.replace("sys.path.pop(0) or FILE", repr(str(artifact.folder / "generate.py")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    with open_artifact(artifact) as runner:
        expected = greedy_tokens(Loop(runner), [3, 4, 5], 6)
    assert done.stdout.split() == ["w3", "w4", "w5", *(f"w{token}" for token in expected), "[]"]
    assert "tokens/s" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "--tokens", "4"], "at least one token (got none)"),
        (["w3", "--tokens", "-3"], "--tokens must be at least 1 (got -3)"),
        (["w3", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["w3", "--seed", "-1"], "--seed must be 0 or more"),
        (["w3 w4", "--tokens", "255"], "room for 254 in the model's 256 positions"),
        (["w3 " * 256], "got 256 tokens"),
    ],
)
def test_what_cannot_be_generated_is_told_in_one_line(
    workshop: Workshop, tmp_path: Path, arguments: list[str], said: str
) -> None:
    """An empty prompt, a wrong number and what the model has no positions for end with one line and exit code 2."""
    artifact = shipped(workshop)
    (artifact.folder / "config.json").write_text('{"max_position_embeddings": 256}')
    done = _generate(artifact.folder, arguments)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and said in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "decoder.py", "model.onnx"])
def test_a_missing_file_is_told_in_one_line(workshop: Workshop, name: str) -> None:
    """What must lie beside generate.py is named, with exit code 4."""
    artifact = shipped(workshop)
    (artifact.folder / name).unlink()
    done = _generate(artifact.folder, ["w3"])
    assert done.returncode == 4 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and name in done.stderr


def test_a_damaged_model_is_told_in_one_line(workshop: Workshop) -> None:
    """A file that the runtime refuses ends with one line that says so and exit code 5."""
    artifact = shipped(workshop)
    artifact.main_file.write_bytes(artifact.main_file.read_bytes()[:1000])
    done = _generate(artifact.folder, ["w3"])
    assert done.returncode == 5 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "does not open" in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "artifact.json"])
def test_a_damaged_file_beside_it_is_told_in_one_line(workshop: Workshop, name: str) -> None:
    """So does a damaged file of text."""
    artifact = shipped(workshop)
    (artifact.folder / name).write_text('{"half')
    done = _generate(artifact.folder, ["w3"])
    assert done.returncode == 5 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "does not run" in done.stderr


def test_who_reads_no_further_is_no_error(workshop: Workshop) -> None:
    """A text that is piped to what closes early, such as head, must end without a word."""
    command = [sys.executable, str(shipped(workshop).folder / "generate.py"), "w3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        ran.stdout.close()
        assert (ran.stderr.read(), ran.wait(60)) == ("", 0)


def test_what_is_not_asked_for_fits(workshop: Workshop) -> None:
    """Without --tokens a long prompt gets as many new tokens as there are positions for."""
    artifact = shipped(workshop)
    (artifact.folder / "config.json").write_text('{"max_position_embeddings": 256}')
    done = _generate(artifact.folder, ["w3 " * 253])
    assert done.returncode == 0 and len(done.stdout.split()) == 256


def _generate(folder: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(folder / "generate.py"), *arguments], capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip


def test_the_reference_decodes_without_copies(workshop: Workshop) -> None:
    """Eager has a decoder of its own, which gives what feeding its outputs back gives."""
    with open_artifact(workshop.artifact("decoder", "eager")) as runner:
        own = decoder_of(runner, 0)
        assert not isinstance(own, Loop)
        assert greedy_tokens(own, [3, 4, 5], 10) == greedy_tokens(Loop(runner), [3, 4, 5], 10)
