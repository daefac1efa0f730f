"""Which NCCL communicators are made, and by whom. Real ProcessGroupNCCL of torch's CUDA build, NCCL written down.

What these tests do not show: that a real NCCL connects. They show who asks it to, and with whom.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support.cuda.communicators import Calls, record
from tools import cuda_wheels

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cuda_wheels.THIS, reason="the pinned CUDA build of torch is for Python 3.11"),
]
RANKS = 2


@pytest.fixture(scope="module")
def recorded() -> tuple[list[Calls], list[Calls], Calls]:
    return record({"tp": 2}, RANKS, 550)


def test_no_communicator_is_split_from_another(recorded: tuple[list[Calls], list[Calls], Calls]) -> None:
    """A split is a call of all ranks of its parent. A group that only some ranks make would wait for the others."""
    start, weights, server = recorded
    assert not [call for made in (*start, *weights, server) for call in made if call[0] == "ncclCommSplit"]


def test_starting_a_learner_makes_no_communicator(recorded: tuple[list[Calls], list[Calls], Calls]) -> None:
    """Groups that are never used cost nothing: NCCL connects a group's ranks when they first use it."""
    start, _, _ = recorded
    assert start == [Counter()] * RANKS


def test_the_group_of_the_weights_is_made_by_rank_0_and_the_server(
    recorded: tuple[list[Calls], list[Calls], Calls],
) -> None:
    """Both call for a new communicator of two ranks, with an id of rank 0. No other learner rank takes part."""
    _, weights, server = recorded
    assert weights[0] == {("ncclGetUniqueId", 0, 0): 1, ("ncclCommInitRankConfig", 2, 0): 1}
    assert server == {("ncclCommInitRankConfig", 2, 1): 1}
    assert weights[1:] == [Counter()] * (RANKS - 1)
