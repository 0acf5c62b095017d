"""Tiny Hugging Face folders with random weights, written with transformers and opened as a user's would be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.cases import read_cases
from deploytool.errors import InputRefused
from deploytool.load.model import open_source
from deploytool.lower.prepare import prepare_job
from deploytool.source import ModelRef
from deploytool.target import load_target
from deploytool.verify.generation import greedy
from deploytool.verify.judge import judge_parity
from deploytool.verify.parity import parity_job

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SMALL, "vocab_size": 128, "max_position_embeddings": 512}
LLAMA = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {**SMALL, "image_size": 16, "patch_size": 8, "num_channels": 3}
T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32,
      "decoder_start_token_id": 0}  # fmt: skip
KINDS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "bert": ("BertConfig", "BertModel", TEXT),
    "classifier": ("BertConfig", "BertForSequenceClassification", {**TEXT, "num_labels": 3}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "tied": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "vit": ("ViTConfig", "ViTForImageClassification", {**PICTURE, "num_labels": 5}),
    "resnet": ("ResNetConfig", "ResNetForImageClassification",
               {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}),
    "clip": ("CLIPConfig", "CLIPModel", {"projection_dim": 8, "text_config": {**TEXT, "eos_token_id": 127},
                                         "vision_config": PICTURE}),
    "roberta": ("RobertaConfig", "RobertaModel", {**TEXT, "max_position_embeddings": 64, "pad_token_id": 3}),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {"vocab_size": 128, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 4,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
                 "decoder_ffn_dim": 16, "max_source_positions": 12, "max_target_positions": 32, "pad_token_id": 0,
                 "decoder_start_token_id": 1}),
    "choice": ("BertConfig", "BertForMultipleChoice", TEXT),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC",
                 {**SMALL, "vocab_size": 32, "conv_dim": [8], "conv_stride": [80], "conv_kernel": [100],
                  "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2}),
}  # fmt: skip
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind's folder, written once."""
    root = tmp_path_factory.mktemp("hf")

    def original(kind: str) -> Path:
        if not (root / kind).exists():
            config, model, settings = KINDS[kind]
            torch.manual_seed(0)
            module = getattr(transformers, model)(getattr(transformers, config)(**settings))
            with torch.no_grad():  # far from the tiny initial values, with which all inputs give one answer
                for parameter in module.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.3)
            module.save_pretrained(root / kind)
        return root / kind

    return original


@pytest.fixture
def folder(originals: Callable[[str], Path], tmp_path: Path) -> Folder:
    """A copy of a kind's folder, with changes to its config, and a tokenizer where asked for."""

    def make(kind: str, *, tokenizer: bool = False, **config: Any) -> Path:
        path = tmp_path / kind
        shutil.copytree(originals(kind), path)
        if config:
            data = {**json.loads((path / "config.json").read_text()), **config}
            (path / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
        if tokenizer:
            _bytes_tokenizer().save(str(path / "tokenizer.json"))
        return path

    return make


def _bytes_tokenizer() -> Any:
    """A tokenizer of single characters."""
    words = {"[UNK]": 0, **{chr(code): code for code in range(1, 128)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return made


def ref(path: Path) -> ModelRef:
    return ModelRef("huggingface", path.name, str(path))


@pytest.mark.parametrize("kind", ["bert", "classifier", "llama", "tied", "vit"])
@pytest.mark.parametrize("tokenizer", [False, True])
def test_every_kind_is_lowered_and_right_at_all_sizes(
    kind: str, tokenizer: bool, folder: Folder, tmp_path: Path
) -> None:
    """A folder must come out of ONNX Runtime as eager gives it, at every size, and be synthetic without real text."""
    pytest.importorskip("onnxruntime")
    path = folder(kind, tokenizer=tokenizer)
    info = prepare_job(vars(ref(path)), str(tmp_path / "out"), "torchscript", 0)
    assert info["shapes"] >= 3 and info["synthetic"] == (kind == "vit" or not tokenizer)
    parity = parity_job(str(tmp_path / "out" / "onnx"), str(tmp_path / "out" / "cases"))
    assert judge_parity(parity, load_target("ort").parity) == []
    assert {str(path / "config.json"), str(path / "model.safetensors")} <= set(info["dependencies"])
    assert {p.name for p in (tmp_path / "out" / "assets").iterdir()} >= {"config.json"}
    first = next(iter(read_cases(tmp_path / "out" / "cases")))
    assert any(np.ptp(array) > 1e-3 for array in first.reference.values())


@pytest.mark.parametrize("kind", ["t5", "wav2vec2", "clip", "roberta"])
def test_further_kinds_are_lowered_and_right_at_all_sizes(kind: str, folder: Folder, tmp_path: Path) -> None:
    """Encoder-decoders, sound, pairs of text and image, and positions that start late must compare at every size."""
    pytest.importorskip("onnxruntime")
    info = prepare_job(vars(ref(folder(kind))), str(tmp_path / "out"), "torchscript", 0)
    assert info["shapes"] >= 3 and info["synthetic"]
    parity = parity_job(str(tmp_path / "out" / "onnx"), str(tmp_path / "out" / "cases"))
    assert judge_parity(parity, load_target("ort").parity) == []


def test_what_further_kinds_take(folder: Folder) -> None:
    """The inputs must be those of the class, with every dimension that may differ free."""
    free = {kind: [str(s) for s in open_source(ref(folder(kind))).signature.inputs]
            for kind in ("t5", "whisper", "clip", "wav2vec2")}  # fmt: skip
    written = "decoder_input_ids: int64[batch, written]"
    text = ["input_ids: int64[batch, sequence]", "attention_mask: int64[batch, sequence]"]
    assert free["t5"] == [*text, written]
    assert free["whisper"] == ["input_features: float32[batch, 4, 24]", written]
    assert free["clip"] == [*text, "pixel_values: float32[batch, 3, 16, 16]"]
    assert free["wav2vec2"] == ["input_values: float32[batch, samples]"]


def test_a_classifier_keeps_its_head(folder: Folder) -> None:
    """The class that the config names must be opened, not the one without its head."""
    signature = open_source(ref(folder("classifier"))).signature
    assert [str(s) for s in signature.outputs] == ["logits: float32[batch, 3]"]
    assert signature.input_names == ("input_ids", "attention_mask", "token_type_ids")
    encoder = open_source(ref(folder("bert"))).signature
    assert encoder.output_names == ("last_hidden_state", "pooler_output")


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_language_model_has_a_flat_cache(kind: str, folder: Folder) -> None:
    """Fewer key than query heads must show in the cache's shape, and a tied head must be one tensor."""
    source = open_source(ref(folder(kind, tokenizer=True)))
    assert str(source.signature.inputs[3]) == "past_key_values.0.key: float32[batch, 2, past_sequence, 4]"
    assert str(source.signature.outputs[0]) == "logits: float32[batch, sequence, 128]"
    assert source.signature.outputs[1].shape == ("batch", 2, "total_sequence", 4)
    model = source.module.model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")


def test_greedy_decoding_is_that_of_a_full_recompute(folder: Folder, tmp_path: Path) -> None:
    """Tokens decoded step by step through the cache, on ONNX Runtime, must be those of eager without any cache."""
    pytest.importorskip("onnxruntime")
    path = folder("llama", tokenizer=True)
    prepare_job(vars(ref(path)), str(tmp_path / "out"), "torchscript", 0)
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    for prompt in ([5, 6, 7], [100], list(range(40, 80))):
        ids, expected = list(prompt), []
        for _ in range(16):
            with torch.inference_mode():
                token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            expected.append(token)
            ids.append(token)
        with open_artifact(Artifact.load(tmp_path / "out" / "onnx")) as runner:
            assert greedy(runner, prompt, 16)[0] == expected
    assert len(set(expected)) > 1, "one token over and over would agree with anything"


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("bert", lambda p: _cut(p / "model.safetensors"), "must hold a model that transformers can read"),
    "config only": ("bert", lambda p: (p / "model.safetensors").unlink(), "must hold a model that transformers can"),
    "pointer": ("bert", lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com"), "read"),
    "not json": ("bert", lambda p: (p / "config.json").write_text("{"), "must hold a model that transformers can read"),
    "no type": ("bert", lambda p: (p / "config.json").write_text("{}"), "must hold a model that transformers can read"),
    "tokenizer": ("bert", lambda p: (p / "tokenizer.json").write_text("{}"), "must be a tokenizer"),
    "unknown class": ("bert", lambda p: _config(p, architectures=["BertForNothing"]), "(got 'BertForNothing')"),
    "other inputs": ("choice", lambda p: None, "must run as a text encoder"),
    "unknown sound": ("wav2vec2", lambda p: _config(p, conv_stride=[]), "must"),
}


def _config(path: Path, **changes: Any) -> None:
    data = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_folders_are_refused(name: str, folder: Folder) -> None:
    """A folder that cannot be taken must be refused as such, with what is wrong."""
    kind, spoil, sentence = BROKEN[name]
    path = folder(kind)
    spoil(path)
    with pytest.raises(InputRefused) as caught:
        open_source(ref(path))
    assert caught.value.code == "DT306" and sentence in str(caught.value)


def test_missing_weights_are_not_made_up(folder: Folder) -> None:
    """transformers fills what is missing with random numbers: a folder without its head must be refused."""
    path = folder("bert", architectures=["BertForSequenceClassification"])
    with pytest.raises(InputRefused) as caught:
        open_source(ref(path))
    assert caught.value.code == "DT306" and "classifier.weight" in caught.value.detail


def test_weights_with_nan_are_refused(folder: Folder) -> None:
    """NaN in a folder's weights must be told by the weight's name."""
    from safetensors.torch import load_file, save_file

    path = folder("bert")
    state = load_file(path / "model.safetensors")
    state["pooler.dense.bias"][3] = float("nan")
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputRefused) as caught:
        open_source(ref(path))
    assert (caught.value.code, caught.value.detail) == ("DT304", ("pooler.dense.bias",))


@pytest.mark.parametrize(("kind", "output"), [("bert", "last_hidden_state"), ("vit", "last_hidden_state")])
def test_a_config_without_architectures(kind: str, output: str, folder: Folder) -> None:
    """Where the config names no class, the one without a head is opened."""
    path = folder(kind, architectures=None)
    if kind == "vit":  # its own body has a pooler that the classifier's folder lacks
        with pytest.raises(InputRefused, match="must hold every weight of ViTModel"):
            open_source(ref(path))
        return
    assert open_source(ref(path)).signature.output_names[0] == output


def test_optimum_knows_more_kinds(folder: Folder) -> None:
    """An image model whose config names neither its class nor an image size is known to Optimum."""
    pytest.importorskip("optimum")
    path = folder("resnet", architectures=None)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 32}}))
    source = open_source(ref(path))
    assert str(source.signature.inputs[0]) == "pixel_values: float32[batch, 3, 32, 32]"
    assert source.signature.output_names == ("last_hidden_state", "pooler_output")


def test_without_optimum_its_kinds_are_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimum is an extra: without it the refusal must say how to install it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "optimum" else find(name, *a))
    with pytest.raises(InputRefused) as caught:
        open_source(ref(folder("resnet", architectures=None)))
    assert caught.value.code == "DT306" and "deploytool[optimum]" in str(caught.value)
