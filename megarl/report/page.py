"""Puts the page together. Scripts and styles are inlined and named by their hash in a content security policy, so that
the page can load nothing and run nothing else, whatever a model wrote into its responses."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megarl.errors import one_line
from megarl.report import rollouts, run
from megarl.report.run import Run
from megarl.run.atomic import write_text
from megarl.run.records import damaged

FILE = "report.html"
HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "chart.js", "bars.js", "curves.js", "tokens.js", "viewer.js", "tables.js", "main.js")


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one run or the comparison of several; default: report.html in the first. Atomic.

    Raises UserError that names a damaged file, and RunError if the disk fails.
    """
    runs = [run.read(folder) for folder in folders]
    out = out or folders[0] / FILE
    with damaged(folders[0] if len(folders) == 1 else out):  # what no reader of a single file looks for
        page = render(runs)
    write_text(out, page.encode(errors="replace").decode())  # half a surrogate pair cannot be written
    return out


def at_end(folder: Path) -> Path | None:
    """`write` for the end of a run, which no fault of the report may fail: it is told on standard error instead."""
    try:
        return write([folder])
    except Exception as e:
        print(f"megarl: the report of {folder} was not written: {one_line(str(e))}. "
              f"To try again: megarl report {folder}", file=sys.stderr)  # fmt: skip
        return None


def render(runs: Sequence[Run]) -> str:
    """The whole page."""
    names = _names(runs)
    packed = [rollouts.pack(each, rollouts.BUDGET // len(runs)) for each in runs]
    chunks = {"main": rollouts.compress([_data(r, n, p) for r, n, p in zip(runs, names, packed, strict=True)])}
    for i, each in enumerate(packed):
        chunks[f"tokens-{i}"] = rollouts.compress(each.tokens)
        chunks |= {f"step-{i}-{step}": text for step, text in each.chunks.items()}
    style = (HERE / "style.css").read_text()
    script = "(() => {\n'use strict';\n" + "".join((HERE / name).read_text() for name in SCRIPTS) + "})();\n"
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["code"] = _code
    return templates.get_template("page.html").render(
        title=" · ".join(names),
        runs=[_static(r, n, p) for r, n, p in zip(runs, names, packed, strict=True)],
        chunks=chunks,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _data(each: Run, name: str, packed: rollouts.Packed) -> dict[str, Any]:
    """What the scripts draw."""
    early = each.settings.get("rollout", {}).get("early_exit", {})
    return {
        "name": name,
        "metrics": run.columns(each.metrics),
        "rollouts": packed.index,
        "calibration": packed.calibration,
        "ledger": run.ledger_view(each.ledger),
        "markers": early.get("markers") or [],
    }


def _static(each: Run, name: str, packed: rollouts.Packed) -> dict[str, Any]:
    """What the template shows."""
    shown = sum(row["completions"] for row in packed.index)
    seen = sum(row["all"] for row in packed.index)
    notices = [*each.notices, *([packed.notice] if packed.notice else [])]
    evaluations = sum(row["held_out"] for row in packed.index)
    steps = len(packed.index) - evaluations
    if shown < seen or steps < packed.steps_on_disk or evaluations < packed.evaluations_on_disk:
        notices.append(
            f"rollouts shown: {shown:,} completions of {steps} steps, out of {packed.steps_on_disk} steps on disk, and "
            f"of {evaluations} evaluations, out of {packed.evaluations_on_disk} (the page has at most "
            f"{rollouts.BUDGET // 2**20} MB of them); all are in {each.folder}/rollouts and evaluations"
        )
    return {
        "name": name,
        "method": _method(each),
        "progress": f"{each.last_step} of {each.steps} steps",
        "finished": each.finished,
        "tiles": [tile | {"text": _figure(tile["value"], tile["unit"]),
                          "old": None if tile["before"] is None else _figure(tile["before"], tile["unit"])}
                  for tile in run.tiles(each)],
        "settings": run.settings_rows(each.settings),
        "environment": each.environment,
        "notices": notices,
    }  # fmt: skip


def _method(each: Run) -> str:
    """What was trained and how, in a few words."""
    settings = each.settings
    if not settings:
        return ""
    imitated = each.environment.get("job") == "sft"
    parts = [
        Path(settings["model"]["path"]).name,
        "SFT" if imitated else settings.get("algorithm", {}).get("preset", "").upper(),
    ]
    if not imitated and settings.get("rollout", {}).get("early_exit", {}).get("enabled"):
        parts.append("Step-GRPO")
    pruning = settings.get("pruning", {})
    if pruning.get("prompts") or pruning.get("completions"):
        parts.append("DPPO")
    layout = settings.get("parallel", {})
    parts.append(" ".join(f"{n.upper()} {layout[n]}" for n in ("tp", "pp", "cp", "ep") if layout.get(n, 1) > 1))
    return " · ".join(part for part in parts if part)


def _figure(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "tokens":
        return f"{value:,.1f}"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "s":
        hours, rest = divmod(round(value), 3600)
        minutes, seconds = divmod(rest, 60)
        return (
            f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
        )
    return f"{value:.3f}"


def _code(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names, told apart by their parents where equal."""
    plain = [each.name for each in runs]
    if len(set(plain)) == len(plain):
        return plain
    return [str(each.folder) for each in runs]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
