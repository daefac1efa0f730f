r"""The default grader on triples of response, reference and verdict: how many it judges as a person would.

Each row also has the verdict of math-verify alone (`plain`) and the milliseconds that the default grader took.
"""

from __future__ import annotations

import json as json_text
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from megarl.bench.common.result import publish
from megarl.errors import UserError
from megarl.rewards.grade import VERDICTS
from megarl.rewards.workers import Graders

SHIPPED = Path(__file__).with_suffix(".jsonl")
OURS, PLAIN = "megarl.rewards.math:grade", "megarl.bench.common.plain_math_verify:grade"
WHOLE = ("boxed", "fbox", "think>")  # a response with none of these is what stands in its box


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    cases: Annotated[
        Path, typer.Option(help="JSONL of {response, reference, verdict}, and kind if you like.")
    ] = SHIPPED,
    timeout: Annotated[float, typer.Option(help="Seconds for each verdict.")] = 10.0,
    workers: Annotated[int, typer.Option(help="Processes that run math-verify alone.")] = 2,
) -> None:
    """Grade every triple, and count wrong answers that were rewarded and right ones that were refused."""
    triples = read_cases(cases)
    rows = []
    with closing(Graders(OURS, 1, timeout)) as ours, closing(Graders(PLAIN, workers, timeout)) as plain:
        answers = [plain.submit(whole(c["response"]), c["reference"]) for c in triples]
        for case, answer in zip(triples, answers, strict=True):
            begun = time.perf_counter()
            grade = ours.submit(whole(case["response"]), case["reference"]).result()
            ms = 1e3 * (time.perf_counter() - begun)
            row: dict[str, Any] = {name: case[name] for name in ("kind", "response", "reference")}
            row |= {"expected": case["verdict"], "verdict": grade.verdict, "plain": answer.result().verdict}
            rows.append(row | {"ms": round(ms, 2)})
    for row in rows:
        if row["verdict"] != row["expected"]:
            typer.echo(f"{row['expected']}, not {row['verdict']}: {row['response']!r} for {row['reference']!r}")
    publish("grading", rows, json, shown=summary(rows), cases=len(rows), summary=summary(rows))


def whole(response: str) -> str:
    """A response as the grader gets it: the content of a box is put into one."""
    return response if any(mark in response for mark in WHOLE) else f"\\boxed{{{response}}}"


def read_cases(file: Path) -> list[dict[str, str]]:
    """Raises UserError for a file or a line that is not of the form."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--cases: {file}: {e.strerror if isinstance(e, OSError) else 'is not UTF-8'}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            case = json_text.loads(line)
        except ValueError as e:
            raise UserError(f"{file}:{number}: malformed JSONL line: {e}") from None
        names = ("response", "reference", "verdict")
        if not isinstance(case, dict) or not all(isinstance(case.get(name), str) for name in names):
            raise UserError(f"{file}:{number}: needs the texts {', '.join(names)}")
        if case["verdict"] not in VERDICTS:
            raise UserError(f"{file}:{number}: verdict '{case['verdict']}' is none of {', '.join(VERDICTS)}")
        found.append({"kind": str(case.get("kind", "")), **{name: case[name] for name in names}})
    if not found:
        raise UserError(f"--cases: {file} has no cases")
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind, and one for all."""
    kinds = {kind: [r for r in rows if r["kind"] == kind] for kind in dict.fromkeys(r["kind"] for r in rows)}
    return [_counts(kind or "(no kind)", part) for kind, part in (kinds | {"all": rows}).items()]


def _counts(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    times = sorted(r["ms"] for r in rows)
    found: dict[str, Any] = {"kind": kind, "cases": len(rows)}
    for column, name in (("verdict", ""), ("plain", "plain ")):
        found[f"{name}wrong rewarded"] = sum(r["expected"] != "right" and r[column] == "right" for r in rows)
        found[f"{name}right refused"] = sum(r["expected"] == "right" and r[column] != "right" for r in rows)
    found["other"] = sum(r["expected"] != r["verdict"] and "right" not in (r["expected"], r["verdict"]) for r in rows)
    return found | {"median ms": times[len(times) // 2], "max ms": times[-1]}
