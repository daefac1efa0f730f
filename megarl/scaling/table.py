"""The results of a study as tables: one row per cell, and one row per point with its standard error."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megarl.run.atomic import write_text
from megarl.scaling.study import EFFICIENCY, GPUS, NODES, Study

Rows = list[dict[str, Any]]


def summary(study: Study, rows: Rows) -> Rows:
    """One row per point: each metric's mean over seeds, and `NAME_error`, its standard error (absent for one seed).

    A metric that one seed lacks is empty, because the mean of the other seeds would flatter the point.
    Where x is `gpus` or `nodes`, `efficiency` is tokens per second and GPU or node, over that of the line's smallest x.
    """
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key in varied(study)]
    points: dict[str, Rows] = {}
    for row in rows:
        points.setdefault(repr([row.get(key) for key in keys]), []).append(row)
    found = []
    for same in points.values():
        metrics = [key for key in same[0] if key not in (*keys, "seed")]
        out = {key: same[0].get(key) for key in keys} | {"seeds": len(same)}
        for key in metrics:
            values = [row[key] for row in same]
            out[key] = None if None in values else float(np.mean(values))
            if out[key] is not None and len(values) > 1:
                out[f"{key}_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        found.append(out)
    if study.x in (GPUS, NODES):
        for first, *others in lines(study, found).values():
            for row in (first, *others):
                each = row["tokens_per_second"] / row[study.x]
                row[EFFICIENCY] = each / (first["tokens_per_second"] / first[study.x])
    return found


def lines(study: Study, rows: Rows) -> dict[str, Rows]:
    """Rows by the value of the `lines` setting, in the order of x."""
    found: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row[study.x]):
        found.setdefault("" if study.lines is None else f"{study.lines} {row[study.lines]}", []).append(row)
    return found


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A tidy CSV file: one header, empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(file, text.getvalue())


def varied(study: Study) -> set[str]:
    """The keys that identify a point."""
    return {*study.vary, *(key for point in study.points for key in point), study.x}
