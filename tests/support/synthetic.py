"""Small synthetic runs on the quick start's model, hostile text included."""

from __future__ import annotations

import json
from pathlib import Path

from megarl.bench.common import synthetic
from megarl.run.directory import rollouts_file

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "reasoner"
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><svg onload=alert(1)> & <!--"


def write(folder: Path, steps: int, groups: int, per_group: int, hostile: bool = False) -> Path:
    """A finished run of `steps * groups * per_group` rollouts."""
    text = {"question": HOSTILE, "answer": HOSTILE} if hostile else {}
    return synthetic.write(folder, MODEL, steps, groups, per_group, **text)


def rows(folder: Path, step: int) -> list[dict]:
    """The records of a step, as they are on disk."""
    return [json.loads(line) for line in rollouts_file(folder, step).read_text().splitlines()]
