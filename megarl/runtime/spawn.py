"""Ranks on this machine: starts them, waits for them, and ends all when one fails."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import FrameType
from typing import Any

from megarl.errors import DeadlineExceeded, RanksLost, RunError, UserError
from megarl.runtime import device, fork_server, rank, seal
from megarl.runtime.clock import RunningClock
from megarl.runtime.interrupt import Interrupt, blocked
from megarl.runtime.rank import Heartbeat
from megarl.runtime.store import VARIABLE, LocalStore

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
TICK = 1.0  # seconds between two looks at the pulses
START_TIMEOUT = 120.0  # seconds more for the first pulse, before which a rank imports what it runs
START = "its start"
STACKS_TIMEOUT = 2.0  # seconds for a rank to write its stacks
PRELOAD = ["megarl.runtime.fork_server", "megarl.learner.learner"]
"""Imported once, in the clean process from which CPU ranks are forked."""


@dataclass
class Rank:
    """A rank's process, seen from the launcher."""

    number: int
    process: Any
    messages: Connection
    stacks: Connection
    heard: float  # when, by the launcher's clock
    place: str = ""  # where its last pulse was sent


def spawn(
    target: Callable[..., Any],
    nproc: int,
    args: Sequence[Any] = (),
    timeout: float | None = None,
    *,
    saves: bool = False,
    heartbeat: Heartbeat | None = None,
) -> list[Any]:
    """Run `target(*args)` in `nproc` new processes with torchrun's variables. Returns the results, by rank.

    `target`, `args` and the results must be picklable, and the caller's entry point needs a `__main__` guard. Call it
    from the main thread: the kernel ties the ranks to the thread that starts them.
    The first failure ends the other ranks and is raised here: UserError unchanged, anything else as RunError.
    `saves`: the target listens by an `Interrupt`. The first Ctrl-C, SIGTERM or SIGUSR1 is then passed on to the ranks,
    whenever it comes. A second Ctrl-C, or the first without `saves`, ends them at once. Ctrl-Z stops the ranks too.
    Raises DeadlineExceeded after `timeout` seconds. The ranks die with this process, however it ends.
    """
    ranks: list[Rank] = []
    clock = RunningClock(2 * TICK)
    store = LocalStore()
    grace = 0.0
    try:
        for each in _start(target, nproc, tuple(args), store, clock, saves, heartbeat):
            ranks.append(each)
        with _pausing(ranks), _passing_on(ranks) if saves else contextlib.nullcontext():
            results = _collect(ranks, clock, timeout, heartbeat)
        grace = GRACE
        for each in ranks:
            each.process.join(GRACE)
        return results
    except (UserError, RunError):
        grace = GRACE  # the others may close what they have open
        raise
    finally:
        _end([each.process for each in ranks], grace)
        for each in ranks:
            each.messages.close()
            each.stacks.close()
        store.close()


def _start(
    target: Callable[..., Any],
    nproc: int,
    args: tuple[Any, ...],
    store: LocalStore,
    clock: RunningClock,
    saves: bool,
    heartbeat: Heartbeat | None,
) -> Iterator[Rank]:
    """Start the ranks one after the other. Signals to them wait until they listen."""
    device.check_ranks(nproc)
    context, key = process_context(), os.urandom(seal.SIZE)
    for number in range(nproc):
        ours, theirs = context.Pipe(duplex=False)
        stacks, their_stacks = context.Pipe(duplex=False)
        environment = {**os.environ, **_environment(number, nproc, store)}  # the fork server's may be outdated
        arguments = (theirs, their_stacks, environment, key, heartbeat, saves, target, args)
        process = context.Process(target=rank.main, args=arguments, name=f"rank {number}")  # type: ignore[attr-defined]
        waiting = blocked() if saves and isinstance(context, SpawnContext) else contextlib.nullcontext()
        with waiting, device.exported():  # a spawned rank imports the learner before it gets its environment
            process.start()
        theirs.close()
        their_stacks.close()
        clock.tick()
        yield Rank(number, process, ours, stacks, clock())


def process_context(preload: Sequence[str] = ()) -> SpawnContext | ForkServerContext:
    """How new processes start here: forked from a clean one on a CPU, afresh on CUDA.

    `preload`: what the clean process imports besides `PRELOAD`, if it is not there yet.
    """
    if device.on_cuda():  # a process that has touched CUDA cannot be forked
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload])
    os.environ[fork_server.STARTER] = str(os.getpid())
    try:
        # A signal to our process group must end neither the fork server nor multiprocessing's resource tracker. To
        # start the tracker unblocks signals, so it comes first.
        for helper in (resource_tracker, forkserver):
            with blocked(), device.exported():  # the fork server imports the learner
                helper.ensure_running()
    finally:
        del os.environ[fork_server.STARTER]
    return context


def _environment(number: int, nproc: int, store: LocalStore) -> dict[str, str]:
    """The variables that torchrun sets, but the rendezvous store is our file."""
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        VARIABLE: store.path,
        device.VARIABLE: "cuda" if device.on_cuda() else "cpu",
    }


@contextlib.contextmanager
def _passing_on(ranks: list[Rank]) -> Iterator[None]:
    """Pass the first signal on. As SIGTERM, because a rank may have had a Ctrl-C already."""
    interrupt = Interrupt(lambda: _signal(ranks, signal.SIGTERM))
    if interrupt.asked:
        _signal(ranks, signal.SIGTERM)
    with interrupt:
        yield


@contextlib.contextmanager
def _pausing(ranks: list[Rank]) -> Iterator[None]:
    """On Ctrl-Z stop the ranks too, and let them go on with us."""

    def pause(number: int, frame: FrameType | None) -> None:
        _signal(ranks, signal.SIGSTOP, group=True)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # returns when we go on
        _signal(ranks, signal.SIGCONT, group=True)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTSTP, pause)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _signal(ranks: list[Rank], number: signal.Signals, group: bool = False) -> None:
    for each in ranks:
        if each.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(each.process.pid, number)


def _collect(ranks: list[Rank], clock: RunningClock, timeout: float | None, heartbeat: Heartbeat | None) -> list[Any]:
    """The results by rank. Raises the first failure, or DeadlineExceeded."""
    results: dict[int, Any] = {}
    until = math.inf if timeout is None else time.monotonic() + timeout
    interrupted = False
    consequence: RanksLost | None = None
    while len(results) < len(ranks):
        waiting = {each.messages: each for each in ranks if each.number not in results}
        ready = wait(list(waiting), max(0.0, min(TICK, until - time.monotonic())))
        clock.tick()
        if not ready and time.monotonic() >= until:
            if consequence:
                raise consequence
            missing = ", ".join(str(each.number) for each in waiting.values())
            assert timeout is not None  # without one, and with no rank lost, there is no limit
            raise DeadlineExceeded(f"rank {missing} of {len(ranks)} to finish", timeout)
        for each in [waiting[pipe] for pipe in ready if isinstance(pipe, Connection)]:
            each.heard = clock()
            try:
                kind, value = _receive(each)
            except RanksLost as e:  # the lost rank may be ours, and then its message names the cause
                kind, value = "lost", None
                consequence = consequence or e
                until = min(until, time.monotonic() + GRACE)
            if kind == "pulse":
                each.place = value
                continue
            interrupted |= kind == "interrupted"
            results[each.number] = value
        if heartbeat:
            _check_pulses([each for each in ranks if each.number not in results], clock(), heartbeat)
    if consequence:
        raise consequence
    if interrupted:
        raise KeyboardInterrupt
    return [results[number] for number in range(len(ranks))]


def _receive(sender: Rank) -> tuple[str, Any]:
    """A rank's next message. Raises if it failed; the exception has the rank's traceback as a note."""
    number, process = sender.number, sender.process
    try:
        kind, value = pickle.loads(sender.messages.recv_bytes())
    except EOFError:
        process.join(GRACE)
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"left with exit code {code}"
        raise RunError(f"rank {number} {how}") from None
    if kind == "user":
        raise UserError(value)
    if kind in ("run", "lost"):
        raise (RunError if kind == "run" else RanksLost)(f"rank {number}: {value}")
    if kind == "verdict":
        raise RunError(value)
    if kind == "raised":
        line, trace = value
        error = RunError(f"rank {number} failed: {line}")
        error.add_note(trace)
        raise error
    return kind, value


def _check_pulses(ranks: list[Rank], now: float, heartbeat: Heartbeat) -> None:
    """Raise RunError if no rank has sent a pulse in time. A single silent rank is first left to the other ranks."""
    silent = [each for each in ranks if now - each.heard > heartbeat.timeout + (0 if each.place else START_TIMEOUT)]
    if not silent or (len(silent) < len(ranks) and all(now - each.heard < 2 * heartbeat.timeout for each in silent)):
        return
    said = [f"rank {each.number} ({_state(each)}, last at {each.place or START})" for each in silent[:4]]
    more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
    written = [each for each in silent if _write_stacks(each, heartbeat.logs)]
    raise RunError(
        f"no sign of life for {now - max(each.heard for each in silent):.0f} s (heartbeat_timeout: "
        f"{heartbeat.timeout:g}) from {', '.join(said)}{more}"
        + (f"; the stacks are in {heartbeat.logs}" if written else "")
    )


def _state(silent: Rank) -> str:
    """What the kernel says of a rank that is silent."""
    try:
        state = Path(f"/proc/{silent.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting for a device"}.get(state, "stuck")


def _write_stacks(silent: Rank, logs: Path) -> bool:
    """Have a rank write its stacks, and go on for it if it is stopped. Whether it did."""
    for number in (rank.STACKS, signal.SIGCONT):
        _signal([silent], number)
    head = f"no pulse reached the launcher; last at {silent.place or START}; the stacks:\n"
    text = b""
    while wait([silent.stacks], STACKS_TIMEOUT if not text else STACKS_TIMEOUT / 10):
        if not (more := os.read(silent.stacks.fileno(), 1 << 16)):
            break
        text += more
    with contextlib.suppress(OSError):  # a full disk must not prevent the end
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"stacks_rank_{silent.number}.txt").open("ab") as file:
            file.write(head.encode() + text + b"\n")
    return bool(text)


def _end(processes: list[Any], grace: float) -> None:
    for stop, seconds in (("terminate", grace), ("kill", GRACE)):
        if not seconds:
            continue
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            getattr(process, stop)()
        until = time.monotonic() + seconds
        for process in alive:
            process.join(max(0.0, until - time.monotonic()))
