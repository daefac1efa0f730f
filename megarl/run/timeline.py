"""When each rank was in which phase: RUN/phases/rank_00000.jsonl has one line for each begin and each end.

A killed run leaves a begin without an end, which shows where it was. A resumed run appends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megarl.run.atomic import clear_errors

FOLDER = "phases"


@dataclass(frozen=True, slots=True)
class Span:
    """One phase of one rank, in seconds since the epoch. `end` is None for a phase that never ended."""

    rank: int
    phase: str
    step: int
    begin: float
    end: float | None


class PhaseLog:
    """Writes one rank's phases. Reads the wall clock only once, so a later jump of the clock has no effect."""

    def __init__(self, run: Path, rank: int) -> None:
        self._epoch = time.time() - time.monotonic()
        self._path = run / FOLDER / f"rank_{rank:05d}.jsonl"
        self._file: IO[str] | None = None

    @contextmanager
    def span(self, phase: str, step: int) -> Iterator[None]:
        self._write("B", phase, step)
        try:
            yield
        finally:
            self._write("E", phase, step)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, kind: str, phase: str, step: int) -> None:
        with clear_errors(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a+", buffering=1)
                if self._file.tell() and not self._path.read_bytes().endswith(b"\n"):
                    self._file.write("\n")  # ends a line that a crash cut off
            self._file.write(json.dumps([kind, phase, step, round(self._epoch + time.monotonic(), 6)]) + "\n")


def read_phases(run: Path) -> list[Span]:
    """Every rank's spans, in the order of their begin. Empty for a run that logged none."""
    spans: list[Span] = []
    for file in sorted((run / FOLDER).glob("rank_*.jsonl")):
        rank = int(file.stem.removeprefix("rank_"))
        open_spans: dict[tuple[str, int], float] = {}  # (phase, step) → when it began
        for text in file.read_text().splitlines():
            try:
                kind, phase, step, at = json.loads(text)
            except ValueError:
                continue  # cut off by a crash, or still being written
            if kind == "B":
                if (phase, step) in open_spans:  # killed in it, then resumed
                    spans.append(Span(rank, phase, step, open_spans[phase, step], None))
                open_spans[phase, step] = at
            else:
                spans.append(Span(rank, phase, step, open_spans.pop((phase, step)), at))
        spans += [Span(rank, phase, step, begin, None) for (phase, step), begin in open_spans.items()]
    return sorted(spans, key=lambda span: (span.begin, span.rank))
