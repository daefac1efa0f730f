"""The preset table: complete, as the papers have it, overridable, and without idle switches."""

from __future__ import annotations

from typing import get_args

import pytest

from megarl import config
from megarl.algorithms.presets import PRESETS, resolve
from megarl.errors import UserError


def switches(max_response_tokens: int = 512, updates_per_step: int = 2, **settings: object):
    return resolve(config.Algorithm.model_validate(settings), max_response_tokens, updates_per_step)


def test_the_table_has_exactly_the_presets_that_can_be_configured():
    """Proves that no preset of config/algorithm.py lacks its row, nor a row its preset."""
    assert set(PRESETS) == set(get_args(config.Algorithm.model_fields["preset"].annotation))


@pytest.mark.parametrize(
    "preset, advantage, ratio, aggregation, low, high, dynamic",
    [
        ("grpo", "grpo", "token", "sequence_mean", 0.2, 0.2, False),
        ("dr_grpo", "dr_grpo", "token", "constant", 0.2, 0.2, False),
        ("dapo", "grpo", "token", "token_mean", 0.2, 0.28, True),
        ("gspo", "grpo", "sequence", "sequence_mean", 3e-4, 4e-4, False),
        ("cispo", "grpo", "cispo", "token_mean", 1.0, 4.0, False),
        ("rloo", "rloo", "token", "constant", 0.2, 0.2, False),
        ("reinforce_pp", "reinforce_pp", "token", "token_mean", 0.2, 0.2, False),
    ],
)
def test_a_preset_fills_every_switch(preset, advantage, ratio, aggregation, low, high, dynamic):
    """Pins each row to its paper's figures; says nothing about how well they train."""
    s = switches(preset=preset)
    assert (s.advantage, s.ratio, s.aggregation) == (advantage, ratio, aggregation)
    assert (s.clip_low, s.clip_high, s.dynamic_sampling) == (low, high, dynamic)
    assert (s.dual_clip, s.tis_cap, s.entropy_coef, s.kl_loss_coef, s.kl_reward_coef) == (None, None, 0, 0, 0)
    assert s.constant == 512
    assert s.zero_advantage_is_zero_gradient


@pytest.mark.parametrize(
    "setting, value, field",
    [
        ("advantage", "rloo", "advantage"),
        ("ratio", "sequence", "ratio"),
        ("aggregation", "token_mean", "aggregation"),
        ("clip_low", 0.0, "clip_low"),
        ("clip_high", 0.3, "clip_high"),
        ("dynamic_sampling", True, "dynamic_sampling"),
        ("dual_clip", 3.0, "dual_clip"),
        ("tis_cap", 2.0, "tis_cap"),
        ("entropy_coef", 0.01, "entropy_coef"),
    ],
)
def test_an_explicit_setting_overrides_the_preset(setting, value, field):
    """Zero and False count as set: only an absent setting falls back to the preset."""
    assert getattr(switches(preset="grpo", **{setting: value}), field) == value


def test_dynamic_sampling_can_be_switched_off_under_dapo():
    assert switches(preset="dapo", dynamic_sampling=False).dynamic_sampling is False


def test_kl_goes_to_one_place():
    loss = switches(kl={"coef": 0.01, "estimator": "k2"})
    reward = switches(kl={"coef": 0.01, "apply_to": "reward"})
    assert (loss.kl_loss_coef, loss.kl_reward_coef, loss.kl_estimator) == (0.01, 0.0, "k2")
    assert (reward.kl_loss_coef, reward.kl_reward_coef, reward.kl_estimator) == (0.0, 0.01, "k3")
    assert not loss.zero_advantage_is_zero_gradient
    assert reward.zero_advantage_is_zero_gradient
    assert not switches(entropy_coef=0.1).zero_advantage_is_zero_gradient


def test_auto_takes_the_policys_own_logprobs_only_when_a_step_has_one_update():
    assert switches(updates_per_step=1).old_logprobs == "policy"
    assert switches(updates_per_step=2).old_logprobs == "recompute"
    assert switches(updates_per_step=1, old_logprobs="rollout").old_logprobs == "rollout"


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"preset": "cispo", "dual_clip": 3.0}, "algorithm.dual_clip: 3 "),
        ({"preset": "grpo", "loss_divisor": 100}, "algorithm.loss_divisor: 100 "),
        ({"tis_cap": 2.0, "old_logprobs": "rollout"}, "algorithm.tis_cap: 2 "),
    ],
)
def test_a_switch_that_would_do_nothing_is_refused(settings, named):
    with pytest.raises(UserError, match=named) as error:
        switches(**settings)
    assert "\n" not in str(error.value)
