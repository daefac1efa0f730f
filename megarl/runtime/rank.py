"""The main function of a rank's process: runs the target, sends pulses and the result, and ends with its starter."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megarl.errors import RanksLost, RunError, UserError, printable
from megarl.runtime import watchdog
from megarl.runtime.interrupt import SIGNALS, Interrupt
from megarl.runtime.output import outlive_reader
from megarl.runtime.seal import seal_objects
from megarl.runtime.tether import die_with_parent

STACKS = signal.SIGUSR2
"""Makes a rank write the stacks of its threads, even while its interpreter is stuck."""


@dataclass
class Heartbeat:
    """Ranks are ended when they send no pulse for `timeout` seconds. Their stacks then go to the folder `logs`."""

    timeout: float
    logs: Path


_sending = threading.Lock()


def main(
    pipe: Connection,
    stacks: Connection,
    environment: dict[str, str],
    key: bytes,
    heartbeat: Heartbeat | None,
    saves: bool,
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """`key`: the run's, see seal.py. `saves`: signals are for the target's `Interrupt`, and never end this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if saves:
        Interrupt().__enter__()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    faulthandler.register(STACKS, stacks.fileno(), all_threads=True)
    die_with_parent(os.getppid())
    die_with_reader(pipe)
    os.setpgid(0, 0)  # a terminal's Ctrl-C then reaches only the parent, which passes it on
    os.environ.clear()
    os.environ.update(environment)
    seal_objects(key)
    if heartbeat:
        outlive_reader(heartbeat.logs)
    watchdog.announce = lambda verdict: _send(pipe, ("verdict", verdict))
    _send(pipe, ("pulse", watchdog.place()))
    threading.Thread(target=_beat, args=(pipe, heartbeat), name="pulse to the launcher", daemon=True).start()
    message = _outcome(target, args)
    _send(pipe, message)  # before the connections to other ranks close, so that the parent hears the cause first
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if torch.distributed.is_initialized() and message[0] == "done":
        torch.distributed.destroy_process_group()
    os._exit(0 if message[0] == "done" else 1)


def _outcome(target: Callable[..., Any], args: tuple[Any, ...]) -> tuple[str, Any]:
    """Run the target. What became of it, for the launcher."""
    try:
        return "done", target(*args)
    except KeyboardInterrupt:
        return "interrupted", None
    except UserError as e:
        return "user", str(e)
    except RunError as e:
        return "lost" if isinstance(e, RanksLost) else "run", str(e)
    except BaseException as e:
        if watchdog.peer_left(e):
            return "lost", f"another rank has left amid {watchdog.place()}"
        print(printable(traceback.format_exc()), file=sys.stderr)
        return "raised", ("".join(traceback.format_exception_only(e)).strip(), traceback.format_exc())


def _send(pipe: Connection, message: tuple[str, Any]) -> None:
    """Uses plain pickle, which copies tensors. multiprocessing's would pass handles that die with this process."""
    with _sending, contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps(message))


def _beat(pipe: Connection, heartbeat: Heartbeat | None) -> None:
    pause, period = threading.Event(), watchdog.pulse_period(heartbeat.timeout if heartbeat else math.inf)
    while True:
        pause.wait(period)
        _send(pipe, ("pulse", watchdog.place()))


def die_with_reader(pipe: Connection) -> None:
    """Kill this process when the reading end of `pipe` closes, that is when the process that called `spawn` ends.

    The kernel's tie to the fork server does the same, but the fork server may have ended before this rank asked for it.
    """
    poll = select.poll()
    poll.register(pipe.fileno(), 0)  # 0: report only errors

    def watch() -> None:
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()
