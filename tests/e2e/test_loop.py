"""The loop, run for real on gloo ranks with the real local engine and graders: repeatable, layout-free, resumable."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conv import commands
from megarl import replay as recorded
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

LAYOUTS = {"tp1": ([], 1), "tp2": (["parallel.tp=2"], 2), "pp3": (["parallel.pp=3"], 3), "dp2": ([], 2)}


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Four steps at tp2 with a checkpoint after the second, Step-GRPO and DPPO on."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    metrics = runs.run(reference_settings(folder))
    assert all(line["tokens_trained"] for line in metrics)  # a step that trains nothing would prove nothing
    return folder, metrics


def reference_settings(folder: Path, *more: str) -> Any:
    return runs.settings(
        folder, "parallel.tp=2", "steps=4", "checkpoint.every=2", "pruning={prompts: 0.5, completions: 0.5}",
        "rollout.max_response_tokens=96",
        "batch={prompts_per_step: 4, completions_per_prompt: 8, tokens_per_row: 512}", *more,
    )  # fmt: skip


def train_under_a_jumping_clock(settings: Any) -> None:
    """It is set a day ahead, or back, at every look."""
    now, jumps = time.time, itertools.cycle((86400.0, -86400.0))
    time.time = lambda: now() + next(jumps)
    train(settings)


def test_same_seed_and_layout_repeat_bit_by_bit(reference: tuple[Path, list], tmp_path: Path) -> None:
    """Two runs give equal metrics, timings aside, and equal rollouts, whatever the second one's wall clock does.

    Says nothing about other machines.
    """
    folder, metrics = reference
    again = reference_settings(tmp_path / "run")
    spawn(train_under_a_jumping_clock, 2, (again,), runs.DEADLINE)
    assert runs.untimed(read_metrics(again.run)) == metrics
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    for step in (1, 4):
        assert rollouts(tmp_path / "run", step) == rollouts(folder, step)


def test_resumed_run_goes_on_as_if_never_stopped(reference: tuple[Path, list], tmp_path: Path) -> None:
    """The newest checkpoint has a wrong bit: from the one before, of step 2, steps 3 and 4 are bit-equal: weights,
    optimizer, data order, pruning history and expected length all came back."""
    folder, metrics = reference
    shutil.copytree(folder, tmp_path / "run")
    damaged = max((tmp_path / "run" / "checkpoints" / "step_000004").rglob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + bytes([damaged.read_bytes()[-1] ^ 1]))
    assert runs.run(reference_settings(tmp_path / "run"), resume=True) == metrics
    assert rollouts(tmp_path / "run", 4) == rollouts(folder, 4)


def test_resumed_under_another_layout_goes_on(reference: tuple[Path, list], tmp_path: Path) -> None:
    """The run of two tensor-parallel ranks goes on as one rank: the same tokens, losses equal to rounding."""
    folder, metrics = reference
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    resumed = runs.run(reference_settings(tmp_path / "run", "parallel.tp=1"), resume=True)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for step in (3, 4):
        assert resumed[step - 1]["loss"] == pytest.approx(metrics[step - 1]["loss"], abs=1e-5)
        ours, theirs = rollouts(tmp_path / "run", step), rollouts(folder, step)
        assert [r["response_ids"] for r in ours] == [r["response_ids"] for r in theirs]


def test_a_recorded_step_is_replayed_bit_by_bit(reference: tuple[Path, list]) -> None:
    """Steps 3 and 4 from the checkpoint of step 2, without data, graders or engine: every figure of the learner.

    The figures of the two steps differ, so they can tell.
    """
    folder, metrics = reference
    wanted = reference_settings(folder)
    assert (recorded.find(folder, 4), recorded.find(folder, 2)) == (2, 0)
    rows = spawn(recorded.replay, 2, (wanted, 4, 2), runs.DEADLINE)[0]
    assert {row["metric"]: row["recorded"] for row in rows}.items() <= metrics[3].items()
    assert {"loss", "grad_norm", "entropy", "mismatch_mean", "tokens_trained"} <= {row["metric"] for row in rows}
    assert [row["metric"] for row in rows if not row["equal"]] == []
    assert any(row["replayed"] != metrics[2].get(row["metric"]) for row in rows)


def test_layouts_draw_the_same_and_lose_the_same(tmp_path: Path) -> None:
    """tp1, tp2, pp3 and dp2: the same tokens are drawn, and losses and gradient norms agree to rounding."""
    seen = {}
    for name, (overrides, nproc) in LAYOUTS.items():
        folder = tmp_path / name
        metrics = runs.run(runs.settings(folder, "parallel={}", *overrides), nproc)
        seen[name] = metrics, [r["response_ids"] for step in (1, 2) for r in rollouts(folder, step)]
    expected, drawn = seen.pop("tp1")
    for name, (metrics, tokens) in seen.items():
        assert tokens == drawn, name
        for line, wanted in zip(metrics, expected, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], abs=1e-5), name
            assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), name


def test_a_checkpoint_becomes_a_model_that_transformers_loads(reference: tuple[Path, list], tmp_path: Path) -> None:
    """What tp2 saved after step 2, converted, is the policy that step 3 sampled from: transformers' log-probs of its
    rollouts are the noted ones, and its tokenizer reads them. Those of the model that the run began with are not."""
    commands.megatron_to_hf(reference[0] / "checkpoints" / "step_000002", tmp_path / "hf")
    records = rollouts(reference[0], 3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for record in records:
        assert tokenizer.decode(record["response_ids"], skip_special_tokens=True) == record["response"]
    assert distance_from_noted(tmp_path / "hf", records) <= 2e-5
    assert distance_from_noted(runs.QUICKSTART / "reasoner", records) > 1e-3


def distance_from_noted(model: Path, records: list[dict[str, Any]]) -> float:
    """The largest |log-prob by transformers - log-prob in the record| of the sampled tokens."""
    policy, largest = AutoModelForCausalLM.from_pretrained(model), 0.0
    for record in records:
        prompt, response = record["prompt_ids"], record["response_ids"]
        with torch.no_grad():
            table = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for row, token, noted in zip(table, response, record["logprobs"], strict=True):
            largest = max(largest, abs(row[token].item() - noted)) if noted is not None else largest
    return largest
