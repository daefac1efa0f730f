"""Which slot a request takes, without a model. Says nothing about what is in the caches (test_local.py)."""

import numpy as np
import pytest

from megarl.rollout.local.slots import Placement, Slots


def enter(slots: Slots, ids: np.ndarray, completion: str) -> Placement:
    """Place a request, start it, and feed all but its newest token."""
    placement = slots.place(ids, 8, False, completion)
    assert placement is not None
    slots.start(placement, ids, False, completion)
    slots.fed[placement.slot] = slots.end[placement.slot] - 1
    return placement


def test_a_completion_goes_on_in_its_own_slot_without_a_search(monkeypatch):
    """Also after its sequence was moved to another slot; but not once that slot holds another completion's."""
    slots = Slots(3, 64)
    other, ids = np.arange(100, 110, dtype=np.int32), np.arange(1, 11, dtype=np.int32)
    enter(slots, other, "other")
    assert enter(slots, ids, "one").slot == 1
    slots.stop(1, at_word=True, scratch=False)

    def search(token_ids):
        raise AssertionError("searched")

    monkeypatch.setattr(slots, "_shared", search)
    longer = np.append(ids, np.int32(11))
    assert enter(slots, longer, "one") == Placement(1, 9, 1)
    slots.move(1, 2)
    slots.stop(2, at_word=True, scratch=False)
    assert enter(slots, np.append(longer, np.int32(12)), "one") == Placement(2, 10, 2)
    slots.stop(2, at_word=False, scratch=False)
    slots.start(Placement(2, 0, 2), other, False, "third")
    with pytest.raises(AssertionError, match="searched"):
        slots.place(longer, 8, False, "one")
