"""What a report says of an artifact beside its figures: what they were taken on, and what they do not show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends import measured, saturation
from deploytool.backends.base import find_backend
from deploytool.bench.environment import environment
from deploytool.cache import Prepared
from deploytool.decoding import decodes
from deploytool.target import Target

_NOTHING = 0.005  # shown as 0 %


def findings_of(target: Target, artifact: Artifact, prepared: Prepared) -> list[str]:
    """The sentences for one artifact, but for those of its timing."""
    findings = [] if artifact.executes else [
        "not executed: the engine was built for hardware that is not here; parity was taken on "
        + str(artifact.settings.get("parity_run", "the very graph that the compiler was given"))]  # fmt: skip
    if find_backend(target.backend).accepts == "onnx":
        findings += prepared.notes
    findings += prepared.info["notes"]
    if "input_grids" in artifact.settings:
        findings.append(f"the inputs of {artifact.settings['input_grids']} layers lie on learned grids: a number "
                        "between two codes may fall to either, so the limits are eased (docs/parity.md)")  # fmt: skip
    if prepared.info["synthetic"]:
        findings.append("the samples are synthetic: parity on your own data is not shown")
    if decodes(artifact.signature) and not prepared.info["has_evaluate"]:
        findings.append("no quality was measured: the language model has no evaluate(). A Hugging Face folder with its "
                        "tokenizer.json gets perplexity and greedy tokens on documentation; a model file with "
                        "evaluate() and prompts() measures on your own text (docs/models.md)")  # fmt: skip
    if prepared.info["fast_path"]:
        findings.append(_of_fast_path(prepared.info["fast_path"]))
    coded = prepared.info["encodings"]["of"]
    if coded and target.backend != "eager" and not artifact.settings.get("encoded"):
        findings.append(f"the model's {coded} quantized weights are stored in this target's own form, not as their "
                        "codes, which ort-int4 and ort-weight-int8 keep")  # fmt: skip
    findings += [*_of_what_ran(target, artifact), *_of_script(artifact.settings)]
    if "note" in artifact.settings:
        findings.append(str(artifact.settings["note"]))
    findings += measured.told(artifact.settings)
    return findings + saturation.told(artifact.settings, environment()["cpu_flags"])


def _of_what_ran(target: Target, artifact: Artifact) -> list[str]:
    """That a precision below fp32 was asked for and nothing computes in it; weights alone need not."""
    ran = artifact.settings.get("ran") or {}
    weights_alone = artifact.settings.get("weights_only") and not artifact.settings.get("activation_group")
    if artifact.precision == "fp32" or weights_alone or "nodes_by_precision" not in ran:
        return []
    by = "compute" if ran["compute_by_precision"] else "nodes"
    shares = ran[f"{by}_by_precision"]
    own = sum(share for name, share in shares.items() if name not in ("fp32", "fp64", "other"))
    if own >= _NOTHING:
        return []
    of = "the computing" if by == "compute" else "the nodes"
    uncounted = f", not counted: {', '.join(ran['uncounted'])}" if ran["uncounted"] else ""
    plain = f"; {target.plain} computes the same without the loss" if target.plain else ""
    return [f"{artifact.precision} was asked for, and {own:.1%} of {of} runs in less than fp32 (by {ran['source']}"
            f"{uncounted}){plain}"]  # fmt: skip


def _of_script(settings: Mapping[str, Any]) -> list[str]:
    """What torch.jit.script compiled, or what a trace holds fixed that other inputs might decide otherwise."""
    found = []
    if "scripted" in settings:
        names = ", ".join(name or "the whole model" for name in settings["scripted"])
        found.append(f"torch.jit.script compiled {names}: all ways of its branches and loops are in the artifact")
    if fixed := settings.get("fixed_by_trace"):
        found.append("the trace holds one way where code decides by values or sizes, which is right for all samples; "
                     f"other inputs might take another (lines: {len(fixed)}, the first {fixed[0]})")  # fmt: skip
    return found


def _of_fast_path(differs: Mapping[str, Any]) -> str:
    far = (f"by up to {differs['largest']:.2g} of the largest output, in {differs['cases']} of {differs['of']} cases: "
           f"{', '.join(differs['outputs'])}") if differs["cases"] else ""  # fmt: skip
    found = "; ".join(filter(None, (far, differs["failed"])))
    return (f"on torch's fast path for nn.TransformerEncoder, which PyTorch takes by itself, the outputs differ "
            f"({found}): it leaves zeros where a padding mask hides tokens. Parity is with the module without it; "
            "eager's metric and time are with it (docs/parity.md)")  # fmt: skip
