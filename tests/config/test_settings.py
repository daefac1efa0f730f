"""Settings: what is refused, and that each refusal names the setting and a valid value."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarl import config
from megarl.config import docs
from megarl.errors import UserError
from tests.support import english

LEAST = {"run": "r", "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}


def written(folder: Path, **more: object) -> Path:
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump({**LEAST, **more}))
    return file


def test_overrides_reach_nested_settings(tmp_path: Path) -> None:
    """Values are read as YAML, and 1e-4 is a number although YAML 1.1 says otherwise."""
    settings = config.load(written(tmp_path), ["optimizer.lr=1e-4", "rollout.early_exit.markers=[Wait, Hmm]", "seed=3"])
    assert settings.optimizer.lr == 1e-4
    assert settings.rollout.early_exit.markers == ["Wait", "Hmm"]
    assert settings.seed == 3


def test_dump_is_what_was_loaded(tmp_path: Path) -> None:
    settings = config.load(written(tmp_path), ["batch.prompts_per_step=12"])
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(settings))
    assert config.load(again) == settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "'lr'"]),
        ("rolout.engine=local", ["rolout", "'rollout'"]),
        ("rollout.engine=tgi", ["rollout.engine", "tgi", "'local'"]),
        ("batch.completions_per_prompt=1", ["batch.completions_per_prompt", "1", "2"]),
        ("pruning.prompts=1.0", ["pruning.prompts", "1.0", "less than 1"]),
        ("pruning.completions=-0.1", ["pruning.completions", "-0.1"]),
        ("pruning.until_fraction=0", ["pruning.until_fraction", "greater than 0"]),
        ("packing.window=0", ["packing.window", "0", "1"]),
        ("rollout.early_exit.threshold=1.5", ["threshold", "1.5", "1"]),
        ("rollout.early_exit.threshold=0", ["threshold", "0", "greater than 0"]),
        ("rollout.early_exit.markers=[]", ["rollout.early_exit.markers: []", "Wait"]),
        ("rollout.early_exit.markers=[Wait, ' ']", ["rollout.early_exit.markers", "blank", "Wait"]),
        ("rollout={max_response_tokens: 2, early_exit: {enabled: true}}", ["thinking_share", "room for an answer"]),
        ("batch={prompts_per_step: 10, prompts_per_update: 4}", ["prompts_per_update", "4", "10", "5"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr", "at most"]),
        ("experts.aux_loss_coeff=0.1", ["experts.aux_loss_coeff", "0.1", "none", "seq_aux_loss"]),
        ("experts.router_load_balancing_type=aux_loss", ["experts.aux_loss_coeff", "aux_loss", "1e-3"]),
        (
            "rollout={replay_routing: true, engine: vllm}",
            ["rollout.replay_routing", "vllm", "Triton", "engine: sglang"],
        ),
        (
            "rollout={replay_routing: true, servers: {addresses: ['http://a:1']}}",
            ["rollout.replay_routing", "served", "servers.addresses"],
        ),
        ("async_steps=1", ["algorithm.tis_cap", "async_steps 1"]),
        ("rollout={partial: true}", ["rollout.partial", "async_steps"]),
        ("seed", ["seed", "key=value"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, override: str, words: list[str]) -> None:
    """One line a mistake, with the setting, the value and what would be valid."""
    with pytest.raises(UserError) as caught:
        config.load(written(tmp_path), [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recomputed_experts_have_no_auxiliary_losses_and_no_replay(tmp_path: Path) -> None:
    file = written(tmp_path, parallel={"recompute": "selective", "recompute_modules": ["mlp", "moe"]})
    config.load(file)
    with pytest.raises(UserError, match="parallel.recompute_modules: moe .*recompute: full"):
        config.load(file, ["experts.z_loss_coeff=0.1"])
    with pytest.raises(UserError, match="parallel.recompute_modules: moe .*recompute: full"):
        config.load(file, ["rollout.replay_routing=true"])


def test_replayed_routing_has_no_partial_rollouts(tmp_path: Path) -> None:
    file = written(tmp_path, async_steps=1, algorithm={"tis_cap": 2.0}, rollout={"partial": True})
    config.load(file)
    with pytest.raises(UserError, match="rollout.replay_routing: .*rollout.partial"):
        config.load(file, ["rollout.replay_routing=true"])


def test_missing_file_and_missing_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError) as caught:
        config.load(tmp_path / "empty.yaml")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["run", "model", "data"]


def test_every_setting_and_section_is_documented_in_plain_english() -> None:
    """No sentence over 30 words and none of the phrases that the house avoids; a sentence has 20 words at most, but
    for a few. That they are true and clear no count can tell."""
    assert [s.key for g in docs.groups() for s in g.settings if not s.doc] == []
    assert [g.key for g in docs.groups() if not g.doc] == []
    page = docs.PREFACE + docs.markdown()
    assert english.long(page) == []
    assert english.avoided(page) == []
    assert len(english.long(page, 20)) <= 8
