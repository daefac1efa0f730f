"""What a person sees of a running job: a live bar on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SHOWN = (  # (metric, label, format)
    ("nll", "nll", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "acc", "{:.3f}"),
    ("response_tokens", "tokens", "{:.0f}"),
    ("steps_per_response", "k", "{:.1f}"),
    ("early_exit_fraction", "exits", "{:.0%}"),
    ("prompts_pruned", "pruned", "{:.0f}"),
    ("completions_dropped", "dropped", "{:.0f}"),
    ("grad_norm", "|g|", "{:.2f}"),
    ("mismatch_mean", "mismatch", "{:.0e}"),
    ("eval/accuracy", "held-out acc", "{:.3f}"),
    ("eval/response_tokens", "held-out tokens", "{:.0f}"),
)
_PHASES = ("rollout", "reward", "logprobs", "train", "sync")


class RunProgress:
    """Progress of one run; silent on every rank but the controller."""

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.quiet, self.total = quiet, total
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[figures]}"), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total, completed=done, figures="")
            self._bar.start()

    def phase(self, name: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=name)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        figures = " ".join(f"{label} {form.format(metrics[key])}" for key, label, form in _SHOWN if key in metrics)
        phases = " ".join(f"{p} {metrics[f'seconds_{p}']:.1f}s" for p in _PHASES if metrics.get(f"seconds_{p}"))
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif not self.quiet:
            self.console.print(f"step {step}/{self.total}  {figures}{'  | ' if phases else ''}{phases}", soft_wrap=True)

    def say(self, message: str) -> None:
        """A line of its own, above the bar."""
        if not self.quiet:
            self.console.print(message, soft_wrap=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class Stopwatch:
    """Seconds spent in each named phase since the last `lap`."""

    def __init__(self, progress: RunProgress) -> None:
        self._progress, self._spent, self._began = progress, {}, time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._progress.phase(phase)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[phase] = self._spent.get(phase, 0.0) + time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """`seconds_<phase>` of every phase and `seconds_total`; starts anew."""
        now = time.perf_counter()
        seconds = {f"seconds_{phase}": self._spent.get(phase, 0.0) for phase in _PHASES} | {
            f"seconds_{phase}": spent for phase, spent in self._spent.items()
        }
        seconds["seconds_total"] = now - self._began
        self._spent, self._began = {}, now
        return seconds
