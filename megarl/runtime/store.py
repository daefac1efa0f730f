"""The rendezvous store of the ranks on one machine: a file in the launcher's memory.

torch's TCPStore answers whoever connects, so any user of the machine could read the run's messages and end it. The
kernel opens this file to the same user only. It ends with the launcher, and works while the launcher is stopped.
"""

from __future__ import annotations

import os

import torch.distributed as dist

VARIABLE = "MEGARL_STORE"


class LocalStore:
    """`path` names the store, for as long as this object and this process live."""

    def __init__(self) -> None:
        self._file = os.memfd_create("megarl-store")
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def close(self) -> None:
        os.close(self._file)


def connect(world_size: int) -> dist.Store | None:
    """A connection to the launcher's store. None if another launcher started this rank."""
    path = os.environ.get(VARIABLE)
    return dist.FileStore(path, world_size) if path else None
