"""The table at the end of a run: held-out results before and after, and where to look next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megarl.run.directory import read_metrics
from megarl.run.records import EVALUATIONS, rollouts_file


def summary(folder: Path) -> Group:
    """The table of a finished run. With fewer than two evaluations, only where to look next."""
    lines = read_metrics(folder)
    evaluations = [line for line in lines if "eval/accuracy" in line]
    newest = max(line["step"] for line in lines) if lines else 0
    last = evaluations[-1]["step"] if evaluations else None
    held_out = () if last is None else _pointer("its held-out responses", rollouts_file(folder, last, EVALUATIONS))
    pointers = Text.assemble(
        "where to look next\n",
        *_pointer("the run on one page", folder / "report.html"),
        *_pointer("every metric of every step", folder / "metrics.jsonl"),
        *_pointer("what the model wrote, and why it was rewarded", rollouts_file(folder, newest)),
        *held_out,
        *_pointer("curves", f"tensorboard --logdir {folder / 'tensorboard'}"),
    )
    if len(evaluations) < 2:
        return Group(pointers)
    table = _table(evaluations[0], evaluations[-1])
    for label, share in _savings([line for line in lines if "early_exit_fraction" in line]).items():
        table.add_row(label, "", f"{100 * share:.0f}%", "")
    return Group(table, Text(), pointers)


def _savings(steps: list[dict[str, Any]]) -> dict[str, float]:
    """What Step-GRPO, DPPO and dynamic sampling left out, as shares of all completions. Nothing for what was off."""
    made = sum(value for line in steps for key, value in line.items() if key.startswith("verdict_"))
    if not made:
        return {}
    early = sum(line["early_exit_fraction"] for line in steps) / len(steps)
    dropped = sum(line["completions_dropped"] + line.get("completions_replaced", 0) for line in steps) / made
    shares = {"rollouts that ended early": early, "completions not trained": dropped}
    return {label: share for label, share in shares.items() if share}


def _table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    count = int(after["eval/completions"])
    table = Table(title=f"{count} held-out responses", title_justify="left")
    table.add_column("")
    for name, line in (("before", before), ("after", after)):
        table.add_column(f"{name} (step {line['step']})", justify="right")
    table.add_column("change", justify="right")
    low, high = before["eval/accuracy"], after["eval/accuracy"]
    table.add_row("accuracy", _share(low, count), _share(high, count), f"{100 * (high - low):+.1f} points")
    if any(line.get("eval/score", line["eval/accuracy"]) != line["eval/accuracy"] for line in (before, after)):
        old, new = (line.get("eval/score", math.nan) for line in (before, after))
        table.add_row("score, mean", _mean(before), _mean(after), f"{new - old:+.3f}")
    for key, label in (("response_tokens", "response tokens, mean"), ("steps_per_response", "reasoning steps, mean")):
        old, new = before[f"eval/{key}"], after[f"eval/{key}"]
        table.add_row(label, f"{old:.1f}", f"{new:.1f}", f"{100 * (new / old - 1):+.0f}%" if old else "")
    return table


def _share(accuracy: float, count: int) -> str:
    """With its standard error."""
    return f"{100 * accuracy:.1f}% ± {100 * standard_error(accuracy, count):.1f}"


def _mean(line: dict[str, Any]) -> str:
    """The graders' mean number, with its standard error."""
    if "eval/score" not in line:
        return ""
    return f"{line['eval/score']:.3f} ± {line.get('eval/score_std', 0.0) / math.sqrt(line['eval/completions']):.3f}"


def standard_error(share: float, count: int) -> float:
    """sqrt(a (1 - a) / n) of a share a of n. 0 for what is no share: older runs have mean scores there."""
    return math.sqrt(max(share * (1 - share), 0.0) / count) if count else 0.0


def _pointer(what: str, where: object) -> tuple[str, ...]:
    return (f"  {what:<46}", f"{where}\n")
