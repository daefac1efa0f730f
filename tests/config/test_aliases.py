"""Names of settings elsewhere are answered with the name here: in files and overrides, at any depth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megarl import config
from megarl.config import aliases, docs
from megarl.errors import UserError

KEYS = {s.key for g in docs.groups() for s in g.settings}
LEAST = {"run": "r", "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}


def refusal(folder: Path, tree: dict[str, object], *overrides: str) -> str:
    (folder / "c.yaml").write_text(yaml.safe_dump(LEAST | tree))
    with pytest.raises(UserError) as caught:
        config.load(folder / "c.yaml", list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("name", aliases.table())
def test_every_name_is_answered_with_a_setting_that_exists(name: str, tmp_path: Path) -> None:
    """As an override under a section of the other trainer's; the answer begins with, or advises, a setting of ours."""
    found = refusal(tmp_path, {}, f"theirs.{name}=1")
    assert found.startswith(f"theirs.{name}: ") and "\n" not in found
    if called := re.search(r": is called (\S+)", found):
        assert called[1] in KEYS
    else:
        assert "has no equivalent: use " in found
        assert re.search(r"use --|use ENGINE_NODES", found) or any(key in found for key in KEYS) or "columns" in found


def test_the_table_covers_the_peers() -> None:
    """The names most used of each, and every renamed setting of megarl."""
    assert len(aliases.table()) > 200
    for name, ours in {
        "num_generations": "batch.completions_per_prompt", "max_completion_length": "rollout.max_response_tokens",
        "learning_rate": "optimizer.lr", "epsilon_high": "algorithm.clip_high", "actor.ppo_mini_batch_size":
        "batch.prompts_per_update", "actor_rollout_ref.rollout.n": "batch.completions_per_prompt",
        "actor_rollout_ref.actor.loss_agg_mode": "algorithm.aggregation", "kl_loss_coef": "algorithm.kl.coef",
        "rollout.tensor_model_parallel_size": "rollout.servers.flags", "megatron.tensor_model_parallel_size":
        "parallel.tp", "--n-samples-per-prompt": "batch.completions_per_prompt", "grpo.num_prompts_per_step":
        "batch.prompts_per_step", "gconfig.n_samples": "batch.completions_per_prompt", "parallel.sp":
        "parallel.sequence_parallel", "rollout.deadline": "rollout.timeout", "reward.markers":
        "rollout.early_exit.markers",
    }.items():  # fmt: skip
        assert f"is called {ours}" in (aliases.answer(name.lstrip("-")) or ""), name


def test_no_setting_of_ours_is_answered_as_another() -> None:
    """A full name of ours in the table would send a reader of the answer round in a circle."""
    assert not KEYS & aliases.table().keys() - {"steps"}


def test_names_in_a_file_are_answered_at_any_depth(tmp_path: Path) -> None:
    """A section of another trainer's: one line for each of its settings that has a name here."""
    theirs = {"actor_rollout_ref": {"actor": {"clip_ratio_high": 0.28, "odd": 1}, "rollout": {"n": 8}}}
    assert refusal(tmp_path, theirs).splitlines() == [
        "actor_rollout_ref.actor.clip_ratio_high: is called algorithm.clip_high here",
        "actor_rollout_ref.rollout.n: is called batch.completions_per_prompt here",
    ]
    ours = {"rollout": {"deadline": 3, "early_exit": {"refuse_early": True}}}
    assert set(refusal(tmp_path, ours).splitlines()) == {
        "rollout.deadline: is called rollout.timeout here",
        "rollout.early_exit.refuse_early: is called rollout.early_exit.reject_early here",
    }


def test_options_of_other_trainers_are_answered(tmp_path: Path) -> None:
    for text in ("--rollout-batch-size=8", "--rollout-batch-size"):
        assert refusal(tmp_path, {}, text) == f"{text}: is called batch.prompts_per_step here"
    assert "settings are written key=value" in refusal(tmp_path, {}, "--batch.tokens_per_row=1")


def test_a_setting_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    assert "did you mean 'rollout.max_response_tokens'" in refusal(tmp_path, {}, "max_response_tokens=5")
