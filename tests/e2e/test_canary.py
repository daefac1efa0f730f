"""The check of weight sync at real size: SmolLM2-135M from its package or, where that cannot be fetched, a random model
of its shape. In bf16, the default. Not proven: anything of servers (tests/engines)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megarl.bench.common.learners import new_learner, settings
from megarl.bench.common.models import write_model
from megarl.runtime.spawn import spawn
from tests.support import pages
from tests.support.real_model import smollm2_folder

pytestmark = pytest.mark.slow

DEADLINE = 900.0


def measured_twice(folder: Path, dtype: str) -> tuple[float, bool, bool]:
    """The rounding of 32 random tokens, whether it measures the same again, and whether it left the learner alone."""
    from megarl.loop import canaries

    learner = new_learner(settings(folder, precision={"dtype": dtype}))
    tokens = np.random.default_rng(0).integers(0, 500, 40).astype(np.int32)
    first, second = (canaries.measure(learner, tokens, 8) for _ in range(2))
    rounding = float(np.sqrt(np.mean(np.square(first.rounding))))
    return rounding, first.rounding == second.rounding, first.logprobs == second.logprobs


def test_the_learners_rounding_is_that_of_its_precision(tmp_path: Path) -> None:
    """In bf16 it is some 2^16 times that of fp32. Every measurement is the same, and leaves no trace."""
    write_model(tmp_path, tied=True)
    [(fine, *same)] = spawn(measured_twice, 1, (tmp_path, "fp32"), DEADLINE)
    [(coarse, *same_coarse)] = spawn(measured_twice, 1, (tmp_path, "bf16"), DEADLINE)
    assert all(same) and all(same_coarse)
    assert 1e-8 < fine < 1e-5 < 1e-3 < coarse < 0.2
    assert 2**12 < coarse / fine < 2**20


@pytest.mark.timeout(DEADLINE)
def test_damaged_weights_are_caught_and_named(tmp_path: Path) -> None:
    """21 damages in bf16, each of one tensor of 272: two rows exchanged, a column scaled, the tensor of the update
    before. All are refused by name. The clean syncs before and after the update pass. The canary alone, without any
    checksum, refuses matrices whose rows all moved by one place."""
    folder = smollm2_folder(tmp_path / "SmolLM2-135M")
    command = [sys.executable, "-m", "megarl.cli", "bench", "canary", "--model", str(folder), "--sabotages", "21",
               "--tokens", "24", "--json", str(tmp_path / "canary.json")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["kind"]: row for row in json.loads((tmp_path / "canary.json").read_text())["rows"]}
    clean = rows.pop("none")
    assert (clean["syncs"], clean["caught"], clean["by_canary"]) == (2, 0, 0)
    assert {kind: row["syncs"] for kind, row in rows.items()} == {
        "rows_exchanged": 7, "column_scaled": 7, "stale": 7, "rows_moved": 3,
    }  # fmt: skip
    for row in rows.values():
        assert row["caught"] == row["named"] == row["syncs"]
    assert rows["rows_moved"]["by_canary"] >= 2
