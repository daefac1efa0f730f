"""`megarl bench packing` on fewer lengths: the claims of its table, and that peers' rules are what they are called."""

import json

import numpy as np
import pytest

from megarl.bench.packing import DISTRIBUTIONS, largest_differencing, main


def test_claims(tmp_path):
    """Dense packing at window 256 reaches 0.98 and is at least as dense as the peers' rules; ranks are even.

    On 4,096 lengths; the full table's 100,000 and its times are for the command itself.
    """
    file = tmp_path / "packing.json"
    main(json=file, sequences=4096, capacity=16384, window=256, ranks=8, seed=1)
    rows = json.loads(file.read_text())["rows"]
    for distribution in DISTRIBUTIONS:
        density = {r["method"]: r["density"] for r in rows if r["distribution"] == distribution and "density" in r}
        assert density["dense"] >= 0.98
        assert density["dense"] >= max(density["verl_dynamic"], density["first_fit_arrival"], density["sorted"])
    assert max(r["dp_imbalance"] for r in rows if "dp_imbalance" in r) <= 1.02


@pytest.mark.parametrize("k", [1, 2, 5])
def test_largest_differencing(k):
    """A partition with balanced sums; the textbook example for two sets leaves the difference it is known for, 2."""
    lengths = np.random.default_rng(0).integers(1, 100, 60)
    rows = largest_differencing(lengths, k)
    assert sorted(np.concatenate(rows).tolist()) == list(range(60))
    sums = [int(lengths[row].sum()) for row in rows]
    assert max(sums) - min(sums) <= 3
    textbook = np.array([8, 7, 6, 5, 4])
    assert sorted(int(textbook[row].sum()) for row in largest_differencing(textbook, 2)) == [14, 16]
