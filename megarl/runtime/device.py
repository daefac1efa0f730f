"""The one place that decides between CPU and CUDA."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import resource
from collections.abc import Iterator

import torch

from megarl.errors import UserError

VARIABLE = "MEGARL_DEVICE"
"""Environment variable: what the setting `device: auto` means. Also tells the ranks what their launcher chose."""
CHOICES = ("auto", "cpu", "cuda")

_setting = "auto"  # of this process's run


def choose(setting: str) -> None:
    """Take over a run's setting `device`. Raises UserError if it asks for a CUDA device and none is visible.

    Call it before the first import of `megarl.learner`, which prepares Megatron for this device.
    """
    global _setting
    _setting = setting
    if chosen() == "cuda" and not torch.cuda.is_available():
        name = "device" if setting == "cuda" else VARIABLE
        raise UserError(f"{name}: cuda, but torch sees no CUDA device; nearest valid value: cpu")


def chosen() -> str:
    """The run's setting or, where that is `auto`, the environment's."""
    if _setting != "auto":
        return _setting
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in CHOICES:
        raise UserError(f"{VARIABLE}: {asked}; valid values: {', '.join(CHOICES)}")
    return asked


def on_cuda() -> bool:
    """Whether the learner computes on CUDA: a device is visible, and the CPU is not asked for."""
    return chosen() != "cpu" and torch.cuda.is_available()


def describe() -> str:
    """Where the learner computes, in words."""
    if not on_cuda():
        return "cpu"
    count = torch.cuda.device_count()
    return f"cuda, {count} device{'s' if count != 1 else ''} visible"


@contextlib.contextmanager
def exported() -> Iterator[None]:
    """Tell processes that are started meanwhile which device was chosen."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "cuda" if on_cuda() else "cpu"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before


@functools.cache
def transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: the learner is on CUDA, and the package is there."""
    return on_cuda() and importlib.util.find_spec("transformer_engine") is not None


def backend() -> str:
    """The backend of the model's collectives."""
    return "nccl" if on_cuda() else "gloo"


def peak_memory() -> int:
    """This rank's largest use of memory so far, in bytes: of the device, or of the process on a CPU."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


def check_ranks(ranks: int, own_devices: bool = False) -> None:
    """Raise UserError if this machine has fewer CUDA devices than ranks: NCCL refuses two ranks on one device.

    `own_devices`: a launcher may have given each rank another device, the only one that the rank sees.
    """
    count = torch.cuda.device_count() if on_cuda() else ranks
    if count >= ranks or (own_devices and count == 1):
        return
    raise UserError(
        f"device: {ranks} ranks on this machine, but {count} CUDA device{'s' if count != 1 else ''}; set device=cpu, "
        f"or start at most {count} ranks here (--nproc, parallel.tp, parallel.pp, parallel.cp)"
    )


def claim(local_rank: int, local_world_size: int) -> torch.device:
    """Select and return this rank's device. On a CPU, the ranks of a machine divide its cores among them.

    Raises UserError if this machine has too few CUDA devices. A rank that sees only one takes that: its launcher may
    have given each rank another one. Whether it has, only the ranks together can tell, by the devices' `identity`.
    """
    if on_cuda():
        check_ranks(local_world_size, own_devices=True)
        index = local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    return torch.device("cpu")


def identity(device: torch.device) -> str:
    """The device's UUID, which no other device has."""
    return str(torch.cuda.get_device_properties(device).uuid)
