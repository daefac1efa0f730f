"""Metrics of early exit over a step's groups: exit reasons, probes, their calibration, tokens saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megarl.types import ScoredCompletion, ScoredGroup

EARLY = ("confident", "near_budget", "repetition")  # exits at a marker: what followed the finished step was cut off
_REASONS = ("plain", "think_end", "end_of_text", *EARLY, "budget", "aborted")
_BINS = 10


def summarise(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """One flat dict of metrics, with the same keys at every step.

    `early_exit_fraction`: completions that ended at a marker. `exits/<reason>`: how many. `probe_tokens`: tokens of all
    trial answers; `discarded_tokens`: sampled and cut off. `tokens_saved` is an estimate over groups in which some
    completions ended early and others by themselves ("think_end", "end_of_text", "plain"): the mean length of the
    latter minus each early one's length. `probe_confidence/<lower bound>`: a histogram of ten bins.
    Against the completion's correctness (0 if there was nothing to count): `exits_right` is the share of confident
    exits that are right; `probe_calibration_error` is the expected calibration error (Guo et al. 2017) over the ten
    bins of all probes. A declined probe is compared with the answer that its completion gave in the end.
    """
    scored = [c for group in groups for c in group.completions]
    completions = [c.completion for c in scored]
    n = max(len(completions), 1)
    reasons = Counter(str(c.exit_reason) for c in completions)
    probes = [p for c in completions for p in c.probes]
    pairs = np.array([(p.confidence, _right(c)) for c in scored for p in c.completion.probes]).reshape(-1, 2)
    places = np.minimum((pairs[:, 0] * _BINS).astype(int), _BINS - 1)
    bins = [pairs[places == b] for b in range(_BINS)]
    errors = [len(inside) * abs(float(np.subtract(*inside.mean(0)))) for inside in bins if len(inside)]
    confident = [c for c in scored if c.completion.exit_reason == "confident"]
    return {
        "early_exit_fraction": sum(reasons[r] for r in EARLY) / n,
        **{f"exits/{reason}": reasons[reason] for reason in _REASONS},
        "probe_tokens": sum(len(p.token_ids) for p in probes),
        "discarded_tokens": sum(c.discarded_tokens for c in completions),
        "tokens_saved": _tokens_saved(groups),
        "probes_per_completion": len(probes) / n,
        **{f"probe_confidence/{b / _BINS:.1f}": len(inside) for b, inside in enumerate(bins)},
        "exits_right": sum(_right(c) for c in confident) / max(len(confident), 1),
        "probe_calibration_error": sum(errors) / max(len(probes), 1),
    }


def _right(c: ScoredCompletion) -> bool:
    return c.verdict == "right"


def _tokens_saved(groups: Sequence[ScoredGroup]) -> float:
    saved = 0.0
    for group in groups:
        completions = [c.completion for c in group.completions]
        early = [len(c) for c in completions if c.exit_reason in EARLY]
        natural = [len(c) for c in completions if c.exit_reason in ("think_end", "end_of_text", "plain")]
        if early and natural:
            saved += len(early) * sum(natural) / len(natural) - sum(early)
    return saved
