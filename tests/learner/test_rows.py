"""Packing samples into rows: what every position holds, and that context-parallel ranks share a row out exactly."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.learner.rows import Alignment, Row, build_row, sequence_sum
from megarl.types import Sample
from tests.support.learner_support import Alone, random_samples

FREQUENCIES = torch.ones(2)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(0, 5), multiple=st.sampled_from([1, 4, 8]), extra=st.integers(0, 3)
)
def test_every_position_is_what_it_should_be(seed: int, count: int, multiple: int, extra: int) -> None:
    """Tokens, labels, positions, scales and the rest, against a loop over samples and tokens."""
    samples = random_samples(seed, count)
    alignment = Alignment(multiple, multiple)
    length = alignment.row_length(samples) + extra * multiple
    row = build_row(range(10, 10 + count), samples, length, alignment, FREQUENCIES)
    micro = row.micro
    start = 0
    learned = torch.zeros(length, dtype=torch.bool)
    for k, sample in enumerate(samples):
        for t in range(sample.input_length):
            assert micro.tokens[start + t] == sample.token_ids[t]
            assert micro.labels[start + t] == sample.token_ids[t + 1]
            assert micro.positions[start + t] == t
            assert micro.sequence[start + t] == k
            i = t + 1 - sample.response_start
            if i < 0:
                continue
            learned[start + t] = True
            assert micro.scale[start + t] == np.float32(sample.scale)
            assert micro.advantage[start + t] == np.float32(sample.advantage)
            for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs"):
                values, here = getattr(sample, name), getattr(micro, name)[start + t].item()
                assert np.isnan(here) if values is None else here == values[i] or np.isnan(values[i])
            assert micro.sampled[start + t].item() == (sample.sampled is None or bool(sample.sampled[i]))
        start += -(-sample.input_length // multiple) * multiple
        assert micro.cu_seqlens[k + 1] == start
    assert row.packed.routing is None
    assert torch.equal(row.scored, learned.nonzero().squeeze(1))
    assert not micro.scale[~learned].any()
    assert not micro.sampled[~learned].any()
    assert micro.cu_seqlens[-1] == length == len(micro.tokens)
    assert micro.sample_ids == list(range(10, 10 + count))


def _places(row: Row) -> list[tuple[int, ...]]:
    """(sequence, position, token) of every position of a row."""
    columns = (row.micro.sequence, row.micro.positions, row.micro.tokens)
    return [tuple(place) for place in torch.stack(columns, 1).tolist()]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5), cp=st.sampled_from([2, 4]))
def test_context_parallel_ranks_share_a_row_out(seed: int, count: int, cp: int) -> None:
    """Together the ranks hold every position of every sequence once; each rank equally many; results find home."""
    samples = random_samples(seed, count)
    alignment = Alignment(2 * cp, 2 * cp)
    length = alignment.row_length(samples)
    whole = build_row(range(count), samples, length, alignment, FREQUENCIES)
    parts = [build_row(range(count), samples, length, alignment, FREQUENCIES, r, cp) for r in range(cp)]
    assert {len(part.micro.tokens) for part in parts} == {length // cp}
    places = [place for part in parts for place in _places(part)]
    assert sorted(places) == sorted(_places(whole))
    for i, sample in enumerate(samples):
        n = len(sample.token_ids) - sample.response_start
        found = torch.full((n,), -1)
        for part in parts:
            _, entries, positions = part.ranges[i]
            assert (found[positions] == -1).all()
            found[positions] = part.micro.labels[part.scored[entries]]
        assert found.tolist() == sample.token_ids[sample.response_start :].tolist()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5), cp=st.sampled_from([1, 2, 4]))
def test_routers_are_told_of_every_token(seed: int, count: int, cp: int) -> None:
    """On every context-parallel rank each position has its token's sequence and experts; padding has neither."""
    samples = random_samples(seed, count)
    alignment = Alignment(2 * cp, 2 * cp)
    length = alignment.row_length(samples)
    real = 0
    for rank in range(cp):
        row = build_row(range(count), samples, length, alignment, FREQUENCIES, rank, cp, None, 77)
        routing = row.packed.routing
        assert (routing.sequences, routing.tokens) == (count, 77)
        assert (routing.experts is None) == all(sample.experts is None for sample in samples)
        for t, (sequence, k, position) in enumerate(
            zip(routing.sequence.tolist(), row.micro.sequence.tolist(), row.micro.positions.tolist(), strict=True)
        ):
            there = k < count and position < samples[k].input_length
            assert sequence == (k if there else -1)
            real += there
            if routing.experts is not None:
                known = samples[k].experts if there else None
                np.testing.assert_array_equal(routing.experts[t], -1 if known is None else known[position])
    assert real == sum(sample.input_length for sample in samples)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 5))
def test_sequence_sum(seed: int, count: int) -> None:
    """Each position gets its own sequence's sum, differentiably."""
    samples = random_samples(seed, count)
    alignment = Alignment(1, 1)
    micro = build_row(range(count), samples, alignment.row_length(samples), alignment, FREQUENCIES).micro
    values = torch.randn(len(micro.tokens), dtype=torch.float64, requires_grad=True)
    found = sequence_sum(micro, Alone())(values)
    same = (micro.sequence[:, None] == micro.sequence[None]).double()
    torch.testing.assert_close(found, same @ values)
    pull = torch.randn_like(values)
    torch.testing.assert_close(torch.autograd.grad((found * pull).sum(), values)[0], same.t() @ pull)


def test_a_micro_batch_of_padding_alone() -> None:
    """It has the smallest length there is, and nothing to learn."""
    alignment = Alignment(4, 8)
    row = build_row([], [], alignment.row_length([]), alignment, FREQUENCIES)
    assert len(row.micro.tokens) == 8
    assert len(row.scored) == 0
    assert not row.packed.skip_last  # attention still runs, so that every parameter gets a gradient


def test_a_prompt_of_one_token_and_a_response_of_one() -> None:
    """The shortest sample occupies one position."""
    sample = Sample(np.array([3, 5], np.int32), 1, 1.0)
    row = build_row([0], [sample], 1, Alignment(1, 1), FREQUENCIES)
    assert (row.micro.tokens.tolist(), row.micro.labels.tolist(), row.scored.tolist()) == ([3], [5], [0])
