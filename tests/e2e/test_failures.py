"""What fails ends the run within its deadline, names the cause, and leaves no process behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megarl import config
from megarl.errors import RunError
from megarl.run import atomic
from megarl.run.directory import read_metrics
from megarl.run.lock import only_job
from megarl.run.timeline import read_phases
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]


SMALL = {
    "parallel.tp": "1",
    "steps": "1",
    "checkpoint.every": "1",
    "data.eval": "[]",
    "batch": "{prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
    "rollout.max_response_tokens": "48",
    "rollout.servers.api_key_env": "MEGARL_TEST_KEY",
}


@pytest.fixture(autouse=True)
def nothing_left():
    """No process outlives its run: neither ranks nor graders (the fork server stays, for the next run's ranks)."""
    yield
    children = psutil.Process().children()
    ranks = [rank for server in children if "forkserver" in str(server.cmdline()) for rank in server.children()]
    graders = [p for p in psutil.Process().children(recursive=True) if "rewards.worker" in " ".join(p.cmdline())]
    assert not graders and not ranks


def train_with_a_broken_rank(settings: config.Settings) -> None:
    """Rank 1 fails in the first update, while rank 0 waits for it in a collective."""
    from megarl.learner.learner import Learner

    original = Learner.train_step

    def train_step(self: Learner, *arguments: object) -> object:
        if self.world.rank == 1:
            raise ArithmeticError("a bit fell over")
        return original(self, *arguments)

    Learner.train_step = train_step
    train(settings)


def train_with_a_stopped_rank(settings: config.Settings) -> None:
    """Rank 1 hangs in the first update as nothing else does: stopped by SIGSTOP, while rank 0 waits for it."""
    from megarl.learner.learner import Learner

    original = Learner.train_step

    def train_step(self: Learner, *arguments: object) -> object:
        if self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(self, *arguments)

    Learner.train_step = train_step
    train(settings)


def train_with_a_jumping_clock(settings: config.Settings) -> None:
    """Every look at the wall clock is two hours off the last, back and forth: longer than any deadline of the run."""
    original, looks = time.time, itertools.count()
    time.time = lambda: original() + 7200 * (-1) ** next(looks)
    train(settings)
    assert next(looks), "nothing looked at the clock"


def train_with_a_dying_engine(settings: config.Settings) -> None:
    """The engine's decoder fails in the second step."""
    from megarl.rollout.local.decoder import Decoder

    original, calls = Decoder.logits, [0]

    def logits(self: Decoder, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] > 20:
            raise MemoryError("no room for the cache")
        return original(self, *arguments)

    Decoder.logits = logits
    train(settings)


def test_a_rank_that_raises_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="rank 1 failed: ArithmeticError: a bit fell over"):
        spawn(train_with_a_broken_rank, 2, (runs.settings(tmp_path / "run", "parallel.tp=2"),), runs.DEADLINE)


def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """Within heartbeat_timeout, though its collectives may take hours; where rank 0 waited is written down."""
    folder = tmp_path / "run"
    patient = ["parallel.tp=2", "heartbeat_timeout=10", "collective_timeout=20000"]
    last = "(starting|(rollout|reward|logprobs|train|sync) of step 1)"  # or of the phase before
    with pytest.raises(RunError, match=f"rank 1 has shown no sign of life for .* it was last at {last}"):
        spawn(train_with_a_stopped_rank, 2, (runs.settings(folder, *patient),), runs.DEADLINE)
    assert "learner.py" in (folder / "logs" / "stacks_rank_0.txt").read_text()


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    """No deadline passes, nothing takes less than no time, both steps are saved and the run directory is free again.

    What Python code reads is played; C++ code (gloo, the store) is not, which has clocks of its own that never jump.
    """
    wanted = runs.settings(tmp_path / "run", "parallel.tp=1", "checkpoint.every=1")
    begun = time.monotonic()
    spawn(train_with_a_jumping_clock, 1, (wanted,), runs.DEADLINE)
    took = time.monotonic() - begun
    for line in read_metrics(wanted.run):
        assert all(0 <= value < took for name, value in line.items() if name.startswith("seconds_")), line
    spans = read_phases(wanted.run)
    assert spans and all(span.end is not None and 0 <= span.end - span.begin < took for span in spans)
    assert atomic.newest_good(wanted.run / "checkpoints", pytest.fail) == 2
    with only_job(wanted.run, pytest.fail):
        pass


def test_no_secret_reaches_the_run_directory(tmp_path: Path) -> None:
    """Keys and tokens of the environment, the engines' key among them: in no log, checkpoint or output of a run.

    What an engine of its own logs is shown in tests/engines/test_keys.py.
    """
    folder = tmp_path / "run"
    secrets = {
        name: f"secret-{i}-of-megarl"
        for i, name in enumerate(("MEGARL_TEST_KEY", "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))
    }
    small = [f"{name}={value}" for name, value in SMALL.items()]
    job = subprocess.run(
        [sys.executable, "-m", "megarl.cli", "train", str(runs.QUICKSTART / "train.yaml"), f"run={folder}", *small],
        env={**os.environ, **secrets},
        capture_output=True,
        timeout=runs.DEADLINE,
    )
    assert job.returncode == 0, job.stderr.decode()[-2000:]
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any("checkpoints" in name for name in files) and any("metrics" in name for name in files)
    said = files | {"stdout": job.stdout, "stderr": job.stderr}
    leaks = [(name, where) for where, text in said.items() for name, value in secrets.items() if value.encode() in text]
    assert not leaks


def test_an_engine_that_dies_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="local engine.*no room for the cache"):
        spawn(train_with_a_dying_engine, 1, (runs.settings(tmp_path / "run", "parallel.tp=1"),), runs.DEADLINE)


def test_a_grader_that_hangs_is_a_verdict_of_its_own(tmp_path: Path) -> None:
    """Each grade runs into its time limit, its worker is replaced, and the run goes on."""
    metrics = runs.run(
        runs.settings(
            tmp_path / "run",
            "parallel.tp=1",
            "steps=1",
            "reward.function=tests.support.graders:hang",
            "reward.timeout=0.2",
        )
    )
    assert metrics[0]["verdict_timeout"] == 16
    assert metrics[0]["accuracy"] == 0


def test_a_grader_that_always_fails_ends_the_run(tmp_path: Path) -> None:
    settings = runs.settings(tmp_path / "run", "parallel.tp=1", "reward.function=tests.support.graders:fail")
    with pytest.raises(RunError, match="every one of 16 grades failed.*the verifier is broken"):
        runs.run(settings)


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    """`megarl train` where another process is at work: one line that names it, exit code 2, nothing written."""
    folder = tmp_path / "run"
    with only_job(folder, print):
        job = subprocess.run(
            [sys.executable, "-m", "megarl.cli", "train", str(runs.QUICKSTART / "train.yaml"), f"run={folder}"]
            + ["parallel.tp=1"],
            capture_output=True,
            text=True,
            timeout=runs.DEADLINE,
        )
        held = [file.name for file in folder.iterdir()]
    refusals = [line for line in job.stderr.splitlines() if line.startswith("megarl: ")]
    assert refusals == [
        f"megarl: run: {folder} is in use by process {os.getpid()} on {socket.gethostname()}; "
        "end it, or name another folder"
    ]
    assert job.returncode == 2
    assert held == [".lock"]
