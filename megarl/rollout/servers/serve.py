"""`megarl serve`: runs one engine server of a run on this node, for a controller on another node."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from megarl.config import Settings
from megarl.errors import RunError
from megarl.models import hub
from megarl.rollout.servers import factory
from megarl.rollout.servers.idle import IdleTimer


def serve(settings: Settings, first_port: int, idle_timeout: float) -> None:
    """Run this task's server. Under srun, task n uses port `first_port` + n and its share of the node's devices.

    Restarts a server that exits, at most `rollout.servers.restarts` times, then raises RunError. Raises RunError too
    when no client has sent anything for `idle_timeout` seconds (0: no limit).

    SIGTERM stops the server and returns. So does SIGUSR2, which srun passes on; on a SIGTERM of its own, srun kills its
    tasks. Under srun, SIGTERM is ignored: it is Slurm's warning of a pre-emption, and the learner still needs the
    server for its last step.
    """
    task, local = (int(os.environ.get(name, "0")) for name in ("SLURM_PROCID", "SLURM_LOCALID"))
    siblings = int(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    settings.model.path = hub.model(settings.model.path)
    settings.rollout.servers = settings.rollout.servers.model_copy(update={"addresses": [], "count": siblings})
    factory.check(settings.rollout)
    server = factory.server(settings, local, name=f"{settings.rollout.engine}-{task}", port=first_port + task)
    stop = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 or "SLURM_PROCID" not in os.environ:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the time limit: the learner reacts to it
    idle = IdleTimer(server.port, idle_timeout)
    for start in range(settings.rollout.servers.restarts + 1):
        print(f"{server.name}: start {start} on port {server.port}, log {server.log}", file=sys.stderr, flush=True)
        server.start()
        while server.running:
            if stop.wait(1.0):
                server.stop()
                return
            if idle.expired():
                server.stop()
                raise RunError(
                    f"{server.name} on port {server.port}: no client has sent anything for {idle_timeout:g} s "
                    "(--idle-timeout): the controller, or the network to it, is gone; the server was stopped"
                )
    raise RunError(f"{server.name} ended {start + 1} times (log: {server.log}): {server.last_words()}")
