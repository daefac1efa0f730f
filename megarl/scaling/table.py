"""The results of a study as tables: one row a cell, and one row a point with its standard error."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megarl.scaling.study import EFFICIENCY, GPUS, Study

Rows = list[dict[str, Any]]


def summary(study: Study, rows: Rows) -> Rows:
    """One row a point: of each figure the mean over seeds, and `NAME_error`, its standard error (empty for one seed).

    A figure that one seed lacks is empty: the mean of those that got there would flatter the point.
    Where `gpus` is the horizontal axis, `efficiency` is tokens a second and GPU against the line's smallest number.
    """
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key in varied(study)]
    points: dict[str, Rows] = {}
    for row in rows:
        points.setdefault(repr([row.get(key) for key in keys]), []).append(row)
    found = []
    for same in points.values():
        figures = [key for key in same[0] if key not in (*keys, "seed")]
        out = {key: same[0].get(key) for key in keys} | {"seeds": len(same)}
        for key in figures:
            values = [row[key] for row in same]
            out[key] = None if None in values else float(np.mean(values))
            if out[key] is not None and len(values) > 1:
                out[f"{key}_error"] = float(np.std(values, ddof=1) / math.sqrt(len(values)))
        found.append(out)
    if study.x == GPUS:
        for line in lines(study, found).values():
            first = min(line, key=lambda row: row[GPUS])
            for row in line:
                each = row["tokens_per_second"] / row[GPUS]
                row[EFFICIENCY] = each / (first["tokens_per_second"] / first[GPUS])
    return found


def lines(study: Study, rows: Rows) -> dict[str, Rows]:
    """Rows by the value of the setting that makes the lines, in the order of x."""
    found: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row[study.x]):
        found.setdefault("" if study.lines is None else f"{study.lines} {row[study.lines]}", []).append(row)
    return found


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A tidy CSV file: one header, empty where there is no value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    partial.replace(file)


def varied(study: Study) -> set[str]:
    """The keys that tell a point."""
    return {*study.vary, *(key for point in study.points for key in point), study.x}
