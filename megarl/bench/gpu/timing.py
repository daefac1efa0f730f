"""Milliseconds of what a device does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megarl.runtime import device


def milliseconds(work: Callable[[], Any], repeats: int, warm: int = 1) -> float:
    """The median of `repeats` calls, after `warm` that are not timed. Waits for the device around each."""
    taken = []
    for i in range(warm + repeats):
        _finish()
        begun = time.perf_counter()
        work()
        _finish()
        if i >= warm:
            taken.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(taken)


def where() -> torch.device:
    """This process's device."""
    return torch.device("cuda", torch.cuda.current_device()) if device.on_cuda() else torch.device("cpu")


def _finish() -> None:
    if device.on_cuda():
        torch.cuda.synchronize()
