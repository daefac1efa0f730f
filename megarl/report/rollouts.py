"""Which rollouts the page has, and how: one compressed chunk a step, tokens as numbers of a shared dictionary.

Held-out responses are packed in the same way, after the rollouts. A page has at most `BUDGET` bytes of both. When a run
has more, the page gets evenly spread steps, the first and the last included, and the first whole groups of a step that
is too large. The page says what it leaves out.
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.models.tokenizer import load_tokenizer
from megarl.report.run import Run, as_json, finite
from megarl.rollout.detokenize import Vocabulary
from megarl.run.records import EVALUATIONS, rollout_lines, rollouts_files

BUDGET = 18 * 2**20  # of compressed rollouts, in base64, over all runs of a page
PACKED = 0.22  # bytes in the page per byte on disk, roughly: steps are chosen before any is read
HELD_OUT = 0.25  # of the budget, for held-out responses
BINS = 10


@dataclass
class Packed:
    """The chosen rollouts of one run."""

    chunks: dict[int | str, str] = field(default_factory=dict)  # by key: a step, or "eval-" and a step
    index: list[dict[str, Any]] = field(default_factory=list)
    """`{key, step, held_out, groups, completions, all}` of each chunk as shown; `all` counts what is on disk."""
    steps_on_disk: int = 0
    evaluations_on_disk: int = 0
    tokens: list[Any] = field(default_factory=list)  # [id, text or bytes] by number
    calibration: list[list[float]] = field(default_factory=list)  # [probes, mean confidence, share right] by tenth
    notice: str = ""


def pack(run: Run, budget: int = BUDGET) -> Packed:
    """Choose and pack the rollouts of a run, within about `budget` bytes."""
    files, held_out = rollouts_files(run.folder), rollouts_files(run.folder, EVALUATIONS)
    packed, numbers = Packed(steps_on_disk=len(files), evaluations_on_disk=len(held_out)), _Numbers(run)
    packed.notice = numbers.notice
    sums = [[0, 0.0, 0] for _ in range(BINS)]
    rest = budget * HELD_OUT if held_out and files else 0.0 if files else float(budget)
    _pack_files(files, budget - rest, False, packed, numbers, sums)
    _pack_files(held_out, rest, True, packed, numbers, sums)
    packed.tokens = numbers.table
    if any(n for n, _, _ in sums):
        packed.calibration = [[n, c / n if n else 0.0, r / n if n else 0.0] for n, c, r in sums]
    return packed


def _pack_files(
    recorded: dict[int, Path], budget: float, held_out: bool, packed: Packed, numbers: _Numbers, sums: list[list[Any]]
) -> None:
    """Add the chosen of these files to `packed`, within about `budget` bytes."""
    files = list(recorded.values())
    chosen, used = choose([file.stat().st_size for file in files], budget), 0
    for place, i in enumerate(chosen):
        records = [record for _, record in rollout_lines(files[i])]
        groups = [list(group) for _, group in groupby(records, key=lambda r: r["uid"])]
        for group in [] if held_out else groups:
            _count_probes(group, sums)
        step = list(recorded)[i]
        key = f"eval-{step}" if held_out else step
        packed.chunks[key], shown = _chunk(groups, numbers, (budget - used) / (len(chosen) - place))
        used += len(packed.chunks[key])
        completions = sum(map(len, groups[:shown]))
        row = {"key": key, "step": step, "held_out": held_out, "groups": shown, "completions": completions}
        packed.index.append(row | {"all": len(records)})


def choose(sizes: list[int], budget: float) -> list[int]:
    """Positions of the files to read: all if they fit, else evenly spread ones with the first and the last."""
    total = sum(sizes) * PACKED
    if total <= budget or len(sizes) < 3:
        return list(range(len(sizes)))
    n = max(2, min(len(sizes), int(len(sizes) * budget / total)))
    return sorted({round(i * (len(sizes) - 1) / (n - 1)) for i in range(n)})


def compress(value: Any) -> str:
    """JSON → gzip → base64. Equal values give equal text."""
    return base64.b64encode(gzip.compress(as_json(value).encode(), 6, mtime=0)).decode()


class _Numbers:
    """Numbers tokens in the order of their first appearance. Without the run's tokenizer it numbers nothing."""

    def __init__(self, run: Run) -> None:
        self.table: list[Any] = []
        self._number: dict[int, int] = {}
        self._pieces: list[bytes] | None = None
        self.notice = ""
        model = Path(run.settings.get("model", {}).get("path", ""))
        try:
            self._pieces = Vocabulary(load_tokenizer(model)).pieces
        except UserError as e:
            self.notice = f"responses are shown as text, without their tokens: {e}"

    def of(self, token_ids: list[int]) -> list[int] | None:
        if self._pieces is None:
            return None
        return [self._number[i] if i in self._number else self._add(i) for i in token_ids]

    def _add(self, token: int) -> int:
        assert self._pieces is not None
        piece = self._pieces[token] if token < len(self._pieces) else b""
        try:
            text: Any = piece.decode()
        except UnicodeDecodeError:
            text = list(piece)  # part of a character: the page joins it with what follows
        self._number[token] = len(self.table)
        self.table.append([token, text])
        return self._number[token]


def _chunk(groups: list[list[dict[str, Any]]], numbers: _Numbers, share: float) -> tuple[str, int]:
    """The first whole groups that fit into `share` bytes (at least one), and their number."""
    packed = [_group(group, numbers) for group in groups]
    shown = len(packed)
    while True:
        text = compress(packed[:shown])
        if len(text) <= share or shown <= 1:
            return text, shown
        shown = max(1, min(shown - 1, int(shown * share / len(text) * 0.97)))


def _group(records: list[dict[str, Any]], numbers: _Numbers) -> dict[str, Any]:
    first = records[0]
    return {
        **{key: first.get(key) for key in ("uid", "prompt", "answer", "source", "keep", "replaced")},
        "completions": [_completion(record, numbers) for record in records],
    }


def _completion(r: dict[str, Any], numbers: _Numbers) -> dict[str, Any]:
    """`t` token numbers, `l` log-probs in thousandths below 0 (null where inserted), `o` origins as run lengths."""
    kept = (
        "index", "finish", "exit_reason", "spans", "verdict", "score", "message", "formatted", "steps", "reward",
        "advantage", "weight",
    )  # fmt: skip
    tokens = numbers.of(r["response_ids"])
    out = {key: finite(r.get(key)) for key in kept}
    out["probes"] = [[position, c, accepted, numbers.of(ids)] for position, c, accepted, ids in r.get("probes", [])]
    out["n"] = len(r["response_ids"])
    if tokens is None:
        return out | {"text": r.get("response", "")}
    return out | {
        "t": tokens,
        "l": [None if x is None else round(-1000 * x) for x in r["logprobs"]],
        "o": [[origin, len(list(run))] for origin, run in groupby(r["origin"])],
    }


def _count_probes(group: list[dict[str, Any]], sums: list[list[Any]]) -> None:
    for record in group:
        for _, confidence, *_ in record.get("probes", []):
            row = sums[min(int(confidence * BINS), BINS - 1)]
            row[0] += 1
            row[1] += confidence
            row[2] += record.get("verdict") == "right"
