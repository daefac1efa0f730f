"""Which steps can be replayed, and what is said of those that cannot; that replays are exact is in e2e/test_loop.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.replay import find
from megarl.run import atomic


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six recorded steps; the checkpoints of steps 2 and 4 are kept."""
    (tmp_path / "rollouts").mkdir()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(7):
            file.write(json.dumps({"step": step}) + "\n")
            if step:
                (tmp_path / "rollouts" / f"step_{step:06d}.jsonl").touch()
    for step in (2, 4):
        (atomic.prepare(tmp_path / "checkpoints", step) / "weights").write_bytes(b"weights")
        atomic.commit(tmp_path / "checkpoints", step, keep=2, warn=print)
    return tmp_path


def test_the_newest_checkpoint_before_the_step_is_the_start(run: Path) -> None:
    assert [find(run, step) for step in range(1, 7)] == [0, 0, 2, 2, 4, 4]


def test_what_is_gone_is_named(run: Path) -> None:
    with pytest.raises(UserError, match="step: 7 is not recorded .* it has the steps 1 to 6"):
        find(run, 7)
    (run / "rollouts" / "step_000005.jsonl").unlink()
    with pytest.raises(UserError, match="step: 6 cannot be replayed: .*step_000005.jsonl is missing"):
        find(run, 6)
    (run / "checkpoints" / "step_000002" / "weights").write_bytes(b"WEIGHTS")
    with pytest.raises(UserError, match="the checkpoint of step 2 is damaged .*weights does not match"):
        find(run, 3)
    with pytest.raises(UserError, match="has no metrics.jsonl"):
        find(run / "rollouts", 1)
