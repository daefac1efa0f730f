"""When each rank was in which phase: RUN/phases/rank_00000.jsonl has one line for each begin and each end.

A killed run leaves a begin without an end, which shows where it was. A resumed run appends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megarl.errors import RunError
from megarl.run.atomic import Appender
from megarl.run.records import LARGEST, damaged, numbered_lines

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
        self._file: Appender | None = None

    @contextmanager
    def span(self, phase: str, step: int) -> Iterator[None]:
        """Log the body as a phase. RunError if the disk fails, unless the body fails too."""
        self._write("B", phase, step)
        try:
            yield
        except BaseException:
            with suppress(RunError):
                self._write("E", phase, step)
            raise
        self._write("E", phase, step)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, kind: str, phase: str, step: int) -> None:
        if self._file is None:
            self._file = Appender(self._path)
        self._file.append(json.dumps([kind, phase, step, round(self._epoch + time.monotonic(), 6)]))


def read_phases(run: Path) -> list[Span]:
    """Every rank's spans, in the order of their begin. Empty for a run that logged none.

    A begin or an end that a crash cut off is left out. Raises UserError that names a line that is damaged otherwise.
    """
    spans: list[Span] = []
    for file in sorted((run / FOLDER).glob("rank_*.jsonl")):
        if not re.fullmatch(r"rank_\d{1,9}", file.stem, re.ASCII):
            continue
        rank = int(file.stem.removeprefix("rank_"))
        open_spans: dict[tuple[str, int], float] = {}  # (phase, step) → when it began
        for number, raw in numbered_lines(file):
            with damaged(file, number):
                if (event := _event(raw)) is None:
                    continue
            kind, phase, step, at = event
            begin = open_spans.pop((phase, step), None)
            if kind == "E":
                if begin is not None:
                    spans.append(Span(rank, phase, step, begin, at))
                continue
            if begin is not None:  # killed in it, then resumed
                spans.append(Span(rank, phase, step, begin, None))
            open_spans[phase, step] = at
        spans += [Span(rank, phase, step, begin, None) for (phase, step), begin in open_spans.items()]
    return sorted(spans, key=lambda span: (span.begin, span.rank))


def _event(raw: bytes) -> tuple[str, str, int, float] | None:
    """Kind ("B" or "E"), phase, step and time of one line; None if a crash cut it off. ValueError for anything else."""
    text = raw.decode("utf-8").strip()
    try:
        found = json.loads(text)
    except ValueError:
        if text.endswith("]"):
            raise
        return None
    if not (isinstance(found, list) and len(found) == 4 and found[0] in ("B", "E") and isinstance(found[1], str)):
        raise ValueError(f"{text[:60]} is no begin or end of a phase")
    kind, phase, step, at = found
    if not (type(step) is int and type(at) in (int, float) and abs(step) < LARGEST and 0 <= at < 1e12):
        raise ValueError(f"{text[:60]} has no step and time")
    return kind, phase, step, float(at)
