"""`megarl tail RUN`: watches a run from outside, by reading its files on this machine or a shared disk."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megarl import config
from megarl.errors import DeadlineExceeded, UserError
from megarl.run.changes import CONFIG
from megarl.run.records import LARGEST, METRICS, damaged, metrics_of, rollout_lines, rollouts_files
from megarl.run.timeline import read_phases
from megarl.view.console import console, plain
from megarl.view.live import LiveView, line

POLL = 0.5  # seconds between reads
KEYS = "r: last rollouts   q: leave"


class Follower:
    """Reads metrics.jsonl as it grows, without a line that is still being written."""

    def __init__(self, run: Path) -> None:
        self.run, self._at, self._inode, self._lines = run, 0, 0, 0

    def new(self) -> list[dict[str, Any]]:
        """The steps since the last call. All steps if a resumed run has rewritten the file. UserError names a damaged
        line."""
        file = self.run / METRICS
        with damaged(file), suppress(FileNotFoundError), file.open("rb") as stream:
            status = file.stat()
            if status.st_ino != self._inode or status.st_size < self._at:
                self._inode, self._at, self._lines = status.st_ino, 0, 0
            stream.seek(self._at)
            whole = stream.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            self._at += len(whole)
            lines = list(enumerate(whole.split(b"\n")[:-1], start=self._lines + 1))
            self._lines += len(lines)
            return [metrics_of(raw, file, n) for n, raw in lines]
        return []

    def total(self) -> int:
        """The run's setting `steps`. 0 before the run has written them. UserError if they are damaged."""
        file = self.run / CONFIG
        if not file.is_file():
            return 0
        steps = config.tree(file).get("steps", 0)
        if type(steps) is not int or not 0 <= steps < LARGEST:
            raise UserError(f"{file}: damaged: steps is {steps!r:.40}, not a number of steps")
        return steps


def tail(run: Path, rollouts: int, once: bool, start_timeout: float = 600.0) -> None:
    """Follow a run until its last step.

    `rollouts`: how many responses to show of each step, or of the newest step when a key asks for them. `once`: show
    what there is and return. Raises DeadlineExceeded if the run has not begun after `start_timeout` seconds.
    """
    terminal, follower = console(), Follower(run)
    until = time.monotonic() + (0 if once else start_timeout)
    while not (total := follower.total()):
        if time.monotonic() >= until:
            raise DeadlineExceeded(f"{run} to begin (config.yaml)", 0 if once else start_timeout)
        time.sleep(POLL)
    if once or not (terminal.is_terminal and sys.stdin.isatty()):
        _plain(terminal, follower, total, rollouts, once)
    else:
        _live(terminal, follower, total, rollouts or 3)


def _plain(console: Console, follower: Follower, total: int, rollouts: int, once: bool) -> None:
    done = -1
    while True:
        for metrics in follower.new():
            done = metrics["step"]
            console.print(line(done, total, metrics), soft_wrap=True)
            if rollouts:
                console.print(newest(follower.run, rollouts, step=done))
            if metrics.get("ended"):
                done = total
        if once or done >= total:
            return
        time.sleep(POLL)


def _live(console: Console, follower: Follower, total: int, rollouts: int) -> None:
    view = LiveView(total, hint=KEYS)
    with _single_keys(), Live(view, console=console, refresh_per_second=4):
        while view.done < total:
            for metrics in follower.new():
                view.step(metrics["step"], metrics)
                if metrics.get("ended"):
                    console.print(metrics["ended"], markup=False)
                    return
            spans = [span for span in read_phases(follower.run) if span.rank == 0]
            if spans:  # step 0 is each start's, also after a resume
                view.since(max((span.begin for span in spans if span.step == 0), default=spans[0].begin))
            if running := [span for span in spans if span.end is None]:
                view.phase(running[-1].phase)
            key = _key(POLL)
            if key == "q":
                return
            if key == "r":
                console.print(newest(follower.run, rollouts))


def newest(run: Path, count: int, step: int | None = None) -> Group:
    """The first `count` responses of a step (default: the newest), each with its verdict and reward."""
    files = rollouts_files(run)
    file = files.get(max(files, default=0) if step is None else step)
    if file is None:
        return Group()
    blocks: list[Text] = []
    for _, record in islice(rollout_lines(file), count):
        head = f"{record['verdict']}  reward {record['reward']:.3f}  advantage {record['advantage']:+.3f}"
        style = "blue" if record["verdict"] == "right" else "yellow"
        size = f"{record['exit_reason']}, {len(record['response_ids'])} tokens"
        blocks.append(plain(f"── {head}  {size}", style))
        blocks.append(plain(record["prompt"].strip() + " ", "dim") + plain(record["response"].strip()))
    return Group(*blocks, Text())


@contextmanager
def _single_keys() -> Iterator[None]:
    """In the body, keys arrive at once and are not echoed. Restores the terminal afterwards."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _key(seconds: float) -> str:
    """The key pressed within `seconds`, or ""."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    return sys.stdin.read(1) if ready else ""
