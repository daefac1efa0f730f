"""The one place that decides between CPU and CUDA."""

from __future__ import annotations

import functools
import importlib.util
import os
import resource

import torch


def on_cuda() -> bool:
    """Whether this machine has a CUDA device; if not, the learner runs on the CPU."""
    return torch.cuda.is_available()


@functools.cache
def transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: a CUDA device, and the package."""
    return on_cuda() and importlib.util.find_spec("transformer_engine") is not None


def backend() -> str:
    """The backend of the model's collectives."""
    return "nccl" if on_cuda() else "gloo"


def peak_memory() -> int:
    """This rank's largest use of memory so far, in bytes: of the device, or of the process on a CPU."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB


def claim(local_rank: int, local_world_size: int) -> torch.device:
    """Select and return this rank's device. On a CPU, the ranks of a machine divide its cores among them."""
    if on_cuda():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    return torch.device("cpu")
