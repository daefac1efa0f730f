"""Drawing: the stream of uniforms, the distribution of tokens, truncation, independence of the batch."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.rollout.local.sampler import sample, uniforms
from megarl.types import derive_seed


def draw(logits, u, temperature=1.0, top_p=None, top_k=None):
    rows = len(logits)
    full = lambda value, dtype: None if value is None else torch.full((rows,), value, dtype=dtype)  # noqa: E731
    return sample(
        torch.as_tensor(logits, dtype=torch.float32),
        torch.as_tensor(u, dtype=torch.float64),
        full(temperature, torch.float32),
        full(top_p, torch.float32),
        full(top_k, torch.int64),
    )


def test_uniforms_are_uniform_and_uncorrelated():
    """Means, variances and correlations over seeds and over positions lie within 5 standard errors. Not a test of
    every statistical property of the generator."""
    seeds = np.array([derive_seed(0, i) for i in range(400)], np.uint64)
    u = np.stack([uniforms(seeds, np.full(400, p)) for p in range(400)])
    assert u.min() >= 0 and u.max() < 1
    n = u.size
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs((u**2).mean() - 1 / 3) < 5 * (4 / 45 / n) ** 0.5
    c = u - 0.5
    for product in (c[1:] * c[:-1], c[:, 1:] * c[:, :-1]):
        assert abs(product.mean()) < 5 * (1 / 144 / product.size) ** 0.5
    # Neighbouring seeds are as good.
    v = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000))
    assert abs(np.corrcoef(v[1:], v[:-1])[0, 1]) < 0.02 and len(np.unique(v)) == len(v)


def test_tokens_follow_the_softmax():
    """100,000 draws at temperature 0.7: every frequency is within 5 standard errors of the probability."""
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0])
    n = 100_000
    tokens, logprobs = draw(logits.expand(n, 5), uniforms(np.full(n, 7, np.uint64), np.arange(n)), 0.7)
    expected = (logits / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=5) / n
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()
    torch.testing.assert_close(logprobs, (logits / 0.7).log_softmax(-1)[tokens])


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=9),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 10),
    u=st.floats(0, 1, exclude_max=True),
)
def test_truncation_keeps_the_likeliest(logits, top_p, top_k, u):
    """Against a loop: top-k first, then the smallest set of likeliest tokens whose share of the rest reaches top_p;
    the log-prob reported is the one before truncation."""
    probs = torch.tensor(logits).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: -float(probs[i]))[: top_k or None]
    total, mass, kept = sum(float(probs[i]) for i in order), 0.0, []
    for i in order:
        if mass >= (top_p + 1e-6) * total:
            break
        kept.append(i)
        mass += float(probs[i])
    token, logprob = draw([logits], [u], 1.0, top_p, top_k)
    assert float(probs[token]) >= min(float(probs[i]) for i in kept) - 1e-6
    torch.testing.assert_close(logprob, probs.log()[token])


def test_temperature_zero_is_greedy_with_the_log_prob_at_one():
    logits = torch.randn(8, 30)
    tokens, logprobs = draw(logits, np.linspace(0, 0.999, 8), 0.0)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_a_draw_does_not_depend_on_the_batch():
    """Rows drawn together and alone, with and without neighbours that truncate: the same tokens, bit for bit."""
    logits, u = torch.randn(16, 50), np.linspace(0, 0.999, 16)
    together, _ = draw(logits, u, 0.9, 0.8, 5)
    alone = [int(draw(logits[i : i + 1], u[i : i + 1], 0.9, 0.8, 5)[0]) for i in range(16)]
    assert together.tolist() == alone
    assert torch.equal(draw(logits, u)[0], draw(logits, u, 1.0, 1.0, 0)[0])


def test_the_last_uniform_still_draws_a_possible_token():
    """At the upper end of [0, 1) the inverse CDF must not fall off, nor on a token of probability 0."""
    tokens, _ = draw([[0.0, 0.0, -1e9]], [1 - 2**-53])
    assert int(tokens) == 1
