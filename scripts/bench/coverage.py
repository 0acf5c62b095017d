"""Which architectures go to which targets: small models with random weights, each exported and compared.

    python scripts/bench/coverage.py [--family NAME]... [--target NAME]... [--json FILE]

Models of transformers are made from configurations and saved as folders, nothing is downloaded; plain torch modules
lie in modules/. Every export is a process of its own with limits on time and memory, compared at every shape of its
samples. Prints the table, and writes the JSON where asked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TARGETS = ("torchscript", "ort", "openvino", "trt")
MODULES = Path(__file__).parent / "modules"
SECONDS, BYTES = 240, "5G"

_TEXT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 128}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 64}  # fmt: skip
_PAIR = {"vocab_size": 128, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
_SPEECH = {**_PAIR, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": [],
           "begin_suppress_tokens": []}  # fmt: skip
_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "projection_dim": 16}  # fmt: skip

# Family -> the class in transformers and its configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertModel", _TEXT),
    "DistilBERT": ("DistilBertModel", {"vocab_size": 128, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
                                       "max_position_embeddings": 128}),
    "RoBERTa": ("RobertaForSequenceClassification", {**_TEXT, "type_vocab_size": 1}),
    "ALBERT": ("AlbertModel", {**_TEXT, "embedding_size": 16}),
    "ELECTRA": ("ElectraForTokenClassification", {**_TEXT, "embedding_size": 16}),
    "DeBERTa": ("DebertaV2Model", {**_TEXT, "relative_attention": True, "position_buckets": 16,
                                   "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", "share_att_key": True,
                                   "position_biased_input": False}),
    "MPNet": ("MPNetModel", _TEXT),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 128, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPTForCausalLM", {"vocab_size": 128, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                               "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 32}),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", _GROUPED),
    "Gemma": ("GemmaForCausalLM", _GROUPED),
    "Mistral": ("MistralForCausalLM", {**_GROUPED, "sliding_window": 32}),
    "Phi": ("PhiForCausalLM", _GROUPED),
    "T5": ("T5ForConditionalGeneration", {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                                          "num_heads": 4, "decoder_start_token_id": 0}),
    "BART": ("BartForConditionalGeneration", {**_PAIR, "max_position_embeddings": 128}),
    "ViT": ("ViTForImageClassification", _IMAGE),
    "DeiT": ("DeiTForImageClassification", _IMAGE),
    "Swin": ("SwinForImageClassification", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
                                            "num_heads": [2, 4], "window_size": 4}),
    "ConvNeXt": ("ConvNextForImageClassification", {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1],
                                                    "num_stages": 2}),
    "ResNet": ("ResNetForImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                                                "layer_type": "basic"}),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}),
    "SegFormer": ("SegformerForSemanticSegmentation", {"image_size": 64, "depths": [1, 1, 1, 1],
                                                       "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16}),
    "DETR": ("DetrForObjectDetection", {**_PAIR, "num_queries": 5, "use_pretrained_backbone": False,
                                        "use_timm_backbone": False, "backbone": None,
                                        "backbone_config": ("ResNetConfig", {"embedding_size": 16, "depths": [1, 1],
                                                            "hidden_sizes": [16, 32], "layer_type": "basic",
                                                            "out_features": ["stage2"]})}),
    "CLIP": ("CLIPModel", {"text_config": {**_CLIP, "vocab_size": 128, "max_position_embeddings": 64,
                                           "bos_token_id": 1, "eos_token_id": 127},
                           "vision_config": {**_CLIP, "image_size": 32, "patch_size": 8}, "projection_dim": 16}),
    "Wav2Vec2": ("Wav2Vec2ForCTC", {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "intermediate_size": 64, "conv_dim": [16, 16, 16],
                                    "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4],
                                    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}),
    "Whisper": ("WhisperForConditionalGeneration", _SPEECH),
}  # fmt: skip
PLAIN = {"LSTM": "lstm", "GRU": "gru", "depthwise convolutions": "depthwise", "transposed convolutions": "transposed",
         "U-Net": "unet", "nn.Transformer": "transformer", "nn.TransformerEncoder with padding": "padded"}  # fmt: skip


def make(family: str, folder: Path) -> str:
    """What `deploytool export` is given for a family: a module file, or a folder written here."""
    if family in PLAIN:
        return str(MODULES / f"{PLAIN[family]}.py")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    kind, settings = FAMILIES[family]
    built = {name: getattr(transformers, value[0])(**value[1]) if isinstance(value, tuple) else value
             for name, value in settings.items()}  # fmt: skip
    model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**built))
    settle(model)
    model.eval().save_pretrained(folder / family)
    return str(folder / family)


def settle(model: Any) -> None:
    """Give batch norms the statistics of noise, as training would: with those of their beginning, signals die out."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None  # the plain average
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


def export(model: str, targets: Sequence[str], out: Path) -> dict[str, dict[str, str]]:
    """{target: {"status", "reason"}} of one export."""
    command = [sys.executable, "-m", "deploytool", "export", model, *(w for t in targets for w in ("--target", t)),
               "--no-bench", "--no-quality", "--json", "--quiet", "--offline", "--timeout", str(SECONDS),
               "--memory-limit", BYTES, "--output", str(out)]  # fmt: skip
    environment = {**os.environ, "DEPLOYTOOL_CACHE": str(out.parent / "cache")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS * 4,
                              check=False)  # fmt: skip
        document = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        return {target: {"status": "crashed", "reason": f"no document ({type(error).__name__})"} for target in targets}
    if "targets" not in document:
        return dict.fromkeys(targets, cell("failed", document["error"]))
    return {r["target"]: cell(r["status"], r.get("error"), r["reason"]) for r in document["targets"]}


def cell(status: str, error: Mapping[str, Any] | None, reason: str | None = None) -> dict[str, str]:
    """One cell of the table: ok, parity failed, not exportable, unavailable, or crashed."""
    if error is None:
        return {"status": "parity failed" if status == "failed" else status, "reason": reason or ""}
    said = [error["message"], *error["detail"][:2]]
    return {"status": "crashed" if error["code"] in ("DT900", "DT501") else "not exportable", "reason": "; ".join(said)}


def table(results: Mapping[str, Mapping[str, Mapping[str, str]]], targets: Sequence[str]) -> str:
    """Markdown: one row per family, then every miss with its reason, then the shares."""
    lines = [f"| family | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}"]
    lines += [f"| {f} | {' | '.join(cells[t]['status'] for t in targets)} |" for f, cells in results.items()]
    lines.append("")
    for target in targets:
        good = sum(cells[target]["status"] == "ok" for cells in results.values())
        lines.append(f"- {target}: {good} of {len(results)} ok")
    for family, cells in results.items():
        lines += [f"- {family}, {t}: {cells[t]['reason']}" for t in targets if cells[t]["status"] != "ok"]
    return "\n".join(lines)


def main() -> int:
    """Export what was asked for; 0 when nothing crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=[*FAMILIES, *PLAIN], help="default: all")
    parser.add_argument("--target", action="append", help=f"default: {', '.join(TARGETS)}")
    parser.add_argument("--json", type=Path, help="where to write every cell with its reason")
    parser.add_argument("--only-missing", action="store_true", help="go on with the families that the JSON lacks")
    options = parser.parse_args()
    families, targets = options.family or [*FAMILIES, *PLAIN], options.target or list(TARGETS)
    known = options.json is not None and options.json.is_file() and options.only_missing
    results: dict[str, dict[str, dict[str, str]]] = json.loads(options.json.read_text()) if known else {}
    for family in [f for f in families if f not in results]:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            results[family] = export(make(family, Path(work)), targets, Path(work) / "out")
        said = ", ".join(f"{t} {c['status']}" for t, c in results[family].items())
        print(f"{family}: {said} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results, targets))
    return int(any(c["status"] == "crashed" for cells in results.values() for c in cells.values()))


if __name__ == "__main__":
    raise SystemExit(main())
