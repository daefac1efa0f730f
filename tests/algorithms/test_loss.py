"""The policy loss against a token-by-token implementation in plain floats, values and gradients."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.algorithms.kl import kl_estimate, kl_penalty
from megarl.algorithms.loss import policy_loss, token_scale, within_row
from megarl.algorithms.metrics import summarise
from megarl.algorithms.presets import PRESETS, Switches
from megarl.types import MicroBatch
from tests.support.loss_rows import make_row

BASE = Switches(
    advantage="grpo",
    ratio="token",
    aggregation="token_mean",
    constant=100.0,
    clip_low=0.2,
    clip_high=0.28,
    dynamic_sampling=False,
    old_logprobs="recompute",
)


def run(row, switches):
    logprobs, entropy, micro = row
    return policy_loss(logprobs, entropy, micro, within_row(micro.sequence), switches)


def naive(row, switches: Switches):
    """Loss, its gradient by each log-prob, and counts: one token at a time, derivatives by hand."""
    logprobs, _, micro = row
    x = {f.name: getattr(micro, f.name).tolist() for f in fields(MicroBatch) if f.name not in ("sample_ids",)}
    logp, entropy = logprobs.tolist(), row[1].tolist()
    learned = [t for t, s in enumerate(x["scale"]) if s != 0]
    old = {t: logp[t] if math.isnan(x["old_logprobs"][t]) else x["old_logprobs"][t] for t in learned}
    loss, gradient, counts = 0.0, [0.0] * len(logp), {"clip_low": 0, "clip_high": 0, "dual_clip": 0, "tis_clip": 0}
    mismatches = []
    for t in learned:
        a = x["advantage"][t]
        mates = [u for u in learned if x["sequence"][u] == x["sequence"][t]]
        if switches.ratio == "sequence":
            r = math.exp(sum(logp[u] - old[u] for u in mates) / len(mates))
        else:
            r = math.exp(logp[t] - old[t])
        low, high = 1 - switches.clip_low, 1 + switches.clip_high
        bounded = min(max(r, low), high)
        if switches.ratio == "cispo":
            term, slope = -bounded * a * logp[t], -bounded * a
            counts["clip_low"] += a != 0 and r < low
            counts["clip_high"] += a != 0 and r > high
        else:
            is_clipped = (a > 0 and r > high) or (a < 0 and r < low)
            counts["clip_low"] += a < 0 and r < low
            counts["clip_high"] += a > 0 and r > high
            term, slope = (-a * bounded, 0.0) if is_clipped else (-a * r, -a * r)
            if switches.dual_clip is not None and a < 0 and term > -a * switches.dual_clip:
                term, slope = -a * switches.dual_clip, 0.0
                counts["dual_clip"] += 1
        rollout = x["rollout_logprobs"][t]
        if not math.isnan(rollout):
            trainer = logp[t] if switches.old_logprobs == "rollout" else old[t]
            mismatches.append(abs(trainer - rollout))
            if switches.tis_cap is not None:
                weight = math.exp(trainer - rollout)
                counts["tis_clip"] += weight > switches.tis_cap
                term, slope = term * min(weight, switches.tis_cap), slope * min(weight, switches.tis_cap)
        if switches.kl_loss_coef and not math.isnan(x["ref_logprobs"][t]):
            d = logp[t] - x["ref_logprobs"][t]
            value, by_logp = {
                "k1": (d, 1.0),
                "k2": (d * d / 2, d),
                "k3": (math.exp(-d) - 1 + d, 1 - math.exp(-d)),
            }[switches.kl_estimator]
            term, slope = term + switches.kl_loss_coef * value, slope + switches.kl_loss_coef * by_logp
        term -= switches.entropy_coef * entropy[t]
        loss += x["scale"][t] * term
        gradient[t] = x["scale"][t] * slope
    return loss, gradient, counts, mismatches


switch_draws = st.builds(
    Switches,
    advantage=st.just("grpo"),
    ratio=st.sampled_from(["token", "sequence", "cispo"]),
    aggregation=st.just("token_mean"),
    constant=st.just(1.0),
    clip_low=st.sampled_from([0.0003, 0.1, 0.3, 1.0]),
    clip_high=st.sampled_from([0.0004, 0.15, 0.28, 4.0]),
    dynamic_sampling=st.just(False),
    old_logprobs=st.sampled_from(["recompute", "rollout"]),
    dual_clip=st.sampled_from([None, 1.1, 3.0]),
    tis_cap=st.sampled_from([None, 0.9, 1.05, 2.0]),
    entropy_coef=st.sampled_from([0.0, 0.02]),
    kl_loss_coef=st.sampled_from([0.0, 0.3]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
)


@settings(max_examples=120)
@given(switches=switch_draws, lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_value_gradient_and_counts_are_those_of_the_formulas(switches, lengths, seed):
    """Proves loss, gradient and metrics for every combination of switches, in float64, on rows with masked nan.

    It does not cover context parallelism: there `sequence_sum` is the learner's.
    """
    row = make_row(lengths, seed)
    loss, sums = run(row, switches)
    loss.backward()
    expected, gradient, counts, mismatches = naive(row, switches)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(row[0].grad.tolist(), gradient, rtol=1e-10, atol=1e-12)
    for name, count in counts.items():
        assert name not in sums or sums[name].item() == count, name
    assert sums["tokens"].item() == sum(lengths)
    assert sums["mismatch_tokens"].item() == len(mismatches)
    assert sums["mismatch_max"].item() == pytest.approx(max(mismatches, default=0), abs=1e-12)
    assert sums["mismatch"].item() == pytest.approx(sum(mismatches), abs=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        {"ratio": "sequence"},
        {"ratio": "cispo"},
        {"clip_low": 0.05},
        {"clip_high": 0.05},
        {"dual_clip": 1.01},
        {"tis_cap": 1.1},
        {"entropy_coef": 0.1},
        {"kl_loss_coef": 0.1, "kl_estimator": "k1"},
        {"kl_loss_coef": 0.1, "kl_estimator": "k2"},
        {"kl_loss_coef": 0.1, "kl_estimator": "k3"},
    ],
    ids=str,
)
def test_each_switch_changes_the_gradient(change):
    """No switch of the loss is idle: against the base, each moves the gradient of a row that exercises it."""
    grads = []
    for switches in (BASE, replace(BASE, **change)):
        row = make_row([5, 7, 3, 6], seed=3)
        run(row, switches)[0].backward()
        entropy = row[1].grad if row[1].grad is not None else torch.zeros_like(row[0])
        grads.append(torch.cat([row[0].grad, entropy]))
    assert not torch.allclose(grads[0], grads[1], rtol=1e-3)


def test_the_three_kl_estimators_differ():
    grads = []
    for estimator in ("k1", "k2", "k3"):
        row = make_row([5, 7], seed=5)
        run(row, replace(BASE, kl_loss_coef=0.2, kl_estimator=estimator))[0].backward()
        grads.append(row[0].grad)
    assert all(not torch.allclose(grads[i], grads[j]) for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("preset", PRESETS)
def test_nan_at_masked_positions_reaches_nothing(preset):
    """Masked positions hold nan in every input: loss and metrics are finite, their gradients exactly 0."""
    p = PRESETS[preset]
    switches = replace(
        BASE, ratio=p.ratio, clip_low=p.clip_low, clip_high=p.clip_high, tis_cap=2.0, kl_loss_coef=0.1, entropy_coef=0.1
    )
    row = make_row([4, 2])
    loss, sums = run(row, switches)
    loss.backward()
    masked = row[2].scale == 0
    assert torch.isnan(row[0].detach()[masked]).all()
    for gradient in (row[0].grad, row[1].grad):
        assert (gradient[masked] == 0).all()
        assert torch.isfinite(gradient).all()
    assert all(math.isfinite(value) for value in sums.values())


def test_a_row_of_padding_trains_nothing_and_can_still_be_differentiated():
    logprobs, entropy, micro = make_row([4, 2])
    micro.scale = torch.zeros_like(micro.scale)
    loss, sums = run((logprobs, entropy, micro), BASE)
    loss.backward()
    assert loss.item() == 0
    assert (logprobs.grad == 0).all()
    assert all(value == 0 for value in sums.values())


@pytest.mark.parametrize("ratio", ["token", "sequence", "cispo"])
def test_a_row_is_the_sum_of_its_samples(ratio):
    """The loss of a packed row is the sum of its samples' losses, each alone in a row: nothing counts what it holds."""
    switches = replace(BASE, ratio=ratio, kl_loss_coef=0.1, entropy_coef=0.01, tis_cap=2.0)
    logprobs, entropy, micro = make_row([5, 1, 7, 3], seed=9)
    whole, sums = run((logprobs, entropy, micro), switches)
    parts, part_sums = [], []
    for i in range(4):
        at = micro.sequence == i
        cut = {
            f.name: getattr(micro, f.name)[at] for f in fields(MicroBatch) if f.name not in ("sample_ids", "cu_seqlens")
        }
        alone = MicroBatch(**{**cut, "cu_seqlens": micro.cu_seqlens, "sequence": torch.zeros(at.sum(), dtype=int)})
        loss, each = run((logprobs[at], entropy[at], alone), switches)
        parts.append(loss)
        part_sums.append(each)
    torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=1e-12)
    for name, value in sums.items():
        values = [each[name] for each in part_sums]
        combined = max(values) if name.endswith("_max") else sum(values)
        torch.testing.assert_close(value, combined, rtol=1e-12, atol=1e-12)


def test_sequence_ratio_has_gspos_gradient():
    """With equal advantages in a sequence the GSPO-token form has the gradient of GSPO's own sequence ratio."""
    rng = torch.Generator().manual_seed(1)
    logp = (-torch.rand(6, generator=rng, dtype=torch.float64)).requires_grad_()
    old = logp.detach() + 0.2 * torch.rand(6, generator=rng, dtype=torch.float64)
    row = _plain_row(logp, old, advantage=0.7, scale=1 / 6)
    loss, _ = run(row, replace(BASE, ratio="sequence", clip_low=0.5, clip_high=0.5))
    ours = torch.autograd.grad(loss, logp)[0]
    gspo = -0.7 * torch.exp((logp - old).mean())
    torch.testing.assert_close(ours, torch.autograd.grad(gspo, logp)[0])
    torch.testing.assert_close(loss, gspo)


def test_on_policy_gradient_is_reinforce():
    """Without old log-probs the ratio is 1 and the gradient -scale * A, whatever the clip."""
    logp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    row = _plain_row(logp, torch.full((3,), torch.nan, dtype=torch.float64), advantage=-1.5, scale=0.25)
    for ratio in ("token", "sequence", "cispo"):
        loss, sums = run(row, replace(BASE, ratio=ratio, clip_low=0.0, clip_high=0.0))
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.full((3,), 1.5 * 0.25).double())
        assert sums["ratio"].item() == 3


def test_one_wild_token_does_not_make_the_loss_infinite():
    """A log-ratio of 500 is held at 20: the loss stays a number, in float32 too."""
    for ratio in ("token", "sequence", "cispo"):
        logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        row = _plain_row(logp, torch.tensor([-501.0, -2.0]), advantage=-1.0, scale=1.0)
        row[2].ref_logprobs = torch.tensor([499.0, -2.0])
        loss, sums = run(row, replace(BASE, ratio=ratio, kl_loss_coef=1.0))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logp.grad).all()
        assert all(math.isfinite(v) for v in sums.values())


def _plain_row(logp, old, advantage, scale):
    n = len(logp)
    full = lambda value: torch.full((n,), value, dtype=logp.dtype)  # noqa: E731
    ids = torch.zeros(n, dtype=torch.long)
    micro = MicroBatch(
        ids, ids, ids, torch.tensor([0, n]), ids, full(scale), full(advantage), torch.ones(n, dtype=torch.bool),
        full(torch.nan), old, full(torch.nan),
    )  # fmt: skip
    return logp, torch.zeros_like(logp), micro


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    seed=st.integers(0, 1000),
)
def test_token_scale_is_the_three_means(lengths, seed):
    """With weights 1 and the batch's own totals, summing scale * x is the mean that each name promises."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=n) for n in lengths]
    ones, arguments = np.ones(len(lengths)), (len(lengths), sum(lengths), 7.0)
    expected = {
        "token_mean": np.concatenate(x).mean(),
        "sequence_mean": np.mean([xi.mean() for xi in x]),
        "constant": np.mean([xi.sum() / 7.0 for xi in x]),
    }
    for aggregation, value in expected.items():
        scale = token_scale(aggregation, np.array(lengths), ones, *arguments)
        assert scale.dtype == np.float64
        assert sum(s * xi.sum() for s, xi in zip(scale, x, strict=True)) == pytest.approx(value, rel=1e-12)
        doubled = token_scale(aggregation, np.array(lengths), 2 * ones, *arguments)
        np.testing.assert_allclose(doubled, 2 * scale)
        dropped = token_scale(aggregation, np.array(lengths), 0 * ones, *arguments)
        assert (dropped == 0).all()


def test_kl_penalty_sums_over_the_completion():
    logp, ref = np.array([-1.0, -2.0], np.float32), np.array([-1.5, -1.0], np.float32)
    assert kl_penalty(logp, ref, 0.1, "k1") == pytest.approx(0.1 * (0.5 - 1.0))
    assert kl_penalty(logp, ref, 0.1, "k2") == pytest.approx(0.1 * (0.125 + 0.5))
    assert kl_penalty(logp, ref, 0.1, "k3") == pytest.approx(0.1 * (math.exp(-0.5) + 0.5 - 1 + math.exp(1.0) - 1.0 - 1))


def test_kl_estimators_have_the_expectations_they_claim():
    """Over a whole small vocabulary: k1 and k3 average to the KL; as losses k1 has gradient 0 in expectation, k2 that
    of KL(policy || reference) and k3 that of KL(reference || policy)."""
    logits = torch.tensor([0.3, -0.2, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    log_p, log_q = logits.log_softmax(0), torch.tensor([0.1, 0.5, 0.2, 0.2], dtype=torch.float64).log()
    p, q = log_p.exp(), log_q.exp()
    forward = torch.autograd.grad((p * (log_p - log_q)).sum(), logits, retain_graph=True)[0]
    reverse = torch.autograd.grad((q * (log_q - log_p)).sum(), logits, retain_graph=True)[0]
    for estimator, gradient in (("k1", torch.zeros(4).double()), ("k2", forward), ("k3", reverse)):
        values = kl_estimate(log_p, log_q, estimator)
        if estimator != "k2":
            torch.testing.assert_close((p * values).sum(), (p * (log_p - log_q)).sum())
        expected = torch.autograd.grad((p.detach() * values).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(expected, gradient, atol=1e-12, rtol=1e-9)


def test_summary_divides_each_sum_by_what_it_concerns():
    row = make_row([5, 7, 3, 6], seed=3)
    _, sums = run(row, replace(BASE, tis_cap=1.1, dual_clip=1.2))
    figures = summarise({name: value.item() for name, value in sums.items()})
    _, _, counts, mismatches = naive(row, replace(BASE, tis_cap=1.1, dual_clip=1.2))
    assert figures["tokens_trained"] == 21
    assert figures["clip_fraction"] == pytest.approx((counts["clip_low"] + counts["clip_high"]) / 21)
    assert figures["dual_clip_fraction"] == pytest.approx(counts["dual_clip"] / 21)
    assert figures["tis_clip_fraction"] == pytest.approx(counts["tis_clip"] / 21)
    assert figures["mismatch_mean"] == pytest.approx(np.mean(mismatches))
    assert figures["mismatch_max"] == pytest.approx(max(mismatches))
    learned = row[2].scale != 0
    assert figures["entropy"] == pytest.approx(row[1][learned].mean().item())


def test_summary_leaves_out_what_was_not_measured():
    """Without reference or rollout log-probs there is no KL and no mismatch to report, rather than a 0."""
    row = _plain_row(torch.tensor([-1.0]), torch.tensor([torch.nan]), 1.0, 1.0)
    figures = summarise({name: value.item() for name, value in run(row, BASE)[1].items()})
    assert not {"kl", "mismatch_mean", "mismatch_max", "mismatch_kl"} & set(figures)


@pytest.mark.parametrize("difference", [-25.0, -100.0, -19.9, 19.9, 100.0])
def test_k3_pulls_towards_the_reference_however_far_the_token_is(difference):
    """Finite at any distance; the gradient never changes its sign, and the loss grows on both sides."""
    d = torch.tensor([difference, difference * 1.1], dtype=torch.float32, requires_grad=True)
    near, far = kl_estimate(d, torch.zeros(2), "k3")
    assert torch.isfinite(near) and near < far
    (near + far).backward()
    assert torch.isfinite(d.grad).all()
    assert (torch.sign(d.grad) == math.copysign(1, difference)).all()
