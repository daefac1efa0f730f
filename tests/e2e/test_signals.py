"""`megarl train` asked to leave, by a signal to any of its processes at any time: saved, exit code 75, nothing left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megarl import config
from megarl.errors import Stopped
from megarl.run import atomic
from megarl.run.directory import read_metrics
from megarl.run.timeline import read_phases
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel, pytest.mark.slow]

Start = Callable[..., subprocess.Popen[str]]
LONG = ("parallel.tp=2", "steps=5000", "pruning={completions: 0.5}")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts runs, which end with the test."""
    jobs: list[subprocess.Popen[str]] = []

    def begin(run: Path, *overrides: str) -> subprocess.Popen[str]:
        jobs.append(launch(run, *overrides))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()
        job.wait()


def launch(run: Path, *overrides: str) -> subprocess.Popen[str]:
    wanted = runs.settings(run, *overrides)
    file = run.with_suffix(".yaml")
    file.write_text(config.dump(wanted))
    command = [sys.executable, "-m", "megarl.cli", "train", str(file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], object], job: subprocess.Popen[str]) -> None:
    pause, until = threading.Event(), time.monotonic() + runs.DEADLINE
    while not condition():
        assert job.poll() is None, "the run ended"
        assert time.monotonic() < until, f"did not happen within {runs.DEADLINE:g} s"
        pause.wait(0.02)


def steps(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").is_file() else 0


def ranks(job: subprocess.Popen[str]) -> list[int]:
    """Process ids, in the order of their start. What ends meanwhile is no rank."""
    found: dict[int, float] = {}
    for child in psutil.Process(job.pid).children():
        with suppress(psutil.NoSuchProcess):  # a zombie is one too
            if "forkserver" in " ".join(child.cmdline()):
                found |= {rank.pid: rank.create_time() for rank in child.children()}
    return sorted(found, key=found.__getitem__)


def finish(job: subprocess.Popen[str], act: Callable[[], None]) -> str:
    """Act, and return what the run printed since. It must end with nothing left behind."""
    family = [os.pidfd_open(process.pid) for process in psutil.Process(job.pid).children(recursive=True)]
    act()
    _, said = job.communicate(timeout=runs.DEADLINE)
    until = time.monotonic() + runs.DEADLINE
    while family:
        readable, _, _ = select.select(family, [], [], max(0.0, until - time.monotonic()))
        assert readable, f"{len(family)} processes are left"
        family = [end for end in family if end not in readable]
    return said


@pytest.mark.parametrize("target", ["launcher", "group", "one rank, then Ctrl-C"])
def test_a_signal_in_mid_training_saves(start: Start, tmp_path: Path, target: str) -> None:
    """Proves that the step that was going on is finished and saved, and that the run can go on from it."""
    folder = tmp_path / "run"
    job = start(folder, *LONG)
    wait_for(lambda: steps(folder) >= 2, job)

    def ask() -> None:
        if target == "launcher":
            job.send_signal(signal.SIGTERM)
        elif target == "group":
            os.killpg(job.pid, signal.SIGUSR1)
        else:
            os.kill(ranks(job)[1], signal.SIGTERM)
            os.killpg(job.pid, signal.SIGINT)

    said = finish(job, ask)
    assert job.returncode == Stopped.EXIT_CODE, said
    assert atomic.newest_good(folder / "checkpoints", pytest.fail) == steps(folder)
    assert f"stopped after step {steps(folder)}, saved; continue with --resume" in said


def test_a_signal_while_ranks_start_ends_the_run_early(start: Start, tmp_path: Path) -> None:
    """As soon as the first rank exists: it is in its imports, or meets the others."""
    folder = tmp_path / "run"
    job = start(folder, *LONG)
    wait_for(lambda: ranks(job), job)
    said = finish(job, lambda: os.killpg(job.pid, signal.SIGTERM))
    assert job.returncode == Stopped.EXIT_CODE, said
    assert steps(folder) == 0 and "Traceback" not in said


def test_a_second_ctrl_c_ends_the_run_at_once(start: Start, tmp_path: Path) -> None:
    """In a step that takes long. Signals that come together count as one, so it is sent until the run ends."""
    folder = tmp_path / "run"
    job = start(folder, *LONG, "batch.prompts_per_step=512")
    wait_for(lambda: any(span.phase == "rollout" for span in read_phases(folder)), job)

    def ask_twice() -> None:
        pause = threading.Event()
        while job.poll() is None:
            job.send_signal(signal.SIGINT)
            pause.wait(0.2)

    said = finish(job, ask_twice)
    assert job.returncode in (128 + signal.SIGINT, -signal.SIGINT), said  # a shell shows both as 130


def test_training_goes_on_without_a_reader(start: Start, tmp_path: Path) -> None:
    """`megarl train … 2>&1 | head -1`: the run is finished, and its log is in the run folder."""
    folder = tmp_path / "run"
    job = start(folder, "parallel.tp=1", "steps=3")
    assert job.stderr is not None
    job.stderr.readline()
    job.stderr.close()
    assert job.wait(runs.DEADLINE) == 0
    kept = (folder / "logs" / "output.txt").read_text()
    assert steps(folder) == 3
    assert "step 3/3" in kept and "where to look next" in kept
