"""Figures of early exit over a step's groups: reasons, probes, their calibration, tokens saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megarl.types import Completion, Group

EARLY = ("confident", "near_budget", "repetition")  # exits at a marker: what followed the finished step was cut off
_REASONS = ("plain", "think_end", "end_of_text", *EARLY, "budget", "aborted")
_BINS = 10


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """One flat dict of figures, the same keys at every step.

    `early_exit_fraction`: completions that ended at a marker. `exits/<reason>`: how many. `probe_tokens`: tokens of all
    trial answers; `discarded_tokens`: sampled and cut off. `tokens_saved`: an estimate, over groups in which some
    completions ended early and others ended by themselves ("think_end", "end_of_text", "plain"): the mean length of the
    latter less each early one's length. `probes_per_completion`; `probe_confidence/<lower bound>`: a histogram of ten
    bins. Against the completion's correctness (0 where there was nothing to count): `exits_right`: share of confident
    exits that are right; `probe_calibration_error`: the expected calibration error (Guo et al. 2017) over the ten bins
    of all probes; a declined probe is compared with the answer its completion gave in the end.
    """
    completions = [c for group in groups for c in group.completions]
    n = max(len(completions), 1)
    reasons = Counter(str(c.exit_reason) for c in completions)
    probes = [p for c in completions for p in c.probes]
    bins = calibration(completions)
    confident = [c for c in completions if c.exit_reason == "confident"]
    return {
        "early_exit_fraction": sum(reasons[r] for r in EARLY) / n,
        **{f"exits/{reason}": reasons[reason] for reason in _REASONS},
        "probe_tokens": sum(len(p.token_ids) for p in probes),
        "discarded_tokens": sum(c.discarded_tokens for c in completions),
        "tokens_saved": _tokens_saved(groups),
        "probes_per_completion": len(probes) / n,
        **{f"probe_confidence/{row['from']:.1f}": row["probes"] for row in bins},
        "exits_right": sum(_right(c) for c in confident) / max(len(confident), 1),
        "probe_calibration_error": sum(row["probes"] * abs(row["confidence"] - row["right"]) for row in bins)
        / max(len(probes), 1),
    }


def calibration(completions: Sequence[Completion]) -> list[dict[str, float]]:
    """Confidence against correctness: ten rows `{from, probes, confidence, right}`, the last two means over the bin."""
    pairs = np.array([(p.confidence, _right(c)) for c in completions for p in c.probes]).reshape(-1, 2)
    bins = np.minimum((pairs[:, 0] * _BINS).astype(int), _BINS - 1)
    rows = []
    for b in range(_BINS):
        inside = pairs[bins == b]
        confidence, right = inside.mean(0) if len(inside) else (0.0, 0.0)
        rows.append({"from": b / _BINS, "probes": len(inside), "confidence": float(confidence), "right": float(right)})
    return rows


def _right(completion: Completion) -> bool:
    return completion.score >= 1


def _tokens_saved(groups: Sequence[Group]) -> float:
    saved = 0.0
    for group in groups:
        early = [len(c) for c in group.completions if c.exit_reason in EARLY]
        natural = [len(c) for c in group.completions if c.exit_reason in ("think_end", "end_of_text", "plain")]
        if early and natural:
            saved += len(early) * sum(natural) / len(natural) - sum(early)
    return saved
