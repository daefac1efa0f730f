"""The live view of a run: its step, its time left, its metrics, and the share of each phase.

Used by the run itself (progress.py) and by `megarl tail`, which watches from outside.
"""

from __future__ import annotations

import time
from collections import deque
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES = ("rollout", "reward", "logprobs", "train", "sync")
_COLOURS = ("blue", "cyan", "magenta", "yellow", "green", "white")
_SHOWN = (  # (metric, label, format)
    ("nll", "nll", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "acc", "{:.3f}"),
    ("score", "score", "{:.3f}"),
    ("response_tokens", "tokens", "{:.0f}"),
    ("steps_per_response", "k", "{:.1f}"),
    ("early_exit_fraction", "exits", "{:.0%}"),
    ("prompts_pruned", "pruned", "{:.0f}"),
    ("completions_dropped", "dropped", "{:.0f}"),
    ("grad_norm", "|g|", "{:.2f}"),
    ("mismatch_mean", "mismatch", "{:.0e}"),
    ("eval/loss", "held-out loss", "{:.3f}"),
    ("eval/accuracy", "held-out acc", "{:.3f}"),
    ("eval/score", "held-out score", "{:.3f}"),
    ("eval/response_tokens", "held-out tokens", "{:.0f}"),
)


def headline(metrics: dict[str, Any]) -> str:
    """The most telling metrics of a step, as one line. A score that is the accuracy is left out."""
    same = {key for key in ("score", "eval/score") if metrics.get(key) == metrics.get(key.replace("score", "accuracy"))}
    shown = [each for each in _SHOWN if isinstance(metrics.get(each[0]), int | float) and each[0] not in same]
    return " ".join(f"{label} {form.format(metrics[key])}" for key, label, form in shown)


def line(step: int, total: int, metrics: dict[str, Any]) -> str:
    """A step as one line of plain text."""
    phases = " ".join(f"{p} {metrics[f'seconds_{p}']:.1f}s" for p in PHASES if metrics.get(f"seconds_{p}"))
    return f"step {step}/{total}  {headline(metrics)}{'  | ' if phases else ''}{phases}"


class LiveView:
    """A rich renderable. Call `step` and `phase` to update it."""

    def __init__(self, total: int, hint: str = "") -> None:
        self.total, self.hint = total, hint
        self.done, self.current = 0, ""
        self.metrics: dict[str, Any] = {}
        self._began = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=10)

    def since(self, began: float) -> None:
        """Count the time from `began`, in seconds since the epoch, instead of from now."""
        self._began = time.monotonic() - (time.time() - began)

    def phase(self, name: str) -> None:
        self.current = name

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        self.done, self.metrics = step, metrics
        if step and metrics.get("seconds_total"):
            self._seconds.append(metrics["seconds_total"])

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the median of the last ten steps. None before the first."""
        return median(self._seconds) * (self.total - self.done) if self._seconds else None

    def __rich__(self) -> Group:
        head = Table.grid(padding=(0, 2, 0, 0))
        left = self.seconds_left
        head.add_row(
            Text(f"step {self.done}/{self.total}", style="bold"),
            ProgressBar(total=self.total, completed=self.done, width=30),
            Text(clock(time.monotonic() - self._began)),
            Text("" if left is None else f"{clock(left)} left" if self.done < self.total else "done", style="bold"),
            Text(self.current, style="italic dim"),
        )
        rows: list[RenderableType] = [head]
        if shown := headline(self.metrics):
            rows.append(Text(shown))
        if bar := phase_bar(self.metrics):
            rows.append(bar)
        if self.hint:
            rows.append(Text(self.hint, style="dim"))
        return Group(*rows)


def phase_bar(metrics: dict[str, Any], width: int = 40) -> Text | None:
    """The share of each phase in a step's time, as a bar with a legend. None without timings."""
    seconds = {p: metrics.get(f"seconds_{p}") or 0.0 for p in PHASES}
    seconds["other"] = max(0.0, (metrics.get("seconds_total") or 0.0) - sum(seconds.values()))
    whole = sum(seconds.values())
    if not whole:
        return None
    bar, legend = Text(), Text()
    for (phase, spent), colour in zip(seconds.items(), _COLOURS, strict=True):
        if share := spent / whole:
            bar.append("█" * round(width * share), style=colour)
        if share >= 0.01:
            legend.append(f"  {phase} ", style=colour).append(f"{share:.0%}", style="dim")
    return bar + legend


def clock(seconds: float) -> str:
    """As H:MM:SS or M:SS."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
