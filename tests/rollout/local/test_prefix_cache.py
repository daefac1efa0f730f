"""Which slot a request takes, without a model. Says nothing about the KV cache: see test_prefixes.py."""

import numpy as np
import pytest

from megarl.rollout.local.prefix_cache import PrefixCache
from megarl.rollout.local.slots import Placement, SlotTable

ONE, OTHER = np.arange(1, 11, dtype=np.int32), np.arange(100, 110, dtype=np.int32)


def enter(slots: SlotTable, ids: np.ndarray, completion: str, scratch: bool = False) -> Placement:
    """Place a request, start it, and feed all but its newest token."""
    placement = PrefixCache(slots).place(ids, 8, scratch, completion)
    assert placement is not None
    slots.enter(placement, ids, None if scratch else completion)
    slots.fed[placement.slot] = slots.end[placement.slot] - 1
    return placement


def longer(ids: np.ndarray, *more: int) -> np.ndarray:
    return np.append(ids, np.array(more, np.int32))


def test_a_completion_continues_in_its_own_slot_without_a_search(monkeypatch):
    """Also after its sequence was moved to another slot; but not once that slot has another completion's sequence."""
    slots = SlotTable(3, 64)
    enter(slots, OTHER, "other")
    assert enter(slots, ONE, "one").slot == 1
    slots.leave(1, reserve=64)

    def search(cache, token_ids):
        raise AssertionError("searched")

    monkeypatch.setattr(PrefixCache, "search", search)
    assert enter(slots, longer(ONE, 11), "one") == Placement(1, 9, 1)
    slots.move(1, 2)
    slots.leave(2, reserve=64)
    assert enter(slots, longer(ONE, 11, 12), "one") == Placement(2, 10, 2)
    slots.leave(2, reserve=2)
    slots.enter(Placement(2, 0, 2), OTHER, "third")
    with pytest.raises(AssertionError, match="searched"):
        PrefixCache(slots).place(longer(ONE, 11), 8, False, "one")


def test_a_probe_branches_and_its_trunk_returns():
    """A probe that shares 7 of 9 cached tokens goes behind them in the same slot. Afterwards the trunk is as before."""
    slots = SlotTable(1, 64)
    enter(slots, ONE, "one")
    slots.leave(0, reserve=2)
    before = slots.fed[0], slots.end[0]
    probe = longer(ONE[:7], 50, 51, 52)
    assert enter(slots, probe, "one", scratch=True) == Placement(0, 7, 0, branch=True)
    assert slots.gaps([0]).tolist() == [[7, 10]] and slots.end[0] == 13
    assert slots.tokens[0, :13].tolist() == [*ONE, 50, 51, 52]
    slots.leave(0, reserve=2)
    assert (slots.fed[0], slots.end[0]) == before and slots.gaps([0]) is None
    assert enter(slots, longer(ONE, 11), "one") == Placement(0, 9, 0)


def test_a_detached_branch_closes_its_gap():
    """The slot then has the probe's sequence alone, and its columns count from the beginning."""
    slots = SlotTable(1, 64)
    enter(slots, ONE, "one")
    slots.leave(0, reserve=2)
    probe = longer(ONE[:7], 50, 51, 52)
    enter(slots, probe, "one", scratch=True)
    slots.append(np.array([0]), np.array([53]), np.array([-0.5]))
    slots.detach_branch(0)
    assert slots.tokens[0, : slots.end[0]].tolist() == [*probe, 53]
    assert (slots.start[0], slots.end[0], slots.fed[0]) == (10, 11, 10)
    assert slots.logprobs[0, 10] == -0.5 and slots.gaps([0]) is None


def test_unreserved_slots_are_taken_first():
    """Then the one whose reservation ends first; when all are active there is none."""
    slots = SlotTable(3, 64)
    for slot, reserve in enumerate((5, 3, -1)):
        enter(slots, ONE + 100 * slot, str(slot))
        slots.leave(slot, reserve)
    cache = PrefixCache(slots)
    taken = []
    for n in (4, 5, 6):
        placement = cache.place(OTHER + 100 * n, 8, False, str(n))
        slots.enter(placement, OTHER + 100 * n, str(n))
        taken.append(placement.slot)
    assert taken == [2, 1, 0] and cache.place(OTHER, 8, False, "none") is None
