"""The quick start's shipped parts fit together. Proves that the settings hold with the shipped tokenizer, that the
shipped reasoner can do the task. What reinforcement learning makes of it is tests/e2e/test_learns.py's matter."""

import asyncio
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from examples.quickstart.search_verify import grade
from megarl import config
from megarl.data.prompts import read_prompts
from megarl.launch import preflight
from megarl.rollout import groups
from megarl.rollout.early_exit import plan
from megarl.rollout.local.engine import LocalEngine
from megarl.types import Group

SETTINGS = Path("examples/quickstart/train.yaml")
REASONER = Path("examples/quickstart/reasoner")
ACCURACY = 0.85  # of the taught reasoner at temperature 0.6, in the README


@pytest.mark.parametrize("name", ["train", "sft"])
def test_the_settings_pass_every_check_before_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "lesson.jsonl").touch()
    lesson = [f"data.train=[{tmp_path / 'lesson.jsonl'}]"] if name == "sft" else []
    settings = config.load(SETTINGS.with_name(f"{name}.yaml"), [f"run={tmp_path}", *lesson])
    preflight(settings, settings.parallel.model_ranks, resume=False)
    plan.check(settings.rollout, AutoTokenizer.from_pretrained(REASONER))


@pytest.mark.slow
def test_the_shipped_reasoner_is_small_and_solves_problems_in_the_taught_way() -> None:
    """Responses of the local engine to 100 validation problems at temperature 0.6, seed fixed: accuracy not more than
    four standard errors below the README's, and steps divided by "Wait"."""
    assert (REASONER / "model.safetensors").stat().st_size < 4 * 2**20
    settings = config.load(SETTINGS, [f"data.eval=[{SETTINGS.parent / 'problems' / 'validation.jsonl'}]"])
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    table, _ = read_prompts(settings.data.eval, tokenizer, settings.data)
    engine = LocalEngine(REASONER, tokenizer, batch_slots=100, max_length=settings.longest_sequence)

    async def responses() -> list[Group]:
        await engine.update_weights(0, load_file(REASONER / "model.safetensors").items())
        found = await groups.evaluation(engine, [table[i] for i in range(100)], settings, tokenizer)
        await engine.close()
        return found

    answered = asyncio.run(responses())
    right = sum(grade(c.text, group.prompt.answer) for group in answered for c in group.completions)
    assert right >= 100 * (ACCURACY - 4 * 0.05)
    assert sum("Wait" in c.text and "</think>" in c.text for group in answered for c in group.completions) >= 80
