"""The commands of the quick start's lesson make the shipped weights. The whole lesson takes a quarter of an hour, so
its two ends are held: its first updates from random weights follow the recorded losses, and the shipped weights go on
where the recorded curve stops. What lies between is recorded, not repeated."""

import csv
import json
from itertools import islice
from pathlib import Path
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.make_problems import write_jsonl
from examples.quickstart.search_verify import lesson_rows
from megarl import config
from megarl.data.demonstrations import read_demonstrations
from megarl.runtime.spawn import spawn
from megarl.sft import sft

FOLDER = Path("examples/quickstart")
ROWS = 96_000  # as the command in sft.yaml says
FIRST = 12  # updates


def recorded() -> dict[int, float]:
    """Loss by update, from the run that made the shipped weights."""
    with (FOLDER / "lesson.csv").open() as f:
        return {int(row["step"]): float(row["nll"]) for row in csv.DictReader(f)}


@pytest.mark.parallel
@pytest.mark.slow
def test_the_lesson_begins_as_recorded(tmp_path: Path) -> None:
    """Constant decay changes nothing inside the warm-up, and lets the run end after its first updates."""
    lesson = tmp_path / "lesson.jsonl"
    lesson_settings = config.load(FOLDER / "sft.yaml", [])
    write_jsonl(lesson, islice(lesson_rows(ROWS, seed=0), FIRST * lesson_settings.batch.prompts_per_step))
    assert lesson_settings.steps * lesson_settings.batch.prompts_per_step == ROWS
    assert lesson_settings.optimizer.warmup_steps > FIRST
    given = config.load(
        FOLDER / "sft.yaml",
        [f"run={tmp_path / 'run'}", f"data.train=[{lesson}]", f"steps={FIRST}", "optimizer.warmup_steps=50",
         "optimizer.decay=constant"],
    )  # fmt: skip
    spawn(sft, 2, (given,), timeout=240.0)
    losses = [json.loads(line)["nll"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = recorded()
    assert losses == pytest.approx([curve[step] for step in range(1, FIRST + 1)], abs=2e-3)


@pytest.mark.slow
def test_the_shipped_weights_end_the_recorded_lesson(tmp_path: Path) -> None:
    """Transformers' loss of the shipped model on 300 responses drawn like the lesson's last ones."""
    curve = recorded()
    last = max(curve)
    end = mean(loss for step, loss in curve.items() if step > last - 200)
    file = tmp_path / "fresh.jsonl"
    write_jsonl(file, islice(lesson_rows(600, seed=1), 300, None))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "reasoner")
    settings = config.load(FOLDER / "sft.yaml", [])
    demonstrations, _ = read_demonstrations([file], tokenizer, settings.data, 2049)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "reasoner").eval()
    total, tokens = 0.0, 0
    for demonstration in demonstrations:
        ids = torch.as_tensor(demonstration.token_ids).long()[None]
        labels = ids.clone()
        labels[:, : demonstration.response_start] = -100
        count = ids.shape[1] - demonstration.response_start
        with torch.no_grad():
            total += model(ids, labels=labels).loss.item() * count
        tokens += count
    assert total / tokens == pytest.approx(end, abs=0.015)
