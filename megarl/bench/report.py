"""`megarl bench report`: the size of a report of 10,000 rollouts, and the time to write it and open it in Chromium.

The runs are synthetic and written by the trainer's code: 50 prompts per step, 8 completions per prompt, log-normal
response lengths around `tokens`, and a log-prob, origin and weight version for every token. `open_seconds`: until the
curves, the tables and the newest step's group are shown, as the median of `repeats` fresh loads from disk in a running
headless Chromium. `step_seconds`: from the choice of another step until its group is shown. `shown` is below `rollouts`
if the page leaves steps out to limit its size, and says so.
"""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from megarl import report
from megarl.bench.common.browser import DESKTOP, PHONE, chromium, opened, wait
from megarl.bench.common.result import publish
from megarl.bench.common.synthetic import write
from megarl.errors import UserError
from megarl.run.directory import rollouts_file

GROUPS, PER_GROUP = 50, 8  # per step, completions per group
# Choose an earlier step in the viewer's list.
PICK = """
const steps = document.querySelector("#v-step");
steps.value = arguments[0];
steps.dispatchEvent(new Event("change"));
"""
SHOWN = """
const prompt = document.querySelector(".prompt pre");
return prompt && prompt.textContent.startsWith(arguments[0]) && document.querySelectorAll(".completion .t").length > 0;
"""
NOTICES = "return [...document.querySelectorAll('.notice')].map((n) => n.textContent).join(' ')"


def main(
    json: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
    rollouts: Annotated[int, typer.Option(min=800, help="Rollouts per run: at least two steps' 800.")] = 10_000,
    tokens: Annotated[str, typer.Option(help="Typical response lengths, one run each.")] = "100,200,1000",
    repeats: Annotated[int, typer.Option(min=1, help="How often to open each page.")] = 5,
    model: Annotated[Path, typer.Option(help="Whose vocabulary to use.")] = Path("examples/quickstart/reasoner"),
) -> None:
    """For each length, write a synthetic run and its report, and open the report in Chromium at both widths."""
    if not (model / "tokenizer.json").is_file():
        raise UserError(f"model: {model} has no tokenizer.json; run this benchmark from the repository's root")
    steps = rollouts // (GROUPS * PER_GROUP)
    results = []
    with TemporaryDirectory() as scratch, chromium(Path(scratch) / "profile") as browser:
        for length in map(int, tokens.split(",")):
            run = write(Path(scratch) / f"run_{length}", model, steps, GROUPS, PER_GROUP, length)
            results.append({"tokens": length, **measure(browser, run, repeats, steps * GROUPS * PER_GROUP)})
    publish("report", results, json, steps=steps, repeats=repeats)


def measure(browser: Any, run: Path, repeats: int, rollouts: int) -> dict[str, Any]:
    """Write and open the page of a run with `rollouts` rollouts. MB are 10^6 bytes."""
    began = time.monotonic()
    page = report.write([run])
    written = time.monotonic() - began
    seconds = {width: [opened(browser, page, width) for _ in range(repeats)] for width in (DESKTOP, PHONE)}
    first = int(browser.execute_script("return document.querySelector('#v-step').options[0].value"))
    began = time.monotonic()
    browser.execute_script(PICK, first)
    wait(lambda: browser.execute_script(SHOWN, f"problem {first}."))
    step_seconds = time.monotonic() - began
    left_out = re.search(r"rollouts shown: ([\d,]+) completions", browser.execute_script(NOTICES))
    return {
        "rollouts": rollouts,
        "shown": int(left_out[1].replace(",", "")) if left_out else rollouts,
        "rollouts_mb": sum(file.stat().st_size for file in rollouts_file(run, 1).parent.iterdir()) / 1e6,
        "page_mb": page.stat().st_size / 1e6,
        "write_seconds": written,
        "open_seconds": statistics.median(seconds[DESKTOP]),
        "open_seconds_worst": max(map(max, seconds.values())),
        "open_seconds_phone_width": statistics.median(seconds[PHONE]),
        "step_seconds": step_seconds,
    }


if __name__ == "__main__":
    typer.run(main)
