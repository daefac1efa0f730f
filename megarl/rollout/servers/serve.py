"""`megarl serve`: runs one engine server of a run on this node, for a controller on another node."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from megarl.config import Settings
from megarl.errors import RunError, UserError
from megarl.models import hub
from megarl.rollout.servers import factory
from megarl.rollout.servers.idle import IdleTimer
from megarl.rollout.servers.process import LOOPBACK, is_loopback


def serve(settings: Settings, first_port: int, idle_timeout: float, host: str = LOOPBACK) -> None:
    """Run this task's server on `host`. Under srun, task n uses port `first_port` + n and its share of the node's
    devices. Raises UserError if other machines could reach it and it has no key.

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
    key = factory.api_key_of(settings.rollout.servers)
    if key is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: whoever reaches the port could replace the weights; name a key in "
            "rollout.servers.api_key_env or api_key_file, or use --host 127.0.0.1"
        )
    name, port = f"{settings.rollout.engine}-{task}", first_port + task
    server = factory.server(settings, local, name, key, host, port)
    open_to = "" if key else "; WITHOUT A KEY: every user of this machine may replace the weights"
    stop = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 or "SLURM_PROCID" not in os.environ:
            stop.set()

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, leave)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the time limit: the learner reacts to it
    idle = IdleTimer(server.port, idle_timeout)
    for start in range(settings.rollout.servers.restarts + 1):
        told = f"{server.name}: start {start} on port {server.port} of {host}, log {server.log}{open_to}"
        print(told, file=sys.stderr, flush=True)
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
