"""Figures against a profile's limits: what is wrong, in sentences. Saved figures can be judged again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploytool.difference import error_max
from deploytool.errors import InputRefused
from deploytool.target import Limits

_RESAMPLES = 2000


def judge_parity(parity: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is wrong with figures that `parity_job` returned, one sentence each; empty when they pass.

    Where they hold "derived" (derived.py), outputs are held to those limits too.
    """
    if not parity["cases"] or not parity["outputs"]:
        return ["nothing was compared"]
    wrong = []
    for name, figures in parity["outputs"].items():
        wrong += [f"output {name!r}: {problem}" for problem in figures["problems"]]
        own = (parity.get("derived") or {}).get(name)
        wrong += [f"output {name!r}: {sentence}" for sentence in _beyond(figures, limits, own)]
    return wrong


def _beyond(figures: Mapping[str, Any], limits: Limits, derived: Mapping[str, Any] | None) -> list[str]:
    wrong = []
    if not figures["cosine"] >= limits.cosine_min:  # also where it is no number
        wrong.append(f"cosine of the worst sample must be at least {limits.cosine_min} "
                     f"(got {figures['cosine']:.6f} at {figures['worst_sample']})")  # fmt: skip
    elif not figures["relative_error"] <= error_max(limits.cosine_min):
        wrong.append(f"relative error of the worst sample must be at most {error_max(limits.cosine_min):.3g}, which "
                     f"goes with that cosine (got {figures['relative_error']:.3g})")  # fmt: skip
    elif derived and not figures["relative_error"] <= derived["relative_error_max"]:
        wrong.append(f"relative error must be at most {derived['relative_error_max']:.3g} (got "
                     f"{figures['relative_error']:.3g} at {figures['worst_error_sample']}); the limit is "
                     f"{derived['from']}")  # fmt: skip
    if limits.max_abs is not None and figures["max_abs"] > limits.max_abs:
        wrong.append(f"largest absolute error must be at most {limits.max_abs} (got {figures['max_abs']:.3g})")
    if limits.sqnr_db_min is not None and figures["sqnr_db"] < limits.sqnr_db_min:
        wrong.append(f"SQNR must be at least {limits.sqnr_db_min} dB (got {figures['sqnr_db']:.1f})")
    agreement = figures["agreement"]
    if limits.agreement_min is not None and agreement is not None and agreement < limits.agreement_min:
        wrong.append(f"share of equal decisions must be at least {limits.agreement_min} (got {agreement:.4f})")
    return wrong


def compare_quality(
    reference: Mapping[str, Any], candidate: Mapping[str, Any], lower_is_better: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
    """The report's "quality" and "generation" from what two `quality_job`s returned.

    A metric whose samples both have scored has the "paired" difference of the two; see `paired`.
    """
    quality: dict[str, dict[str, Any]] = {
        name: {
            "reference": value,
            "candidate": candidate["metrics"].get(name),
            "lower_is_better": name in lower_is_better,
        }
        for name, value in reference["metrics"].items()
    }
    for name, scores in reference.get("scores", {}).items():
        quality[name]["paired"] = paired(name, scores, candidate.get("scores", {}).get(name, []))
    if not reference["tokens"]:
        return quality, None
    return quality, _generation(reference["tokens"], reference["rivals"], candidate["tokens"])


def _generation(
    reference: Sequence[Sequence[int]], rivals: Sequence[Sequence[int | None]], candidate: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """What both decoded, token by token. Where the candidate first differs by a near tie of the reference's, nothing
    follows that could be compared: the sentences differ from there, and neither is wrong."""
    compared = same = ties = 0
    for wanted, near, got in zip(reference, rivals, candidate, strict=True):
        parts = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if a != b), len(wanted))
        tied = parts < len(wanted) and near[parts] == got[parts]
        ties += tied
        compared += parts if tied else len(wanted)
        same += sum(a == b for a, b in zip(wanted[:parts] if tied else wanted, got, strict=False))
    return {"prompts": len(reference), "tokens": compared, "ties": ties,
            "agreement": same / compared if compared else 0.0}  # fmt: skip


def paired(name: str, reference: Sequence[float], candidate: Sequence[float]) -> dict[str, Any]:
    """How much the scores of the same samples differ: {"samples", "difference", "ci"}.

    The mean of candidate minus reference, and its 95 % interval: a bootstrap over samples, seeded, so that the spread
    that both sides share is left out. Raises InputRefused for scores that do not pair.
    Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    if not reference or len(reference) != len(candidate):
        raise InputRefused("DT313", f"the scores of {name!r} must be of the same samples for both "
                           f"(got {len(reference)} and {len(candidate)})")  # fmt: skip
    differences = np.asarray(candidate, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"samples": len(differences), "difference": float(differences.mean()), "ci": [float(low), float(high)]}


def judge_quality(
    quality: Mapping[str, Mapping[str, Any]], generation: Mapping[str, Any] | None, limits: Limits
) -> list[str]:
    """What is wrong with the task metrics and decoded tokens, one sentence each."""
    wrong = []
    for name, pair in quality.items():
        if pair["candidate"] is None:
            wrong.append(f"metric {name!r} is missing")
            continue
        sign = -1.0 if pair["lower_is_better"] else 1.0
        lost = sign * (pair["reference"] - pair["candidate"]) / max(abs(pair["reference"]), 1e-12)
        if not lost <= limits.metric_drop_max:  # also where one is no number
            wrong.append(f"metric {name!r} may lose {limits.metric_drop_max:.2%} "
                         f"(reference {pair['reference']:.6g}, got {pair['candidate']:.6g})")  # fmt: skip
    if limits.generation_min is None or not generation:
        return wrong
    if not generation["tokens"]:
        wrong.append("greedily decoded tokens must be compared with the reference's (the first after "
                     "every prompt nearly tied)")  # fmt: skip
    elif generation["agreement"] < limits.generation_min:
        wrong.append(f"share of greedily decoded tokens equal to the reference's must be at least "
                     f"{limits.generation_min} (got {generation['agreement']:.4f})")  # fmt: skip
    return wrong
