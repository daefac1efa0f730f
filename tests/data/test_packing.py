"""Packing: no sequence lost, split or repeated, no row over capacity, nobody starves, and the rule is the paper's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.packing import density, pack
from megarl.errors import UserError

CAPACITY = 40
lengths_lists = st.lists(st.integers(0, CAPACITY), max_size=60)
strategies = st.sampled_from(["dense", "none", "sorted", "first_fit"])


def as_lists(rows: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in rows]


@given(lengths_lists, strategies, st.integers(1, 70))
def test_every_sequence_is_in_one_row_that_has_room(lengths, strategy, window):
    rows = pack(np.array(lengths, dtype=np.int32), CAPACITY, strategy, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert row.dtype == np.int64
        assert len(row) > 0
        assert sum(lengths[i] for i in row) <= CAPACITY


@given(lengths_lists, st.integers(1, 70))
def test_dense_follows_the_rule(lengths, window):
    """Against the rule written out naively: the oldest pending first, then the longest that fits, then a new row."""
    pending, arriving, expected = [], list(range(len(lengths))), []
    while pending or arriving:
        while arriving and len(pending) < window:
            pending.append(arriving.pop(0))
        row = [pending.pop(0)]
        while fitting := [i for i in pending if lengths[i] <= CAPACITY - sum(lengths[j] for j in row)]:
            chosen = max(fitting, key=lambda i: (lengths[i], -i))
            pending.remove(chosen)
            row.append(chosen)
        expected.append(row)
    assert as_lists(pack(lengths, CAPACITY, "dense", window)) == expected


@given(lengths_lists, st.integers(1, 70))
def test_starvation_is_bounded_by_the_window(lengths, window):
    """Once among the `window` oldest that are not packed, a sequence is in one of the next `window` rows."""
    packed: set[int] = set()
    waited: dict[int, int] = {}
    for row in as_lists(pack(lengths, CAPACITY, "dense", window)):
        for i in [i for i in range(len(lengths)) if i not in packed][:window]:
            waited[i] = waited.get(i, 0) + 1
        packed.update(row)
    assert max(waited.values(), default=0) <= window


@given(lengths_lists)
def test_a_window_of_one_packs_nothing(lengths):
    assert as_lists(pack(lengths, CAPACITY, "dense", 1)) == as_lists(pack(lengths, CAPACITY, "none"))


@given(lengths_lists)
def test_first_fit_follows_the_rule(lengths):
    """First-fit decreasing, against a naive search of the rows."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [r for r, row in enumerate(rows) if sum(lengths[j] for j in row) + lengths[i] <= CAPACITY]
        if room:
            rows[room[0]].append(i)
        else:
            rows.append([i])
    assert as_lists(pack(lengths, CAPACITY, "first_fit")) == rows


def test_examples():
    """Worked by hand: the oldest opens the row, the longest that fits follows."""
    lengths = [3, 9, 5, 7, 2]
    assert as_lists(pack(lengths, 10, "dense", 5)) == [[0, 3], [1], [2, 4]]
    assert as_lists(pack(lengths, 10, "dense", 2)) == [[0], [1], [2], [3, 4]]
    assert as_lists(pack(lengths, 10, "sorted")) == [[1], [3], [2, 0, 4]]
    assert as_lists(pack(lengths, 10, "first_fit")) == [[1], [3, 0], [2, 4]]
    assert density(pack(lengths, 10, "first_fit"), lengths, 10) == pytest.approx(26 / 30)
    assert density([], [], 10) == 1.0


def test_mistakes_are_named():
    """A row shorter than a sequence says which one and how long; so does a window that sees nothing."""
    with pytest.raises(UserError, match="tokens_per_row: 8 is shorter than sequence 1 of 9 tokens; at least 9"):
        pack([3, 9, 8], 8)
    with pytest.raises(UserError, match="packing.window: 0 leaves nothing to choose from; at least 1"):
        pack([1], 8, window=0)
