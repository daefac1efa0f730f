"""`megarl trace RUN`: the phases of every rank as a Chrome trace, for ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megarl.errors import UserError
from megarl.run.atomic import write_text
from megarl.run.directory import read_metrics
from megarl.run.timeline import Span, read_phases

COUNTERS = ("reward", "response_tokens", "tokens_generated")


def write(run: Path, out: Path | None = None) -> Path:
    """Write the trace to `out`, by default RUN/trace.json. Raises UserError for a run without phases."""
    spans = read_phases(run)
    if not spans:
        raise UserError(f"run: {run} has no phases to trace (phases/rank_*.jsonl)")
    out = out or run / "trace.json"
    write_text(out, json.dumps({"traceEvents": events(spans, read_metrics(run)), "displayTimeUnit": "ms"}))
    return out


def events(spans: list[Span], metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One process per rank, one slice per phase, and metrics as counters at the end of their step."""
    start = spans[0].begin
    found: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({span.rank for span in spans})
    ]
    ends: dict[int, float] = {}
    for span in spans:
        event = {"name": span.phase, "cat": "phase", "pid": span.rank, "tid": 0, "ts": _micro(span.begin - start)}
        event["args"] = {"step": span.step}
        if span.end is None:
            found.append(event | {"ph": "B"})
            continue
        found.append(event | {"ph": "X", "dur": _micro(span.end - span.begin)})
        if span.rank == 0:
            ends[span.step] = max(span.end, ends.get(span.step, 0.0))
    for line in metrics:
        for key in COUNTERS:
            if line["step"] in ends and isinstance(line.get(key), int | float):
                at = _micro(ends[line["step"]] - start)
                found.append({"name": key, "ph": "C", "pid": 0, "ts": at, "args": {key: line[key]}})
    return found


def _micro(seconds: float) -> int:
    return round(1e6 * seconds)
