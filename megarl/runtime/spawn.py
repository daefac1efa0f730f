"""Ranks on this machine: starts them, waits for them, and ends all when one fails."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any

import torch

from megarl.errors import DeadlineExceeded, RanksLost, RunError, UserError
from megarl.runtime import device, watchdog

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
PRELOAD = ["megarl.learner.learner"]  # imported once, in the clean process from which CPU ranks are forked


def spawn(target: Callable[..., Any], nproc: int, args: Sequence[Any] = (), timeout: float | None = None) -> list[Any]:
    """Run `target(*args)` in `nproc` new processes with torchrun's variables. Returns the results, by rank.

    `target`, `args` and the results must be picklable, and the caller's entry point needs a `__main__` guard.
    The first failure ends the other ranks and is raised here: UserError unchanged, anything else as RunError.
    The first Ctrl-C is passed on to the ranks, so that they can save and leave. A second one ends them.
    Raises DeadlineExceeded after `timeout` seconds. The ranks die with this process, however it ends.
    """
    store, port = _store()
    context: SpawnContext | ForkServerContext
    if device.on_cuda():  # a process that has touched CUDA cannot be forked
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
    ranks = []
    try:
        for rank in range(nproc):
            ours, theirs = context.Pipe(duplex=False)
            environment = {**os.environ, **_environment(rank, nproc, port)}  # the fork server's may be outdated
            process = context.Process(target=_run, args=(theirs, environment, target, tuple(args)), name=f"rank {rank}")
            process.start()
            theirs.close()
            ranks.append((process, ours))
        results = _collect(ranks, timeout)
        for process, _ in ranks:
            process.join(GRACE)
        return results
    finally:
        _end([process for process, _ in ranks])
        for _, pipe in ranks:
            pipe.close()
        del store


def _store() -> tuple[torch.distributed.TCPStore, int]:
    """The rendezvous store and its port: a loopback port that we bind first, so that nobody else can take it."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = torch.distributed.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def _environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store runs in the parent
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
    }


def _run(pipe: Connection, environment: dict[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The main function of a rank's process."""
    _die_with_parent(pipe)
    os.setpgid(0, 0)  # a terminal's Ctrl-C then reaches only the parent, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    watchdog.announce = lambda verdict: _send(pipe, ("verdict", verdict))
    try:
        message = ("done", target(*args))
    except KeyboardInterrupt:
        message = ("interrupted", None)
    except UserError as e:
        message = ("user", str(e))
    except RunError as e:
        message = ("lost" if isinstance(e, RanksLost) else "run", str(e))
    except BaseException as e:
        traceback.print_exc()
        message = ("raised", ("".join(traceback.format_exception_only(e)).strip(), traceback.format_exc()))
    _send(pipe, message)  # before the connections to other ranks close, so that the parent hears the cause first
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.is_initialized() and message[0] == "done":
        torch.distributed.destroy_process_group()
    os._exit(0 if message[0] == "done" else 1)


def _send(pipe: Connection, message: tuple[str, Any]) -> None:
    """Uses plain pickle, which copies tensors. multiprocessing's would pass handles that die with this process."""
    with contextlib.suppress(BrokenPipeError):
        pipe.send_bytes(pickle.dumps(message))


def _die_with_parent(pipe: Connection) -> None:
    """Kill this process when the reading end of `pipe` closes, that is when the process that called `spawn` ends.

    The kernel's signal on a parent's death does not help: our parent is the fork server, which outlives the caller.
    """
    poll = select.poll()
    poll.register(pipe.fileno(), 0)  # 0: report only errors

    def watch() -> None:
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _collect(ranks: list[tuple[Any, Connection]], timeout: float | None) -> list[Any]:
    """The results by rank. Raises the first failure, or DeadlineExceeded."""
    results: dict[int, Any] = {}
    until = None if timeout is None else time.monotonic() + timeout
    interrupts = 0
    interrupted = False
    consequence: RanksLost | None = None
    while len(results) < len(ranks):
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(ranks) if rank not in results}
        left = None if until is None else max(0.0, until - time.monotonic())
        try:
            ready = wait(list(waiting), left)
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts > 1:
                raise
            for process, _ in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
            continue
        if not ready:
            if consequence:
                raise consequence
            missing = ", ".join(str(rank) for rank in waiting.values())
            assert timeout is not None  # without one, and with no rank lost, `wait` returns only with a message
            raise DeadlineExceeded(f"rank {missing} of {len(ranks)} to finish", timeout)
        for rank in [rank for pipe, rank in waiting.items() if pipe in ready]:
            try:
                kind, value = _receive(rank, *ranks[rank])
            except RanksLost as e:  # the lost rank may be ours, and then its message names the cause
                kind, value = "lost", None
                consequence = consequence or e
                until = min(until or math.inf, time.monotonic() + GRACE)
            if kind == "interrupted":
                interrupted = True
            results[rank] = value
    if consequence:
        raise consequence
    if interrupted:
        raise KeyboardInterrupt
    return [results[rank] for rank in range(len(ranks))]


def _receive(rank: int, process: Any, pipe: Connection) -> tuple[str, Any]:
    """The message of a rank that finished. Raises if it failed; the exception has the rank's traceback as a note."""
    try:
        kind, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(GRACE)
        code = process.exitcode
        how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"left with exit code {code}"
        raise RunError(f"rank {rank} {how}") from None
    if kind == "user":
        raise UserError(value)
    if kind in ("run", "lost"):
        raise (RunError if kind == "run" else RanksLost)(f"rank {rank}: {value}")
    if kind == "verdict":
        raise RunError(value)
    if kind == "raised":
        line, trace = value
        error = RunError(f"rank {rank} failed: {line}")
        error.add_note(trace)
        raise error
    return kind, value


def _end(processes: list[Any]) -> None:
    for stop in ("terminate", "kill"):
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            getattr(process, stop)()
        until = time.monotonic() + GRACE
        for process in alive:
            process.join(max(0.0, until - time.monotonic()))
