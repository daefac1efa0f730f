"""Small synthetic runs on the quick start's model, hostile text included."""

from __future__ import annotations

import json
from pathlib import Path

from megarl.bench.common import synthetic
from megarl.run.records import EVALUATIONS, rollouts_file

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "reasoner"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><svg onload=alert(1)> & <!--"


def write(folder: Path, steps: int, groups: int, per_group: int, hostile: bool = False) -> Path:
    """A finished run of `steps * groups * per_group` rollouts."""
    text = {"question": HOSTILE, "answer": HOSTILE} if hostile else {}
    return synthetic.write(folder, MODEL, steps, groups, per_group, **text)


def write_held_out(folder: Path, step: int) -> list[dict]:
    """Held-out responses after a step: its rollouts under a system prompt, with a score of 0.75 and a message.

    Returns the records.
    """
    records = rows(folder, step)
    for record in records:
        question = record["prompt"].partition(":")[0].replace("problem", "question")
        record["prompt"] = f"system\nYou are wise.\nuser\n{question}\nassistant\n"
        record |= {"score": 0.75, "message": f"why {record['index']}", "advantage": None, "weight": None}
    file = rollouts_file(folder, step, EVALUATIONS)
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def rows(folder: Path, step: int) -> list[dict]:
    """The records of a step, as they are on disk."""
    return [json.loads(line) for line in rollouts_file(folder, step).read_text().splitlines()]
