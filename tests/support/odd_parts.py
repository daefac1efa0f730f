"""Parts of the GPU benchmark that end in every way, for the tests of its runner."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from megarl.bench import gpu
from megarl.bench.gpu.part import Part, Scale, Unsupported


def measures(scale: Scale, folder: Path, value: float = 1.0) -> dict[str, Any]:
    (folder / "file").write_text("")  # it has a folder
    return {"value": value, "not_a_number": float("nan")}


def raises(scale: Scale, folder: Path) -> dict[str, Any]:
    raise RuntimeError("CUDA error: device-side assert triggered")


def runs_out_of_memory(scale: Scale, folder: Path) -> dict[str, Any]:
    return {"bytes": len(bytearray(1 << 62))}


def hangs(scale: Scale, folder: Path, pid: str = "") -> dict[str, Any]:
    if pid:
        Path(pid).write_text(str(os.getpid()))
    threading.Event().wait()
    return {}


def is_killed(scale: Scale, folder: Path) -> dict[str, Any]:
    print("NCCL WARN the last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def leaves(scale: Scale, folder: Path) -> dict[str, Any]:
    os._exit(7)


def prints_garbage(scale: Scale, folder: Path) -> dict[str, Any]:
    os.write(1, b"\xff\x00\x1b[2J" * 1000)
    print("\x1b[31m{not json", file=sys.stderr)
    return {"value": 2.0}


def returns_garbage(scale: Scale, folder: Path) -> Any:
    cycle: list[Any] = []
    cycle.append(cycle)
    return {"cycle": cycle}


def is_unsupported(scale: Scale, folder: Path) -> dict[str, Any]:
    raise Unsupported("Transformer Engine: not on this device")


def part(function: str, seconds: float = 100.0, **arguments: Any) -> Part:
    return Part(function, f"{__name__}:{function}", seconds, arguments)


def command(folder: Path) -> None:
    """`megarl bench gpu --rehearse` with a part that measures and one that hangs."""
    gpu.PARTS = [part("measures"), part("hangs", pid=str(folder / "pid"))]
    gpu.main(rehearse=True, only=None, minutes=10.0, json=folder / "rows.json", report=folder / "page.md")
