"""A run directory as the report reads it. Files that a run has not written (yet) are absent, never an error."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl import config
from megarl.config import docs
from megarl.data import ledger
from megarl.run import atomic, provenance
from megarl.run.changes import CONFIG, flat
from megarl.run.directory import read_metrics
from megarl.view.summary import standard_error

LEDGER_ROWS = 50_000  # of the look-up table; the totals always count everything


@dataclass(frozen=True)
class Run:
    """What is on disk of one run."""

    folder: Path
    name: str
    metrics: list[dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, Any]
    ledger: list[ledger.Step]
    notices: list[str]

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.metrics), default=0)

    @property
    def steps(self) -> int:
        """Steps that the run was asked for."""
        return int(self.settings.get("steps", self.last_step))

    @property
    def finished(self) -> bool:
        """Whether it has done them, or was over before."""
        return self.last_step >= self.steps or bool(self.metrics and self.metrics[-1].get("ended"))


def read(folder: Path) -> Run:
    """Read a run. Raises UserError when there are no metrics, and for a damaged file, which it names."""
    metrics, notices = read_metrics(folder), []
    file = folder / CONFIG
    settings = config.tree(file) if file.is_file() else {}
    if not settings:
        notices.append(f"{file} is missing: settings are not shown")
    if metrics and (ended := metrics[-1].get("ended")):
        notices.append(f"the run was over at step {metrics[-1]['step']}: {ended}")
    environment = provenance.read(folder)
    steps, notice = ([], "") if environment.get("job") == "sft" else _ledger(folder / "checkpoints")
    notices += [notice] if notice else []
    return Run(folder, folder.resolve().name, metrics, settings, environment, steps, notices)


def _ledger(checkpoints: Path) -> tuple[list[ledger.Step], str]:
    """The ledger of the newest checkpoint, and why it is not shown. The run may replace that one as we read."""
    while committed := atomic.steps(checkpoints):
        try:
            return list(ledger.Ledger.load(atomic.folder_of(checkpoints, committed[-1]))), ""
        except Exception as e:
            if atomic.steps(checkpoints)[-1:] == committed[-1:]:
                return [], f"the data ledger is not shown: {e}"
    return [], ""


def columns(metrics: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """metrics.jsonl by key, in the order of first appearance; None where a step has no such figure.

    A step that is written twice (its evaluation apart) is one row. NaN and infinities, which JSON lacks, are texts.
    """
    merged: dict[int, dict[str, Any]] = {}
    for line in metrics:
        merged.setdefault(line["step"], {}).update(line)
    rows = [merged[step] for step in sorted(merged)]
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [finite(row.get(key)) for row in rows] for key in keys}


def tiles(run: Run) -> list[dict[str, Any]]:
    """The few figures that tell how a run went: `{label, value, before, unit, note}`, numbers."""
    found = []
    evaluations = [line for line in run.metrics if "eval/accuracy" in line]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        n = last.get("eval/completions", 0)
        note = f"± {100 * standard_error(last['eval/accuracy'], n):.1f}, {n} held-out responses"
        found.append(_tile("Held-out accuracy", first, last, "eval/accuracy", "%", note))
        if last.get("eval/score", last["eval/accuracy"]) != last["eval/accuracy"]:
            error = last.get("eval/score_std", 0.0) / math.sqrt(n) if n else 0.0
            found.append(_tile("Held-out score", first, last, "eval/score", "", f"± {error:.3f}, the graders' mean"))
        if "eval/response_tokens" in last:
            found.append(_tile("Held-out response", first, last, "eval/response_tokens", "tokens"))
    if losses := [line for line in run.metrics if "eval/loss" in line]:
        found.append(_tile("Held-out loss", losses[0], losses[-1], "eval/loss", ""))
    for key, label, unit in (
        ("nll", "Training loss", ""),
        ("reward", "Reward", ""),
        ("accuracy", "Training accuracy", "%"),
        ("score", "Training score", ""),
        ("response_tokens", "Response", "tokens"),
        ("early_exit_fraction", "Early exits", "%"),
    ):
        values = [line[key] for line in run.metrics if isinstance(line.get(key), int | float)]
        if key == "score" and values == [line.get("accuracy") for line in run.metrics if key in line]:
            continue  # graders of 1 and 0: the score is the accuracy
        if values:
            width = max(1, len(values) // 10)
            before, after = sum(values[:width]) / width, sum(values[-width:]) / width
            note = f"means over {width} steps" if width > 1 else "first and last step"
            found.append({"label": label, "before": before, "value": after, "unit": unit, "note": note})
    seconds = sum(line.get("seconds_total", 0.0) for line in run.metrics)
    found.append({"label": "Time", "before": None, "value": seconds, "unit": "s", "note": "sum over the steps"})
    if tokens := sum(line.get("tokens_generated", 0) for line in run.metrics):
        found.append({"label": "Tokens generated", "before": None, "value": tokens, "unit": "count", "note": ""})
    return found


def settings_rows(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Every setting `{key, value, default, changed, doc}`; a required one has no default, and is not `changed`."""
    known = {setting.key: setting for group in docs.groups() for setting in group.settings}
    rows = []
    for key, value in flat(tree):
        setting = known.get(key)
        if setting is None:
            default, changed = "unknown setting", True
        elif setting.default is docs.REQUIRED:
            default, changed = "required", False
        else:
            default = docs.text(setting.default)
            changed = docs.text(value) != default
        doc = setting.doc if setting else ""
        rows.append({"key": key, "value": docs.text(value), "default": default, "changed": changed, "doc": doc})
    return rows


def ledger_view(steps: Sequence[ledger.Step]) -> dict[str, Any] | None:
    """Fates by step and by epoch, prompts recorded twice in an epoch, and the newest entries for look-up."""
    if not steps:
        return None
    fates = {fate.name.lower(): [sum(e.fate is fate for e in s.entries) for s in steps] for fate in ledger.Fate}
    epochs: dict[int, Counter[str]] = defaultdict(Counter)
    seen: Counter[tuple[int, int]] = Counter()
    for step in steps:
        for entry in step.entries:
            epochs[entry.epoch][entry.fate.name.lower()] += 1
            seen[entry.epoch, entry.index] += 1
    rows = [[s.step, e.index, e.epoch, e.fate.value, e.completions, e.trained] for s in steps for e in s.entries]
    repeated = Counter(epoch for (epoch, _), count in seen.items() if count > 1)
    return {
        "step": [s.step for s in steps],
        "fates": fates,
        "epochs": [{"epoch": e, "repeated": repeated[e], **epochs[e]} for e in sorted(epochs)],
        "rows": rows[-LEDGER_ROWS:],
        "total": len(rows),
    }


def _tile(label: str, first: dict[str, Any], last: dict[str, Any], key: str, unit: str, note: str = "") -> dict:
    before = first.get(key) if first is not last else None
    return {"label": label, "before": before, "value": last[key], "unit": unit, "note": note}


def finite(value: Any) -> Any:
    """A value as JSON can say it: NaN and infinities as texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def as_json(value: Any) -> str:
    """Compact JSON that every browser reads."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
