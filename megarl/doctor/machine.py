"""Checks this node's devices, limits, disk and network cards."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from megarl.config import Settings
from megarl.doctor.finding import Finding, fail, ok, warn
from megarl.errors import UserError
from megarl.models import hub
from megarl.models.config_json import read_shape
from megarl.run import room
from megarl.runtime import device
from megarl.runtime.launched import under_launcher

GIB = 2**30
BUSY = 2.0  # GiB in use on a device before the run, above which another process uses it
PROBE = 32 << 20  # bytes written to measure the disk
SLOW_DISK = 100.0  # MB/s
SKEW = 2.0  # seconds between this clock and the file system's


def devices(expected: int | None) -> Iterator[Finding]:
    """`expected`: devices that this node must have. None: any number."""
    if expected and not torch.cuda.is_available():
        hint = "nvidia-smi; a driver older than torch's CUDA, or a container started without --nv"
        yield fail("devices", f"{expected} CUDA devices are expected, none is visible", hint)
        return
    if not torch.cuda.is_available():
        yield ok("devices", f"no CUDA device; {os.cpu_count()} CPU cores, the learner runs on them")
        return
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    if expected and count < expected:
        hint = "a device has fallen off the bus, or the job's GPU binding hides some: nvidia-smi, dmesg | grep -i xid"
        yield fail("devices", f"{count} of {expected} devices: {names}", hint)
    else:
        yield ok("devices", f"{count} x {names}")
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        if (total - free) / GIB > BUSY:
            text = f"device {i}: {(total - free) / GIB:.1f} of {total / GIB:.0f} GiB in use"
            yield warn("device memory", text, "another process uses it: nvidia-smi")


def chosen(settings: Settings) -> Iterator[Finding]:
    """Where the learner would compute, and whether the ranks that `megarl train` starts have a device each."""
    try:
        device.choose(settings.device)
        if not under_launcher():  # which alone knows the number of ranks
            device.check_ranks(settings.parallel.model_ranks)
    except UserError as e:
        yield fail("device", str(e), "`megarl train` would refuse it here")
    else:
        yield ok("device", device.describe())


def limits() -> Iterator[Finding]:
    """Open files, locked memory (for InfiniBand), shared memory (for NCCL and graders)."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield warn("open files", f"at most {files}", "ulimit -n 65536, or LimitNOFILE of slurmd")
    else:
        yield ok("open files", f"at most {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if ports() and locked != resource.RLIM_INFINITY:
        yield warn("locked memory", f"at most {locked >> 20} MiB", "InfiniBand needs LimitMEMLOCK=infinity of slurmd")
    shared = shutil.disk_usage("/dev/shm").free / GIB if Path("/dev/shm").is_dir() else 0.0
    if shared < 0.5:
        yield warn("shared memory", f"{shared:.2f} GiB free in /dev/shm", "give the container a larger --shm-size")
    else:
        yield ok("shared memory", f"{shared:.1f} GiB free in /dev/shm")


def fabric(nodes: int) -> Iterator[Finding]:
    """InfiniBand or RoCE cards, and whether their ports are up."""
    found = ports()
    down = [f"{port.parent.parent.name}:{port.name}" for port in found if "ACTIVE" not in (port / "state").read_text()]
    if down and len(down) < len(found):
        yield warn("fabric", f"ports down: {', '.join(down)}", "NCCL_IB_HCA names the cards to use; ibstat")
    elif down:
        yield fail("fabric", f"every InfiniBand port is down: {', '.join(down)}", "ibstat; NCCL_IB_DISABLE=1 for TCP")
    elif found:
        yield ok("fabric", f"{len(found)} InfiniBand or RoCE ports up")
    elif nodes > 1 and torch.cuda.is_available():
        hint = "expected on Ethernet; else the container lacks /dev/infiniband"
        yield warn("fabric", "no InfiniBand card: NCCL goes over TCP", hint)
    else:
        yield ok("fabric", "no InfiniBand card; collectives go over TCP")


def disk(settings: Settings) -> Iterator[Finding]:
    """Whether the run directory is writable, large and fast enough, and agrees with this node's clock."""
    run = settings.run
    probe = run / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        began, wall = time.monotonic(), time.time()
        with probe.open("wb") as file:
            file.write(os.urandom(PROBE))
            os.fsync(file.fileno())
        speed = PROBE / 1e6 / max(time.monotonic() - began, 1e-6)
        written = probe.stat().st_mtime
    except OSError as e:
        yield fail("disk", f"run: {run}: {os.strerror(e.errno or 0)}", "name a folder that every node can write: run=…")
        return
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    free = shutil.disk_usage(run).free
    try:
        parameters = read_shape(hub.model(settings.model.path, weights=False)).parameters()
    except Exception as e:  # any unreadable model
        yield fail("model", f"{settings.model.path}: {' '.join(str(e).split())}", "set model.path")
        return
    needed = room.needed(settings, parameters)
    text = f"run: {run}: {free / GIB:.1f} GiB free, {needed / GIB:.1f} needed for checkpoints"
    if free < needed:
        yield fail("disk", text, "checkpoint.keep=1, or another folder: run=…")
    else:
        yield ok("disk", text)
    if speed < SLOW_DISK:
        yield warn("disk speed", f"{speed:.0f} MB/s", "checkpoints will take long; is this a parallel file system?")
    else:
        yield ok("disk speed", f"{speed:.0f} MB/s")
    skew = wall - written
    if abs(skew) > SKEW + PROBE / 1e6 / speed:
        yield warn("file clock", f"{skew:+.1f} s against the file system's", "chronyc tracking; timedatectl")
    else:
        yield ok("file clock", "agrees with the file system's")


def ports() -> list[Path]:
    """Of the InfiniBand and RoCE cards."""
    return sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
