"""`megarl serve`: one engine server of a run on this node, for a controller elsewhere; ends when it is told to,
or when no controller has spoken to it for long."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from megarl.config import Settings
from megarl.errors import RunError
from megarl.rollout.servers import factory
from megarl.rollout.servers.idle import Idleness


def serve(settings: Settings, first_port: int, idle_timeout: float) -> None:
    """Run this task's server: under srun, task n takes port `first_port` + n and its share of the node's devices.

    A server that ends is started again, `rollout.servers.restarts` times; then RunError, as when no client has sent it
    anything for `idle_timeout` seconds (0: however long). SIGTERM ends it and returns, and so does SIGUSR2, which srun
    passes on (at a SIGTERM of its own, srun kills the tasks). Under srun SIGTERM does nothing: it is Slurm's warning of
    a pre-emption, and the learner's last step needs the server.
    """
    task, local = (int(os.environ.get(name, "0")) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    siblings = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    settings.rollout.servers = settings.rollout.servers.model_copy(update={"addresses": [], "count": siblings})
    factory.check(settings.rollout)
    server = factory.server(settings, local, name=f"{settings.rollout.engine}-{task}", port=first_port + task)
    told = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 or "SLURM_PROCID" not in os.environ:
            told.set()

    for each in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(each, leave)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of the time limit; the learner's to answer
    idleness = Idleness(server.port, idle_timeout)
    for start in range(settings.rollout.servers.restarts + 1):
        print(f"{server.name}: start {start} on port {server.port}, log {server.log}", file=sys.stderr, flush=True)
        server.start()
        while server.running:
            if told.wait(1.0):
                server.end()
                return
            if idleness.look():
                server.end()
                raise RunError(
                    f"{server.name} on port {server.port}: no client has sent anything for {idle_timeout:g} s "
                    "(--idle-timeout): its controller, or the way to it, is gone; the server has been ended"
                )
    raise RunError(f"{server.name} ended {start + 1} times (log: {server.log}): {server.last_words()}")
