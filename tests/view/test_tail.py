"""Watching a run from outside. Not proven: how the live view looks on every terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from megarl.errors import DeadlineExceeded
from megarl.view.live import LiveView, clock, headline
from megarl.view.tail import Follower, tail


def begin(run: Path, steps: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(f"steps: {steps}\n")
    (run / "rollouts").mkdir(exist_ok=True)


def add(run: Path, step: int) -> None:
    record = {
        "verdict": "right", "reward": 1.0, "advantage": 0.5, "exit_reason": "plain", "response_ids": [1, 2],
        "prompt": f"question {step} [bold]", "response": f"answer {step} \x1b[2J", "uid": "a", "index": 0,
        "source": "f:1", "prompt_ids": [1], "origin": [0, 0], "logprobs": [-1.0, -1.0], "finish": "stop", "probes": [],
        "spans": [], "formatted": True, "steps": 1, "weight": 1.0, "keep": 1.0,
    }  # fmt: skip
    (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(json.dumps(record) + "\n")
    with (run / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": step, "reward": step / 10, "seconds_total": 2.0}) + "\n")


def test_every_step_is_told_once_also_while_lines_are_being_written(tmp_path: Path) -> None:
    begin(tmp_path, 9)
    follower = Follower(tmp_path)
    assert follower.new() == []
    add(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 2, ')
    assert [m["step"] for m in follower.new()] == [1]
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('"reward": 1}\n')
    assert [m["step"] for m in follower.new()] == [2]
    partial = tmp_path / "metrics.partial"  # a resumed run replaces the file
    partial.write_text('{"step": 1}\n')
    partial.replace(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in follower.new()] == [1]


def test_plain_lines_end_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters and markup of a response reach the terminal as nothing but text."""
    begin(tmp_path, 2)
    for step in (1, 2):
        add(tmp_path, step)
    tail(tmp_path, rollouts=1, once=False)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("step")][1].startswith("step 2/2  reward 0.200")
    assert "question 1 [bold]" in shown and "answer 2" in shown and "\x1b" not in shown


def test_a_run_that_is_over_early_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path, 9)
    add(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 2, "reward": 1, "ended": "nothing is left to learn"}\n')
    tail(tmp_path, rollouts=0, once=False)
    assert "step 2/9" in capsys.readouterr().out


def test_a_score_that_is_the_accuracy_is_not_shown_twice() -> None:
    assert headline({"accuracy": 0.5, "score": 0.5, "eval/accuracy": 1.0, "eval/score": 1.0}).count("score") == 0
    assert headline({"accuracy": 0.5, "score": 7.5}) == "acc 0.500 score 7.500"


def test_a_run_that_never_begins_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="to begin"):
        tail(tmp_path, 0, once=True)


def test_the_time_left_is_the_median_step_times_what_is_left() -> None:
    view = LiveView(10)
    assert view.seconds_left is None
    for step, seconds in ((1, 2.0), (2, 90.0), (3, 2.0)):
        view.step(step, {"reward": 0.5, "seconds_total": seconds, "seconds_rollout": seconds * 0.75})
    assert view.seconds_left == 2.0 * 7
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(view)
    assert "step 3/10" in capture.get() and "0:14 left" in capture.get() and "rollout 75%" in capture.get()
    assert clock(3725) == "1:02:05"


def test_on_a_terminal_r_shows_the_last_rollouts_and_the_view_ends_with_the_run(tmp_path: Path) -> None:
    """A real pseudo-terminal: the key is answered before the last step is written, which then ends the command. The
    clock counts from the run's newest start."""
    begin(tmp_path, 2)
    now = time.time()
    phases = [["B", "sync", 0, now - 90000], ["E", "sync", 0, now - 89999], ["B", "rollout", 1, now - 89998]]
    phases += [["B", "sync", 0, now - 3730], ["E", "sync", 0, now - 3725], ["B", "rollout", 1, now - 3700]]
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "rank_00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in phases))
    add(tmp_path, 1)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "megarl.cli", "tail", str(tmp_path)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        os.set_blocking(ours, False)

        def read_until(text: bytes) -> None:
            nonlocal seen
            until = time.monotonic() + 60
            while text not in seen:
                assert time.monotonic() < until and process.poll() is None, seen.decode(errors="replace")
                try:
                    seen += os.read(ours, 65536)
                except BlockingIOError:
                    time.sleep(0.02)

        read_until(b"step 1/2")
        read_until(b"1:02:")
        os.write(ours, b"r")
        read_until(b"answer 1")
        add(tmp_path, 2)
        until = time.monotonic() + 60
        while process.poll() is None:
            assert time.monotonic() < until
            try:
                seen += os.read(ours, 65536)
            except (BlockingIOError, OSError):
                time.sleep(0.02)
        assert process.returncode == 0
    os.close(ours)
