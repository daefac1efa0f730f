"""Ends the job, and says why, when a named wait exceeds its timeout or a rank stops sending its pulse.

Each rank writes its pulse (a counter, and what it is doing) into the rendezvous store every few seconds. Rank 0 reads
all pulses. The others read rank 0's pulse and the *verdict*: the message of the first rank that gave up. Each rank
measures ages with its own monotonic clock, so neither clock skew nor a clock jump matters. The clock stands while the
process is stopped. A second thread checks the
ages without the store, so it also notices when the store, and with it rank 0's node, is gone.

Before the job ends, every live rank appends the stacks of its threads to `logs/stacks_rank_<r>.txt` of the run.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megarl.errors import DeadlineExceeded, RanksLost, one_line
from megarl.runtime.clock import RunningClock

PERIOD = 5.0  # seconds between pulses, at most
LINGER = 2.0  # periods that a rank stays after its verdict, so that the others read it and write their stacks
MARGIN = 1.1  # of a wait's timeout: what waits (gloo, HTTP) has the same timeout, and should report first
TIMED_OUT = ("timed out", "timeout")  # in gloo's and NCCL's errors, in lower case
LEFT = ("connection closed", "connection reset", "broken pipe", "connection refused", "socket closed")


class Store(Protocol):
    """What is used of torch's rendezvous store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


def print_message(message: str) -> None:
    print(f"megarl: {message}", file=sys.stderr, flush=True)


announce: Callable[[str], None] = print_message
"""Called with the reason just before the watchdog ends this process. Whoever started the process may replace it."""


class Watchdog:
    """`with Watchdog(…)` on every rank, after all have joined the process group.

    `timeout`: seconds without a pulse after which a rank counts as stopped. `store` None: there are no other ranks.
    `folder`: where the stacks are written. `join`: a barrier, called after this rank's first pulse.
    """

    def __init__(
        self, rank: int, world_size: int, store: Any, timeout: float, folder: Path, join: Callable[[], None]
    ) -> None:
        self.rank, self.world_size, self.timeout, self.folder = rank, world_size, timeout, folder
        self.store: Store | None = store
        self._join = join
        self._period = pulse_period(timeout)
        self._clock = RunningClock(gap=self._period)
        self._doing = "starting"
        self._waits: list[tuple[str, float, float]] = []  # (what, seconds, until), of all threads
        self._seen: dict[int, tuple[bytes, float]] = {}  # rank → its last pulse, and when we first saw it
        self._contact = self._clock()  # when the store last answered
        self._verdict = ""
        self._stop = threading.Event()
        self._news = threading.Event()  # send the next pulse at once
        self._threads = [threading.Thread(target=self._look, name="watchdog", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._beat, name="pulse", daemon=True))

    @contextmanager
    def doing(self, what: str, seconds: float) -> Iterator[None]:
        """Name what this rank does, "train of step 3", in the others' messages. Each collective has `seconds`."""
        before, self._doing = self._doing, what
        self._news.set()
        with self._named(f"a collective of {what}", seconds):
            yield
        self._doing = before  # not on failure: the others should read where it failed

    @contextmanager
    def collective(self, name: str, seconds: float) -> Iterator[None]:
        """A collective of all ranks, which may take `seconds`. torch's own timeout is the same."""
        name = f"{name}, {self._doing}"
        with self.waiting(f"the other ranks in {name}", seconds), self._named(name, seconds):
            yield

    @contextmanager
    def waiting(self, what: str, seconds: float) -> Iterator[None]:
        """End the job, naming `what`, if the body takes longer than `seconds` and a margin."""
        wait = what, seconds, self._clock() + seconds * MARGIN
        self._waits.append(wait)
        try:
            yield
        finally:
            self._waits.remove(wait)  # maybe not the last one: other threads wait too

    @contextmanager
    def _named(self, what: str, seconds: float) -> Iterator[None]:
        """Turn torch's error for a timed-out collective into DeadlineExceeded, and for a broken one into RanksLost."""
        try:
            yield
        except RuntimeError as e:
            text = str(e).lower()
            if any(word in text for word in TIMED_OUT):
                raise DeadlineExceeded(f"the other ranks in {what}", seconds) from e
            if peer_left(e):
                raise RanksLost(f"another rank has left amid {what}") from e
            raise

    def __enter__(self) -> Watchdog:
        global _current
        if self.store is not None:
            self.store.set(pulse_key(self.rank), self._pulse(0))
            if self.rank == 0:
                self.store.set("verdict", "")
        self._join()
        for thread in self._threads:
            thread.start()
        _current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After a DeadlineExceeded: add what the other ranks were doing, write the stacks, and post the verdict."""
        global _current
        _current = None
        if isinstance(error, DeadlineExceeded) and not self._verdict:
            error.args = (f"{error}{self._others()}",)
            self._dump(str(error))
            self._tell(f"rank {self.rank}: {error}")
            self._stop.wait(LINGER * self._period if self.store is not None else 0)
        self._stop.set()
        self._news.set()

    # ---- the thread that talks to the store ----------------------------------------------------------------------

    def _beat(self) -> None:
        assert self.store is not None
        watched = range(1, self.world_size) if self.rank == 0 else [0]
        keys = ["verdict", *map(pulse_key, watched)]
        count, looked = 0, 0.0
        while not self._stop.is_set():
            self._news.wait(self._period)
            self._news.clear()
            count += 1
            with suppress(Exception):  # the store is gone: `_look` notices the age of `_contact`
                self.store.set(pulse_key(self.rank), self._pulse(count))
                if self._clock() - looked < self._period:
                    continue
                verdict, *pulses = self.store.multi_get(keys)
                self._contact = looked = self._clock()
                self._verdict = self._verdict or _text(verdict)
                for rank, pulse in zip(watched, pulses, strict=True):
                    if self._seen.get(rank, (b"", 0.0))[0] != pulse:
                        self._seen[rank] = (pulse, looked)

    # ---- the thread that looks -----------------------------------------------------------------------------------

    def _look(self) -> None:
        while not self._stop.wait(self._period / 2):
            self._clock.tick()
            now = self._clock()
            if self._verdict:
                self._end(self._verdict)
            if self.store is not None:
                self._check_pulses(now)
            for what, seconds, until in list(self._waits):
                if now > until:
                    self._give_up(f"rank {self.rank}: {DeadlineExceeded(what, seconds)}{self._others()}")

    def _check_pulses(self, now: float) -> None:
        silent = now - self._contact
        if silent > self.timeout:
            self._give_up(
                f"rank 0, or the rendezvous store beside it, has shown rank {self.rank} no sign of life for "
                f"{silent:.0f} s (heartbeat_timeout: {self.timeout:g}): it is stopped, or its node is gone; rank "
                f"{self.rank} was at {self._doing}"
            )
        # Ages at the store's last answer: a slow store or a busy machine makes no rank late.
        ages = [(rank, pulse, self._contact - seen) for rank, (pulse, seen) in list(self._seen.items())]
        late = [each for each in ages if each[2] > self.timeout]
        if late:
            rank, pulse, age = late[0]
            more = f" (and {len(late) - 1} more ranks)" if len(late) > 1 else ""
            self._give_up(
                f"rank {rank}{more} has shown no sign of life for {age:.0f} s (heartbeat_timeout: {self.timeout:g}): "
                f"it is stopped, or its node is gone; it was last at {_doing(pulse)}"
            )

    def _give_up(self, message: str) -> None:
        """End the job with `message`, or with the verdict of a rank that was first."""
        self._tell(message)
        self._end(self._verdict or message)

    def _end(self, verdict: str) -> None:
        self._dump(verdict)
        time.sleep(LINGER * self._period if self.store is not None else 0)  # the others read it and write their stacks
        announce(verdict)
        os._exit(1)

    def _tell(self, verdict: str) -> None:
        """Post the verdict, unless there is one."""
        if self.store is not None:
            standing = _within(lambda store: store.compare_set("verdict", "", verdict), self.store)
            self._verdict = _text(standing) if standing else verdict

    def _others(self) -> str:
        """What the ranks that do something else were last doing."""
        if self.store is None:
            return ""
        keys = [pulse_key(rank) for rank in range(self.world_size)]
        pulses = _within(lambda store: store.multi_get(keys), self.store) or []
        elsewhere = [
            (rank, _doing(p)) for rank, p in enumerate(pulses) if rank != self.rank and _doing(p) != self._doing
        ]
        named = "".join(f"; rank {rank} was at {doing}" for rank, doing in elsewhere[:4])
        return named + (f"; {len(elsewhere) - 4} more were elsewhere" if len(elsewhere) > 4 else "")

    def _dump(self, cause: str) -> None:
        with suppress(OSError):  # a full disk must not prevent the end
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"stacks_rank_{self.rank}.txt").open("a") as file:
                file.write(f"{cause}\nrank {self.rank} is at {self._doing}; the stacks of its threads:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")

    def _pulse(self, count: int) -> str:
        return f"{count}|{self._doing}"


_current: Watchdog | None = None


def waiting(what: str, seconds: float) -> AbstractContextManager[None]:
    """`Watchdog.waiting` of this process's watchdog. Without one, only runs the body."""
    return _current.waiting(what, seconds) if _current else nullcontext()


def doing(what: str, seconds: float) -> AbstractContextManager[None]:
    """`Watchdog.doing` of this process's watchdog. Without one, only runs the body."""
    return _current.doing(what, seconds) if _current else nullcontext()


def collective(name: str, seconds: float) -> AbstractContextManager[None]:
    """`Watchdog.collective` of this process's watchdog. Without one, only runs the body."""
    return _current.collective(name, seconds) if _current else nullcontext()


def _within(work: Callable[[Store], Any], store: Store, seconds: float = 2.0) -> Any:
    """The result of `work(store)`, or None if the store does not answer in time."""
    results: list[Any] = []

    def attempt() -> None:
        with suppress(Exception):
            results.append(work(store))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def peer_left(error: BaseException) -> bool:
    """Whether this is torch's error for a rank that has gone: a consequence, anywhere in the job."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LEFT)


def place() -> str:
    """What this process does, in words."""
    return _current._doing if _current else "its start"


def pulse_period(timeout: float) -> float:
    """Seconds between pulses, where `timeout` seconds without one end the job."""
    return min(PERIOD, timeout / 5)


def pulse_key(rank: int) -> str:
    """Where the store has a rank's pulse."""
    return f"pulse/{rank}"


def _doing(pulse: bytes) -> str:
    return _text(pulse).partition("|")[2]


def _text(message: bytes) -> str:
    """From the store. torchrun's and srun's answer whoever reaches them."""
    return one_line(message.decode("utf-8", "replace"))
