"""Checks that the job's nodes reach each other, agree on the time, and share a file system. One task per node.

Task 0 listens at the rendezvous address and answers each peer with its own time. A peer computes its clock's offset
from the fastest of a few round trips. Torch is not used: all this must work before torch can.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megarl.doctor.finding import Finding, fail, ok, warn

TIMEOUT = 60.0  # seconds for every node to call
TRIPS = 5
SKEW = 1.0  # seconds between two nodes' clocks


def meet(rank: int, size: int, address: str, port: int, run: Path, timeout: float = TIMEOUT) -> Iterator[Finding]:
    """On rank 0: check that every node calls. Elsewhere: check this node against rank 0."""
    if rank == 0:
        yield from _host(size, port, run, timeout)
    else:
        yield from _call(address, port, run, timeout)


def _host(size: int, port: int, run: Path, timeout: float) -> Iterator[Finding]:
    token = run / f".doctor-{os.urandom(8).hex()}"
    limit = time.monotonic() + timeout
    called: set[str] = set()
    try:
        listener = socket.create_server(("", port))
    except OSError as e:
        yield fail("ports", f"port {port}: {os.strerror(e.errno or 0)}", "another job's ranks on this node? ss -ltnp")
        return
    yield ok("ports", f"{port} is free for the rendezvous")
    try:
        token.touch()
        with listener:
            while len(called) < size - 1:
                listener.settimeout(max(0.01, limit - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    missing = f"{size - 1 - len(called)} of {size - 1} nodes did not call port {port}"
                    heard = f" (heard from {', '.join(sorted(called))})" if called else ""
                    yield fail("peers", f"{missing} within {timeout:g} s{heard}", "a firewall? FABRIC=interface")
                    return
                with peer, peer.makefile("rw") as lines:
                    peer.settimeout(max(0.01, limit - time.monotonic()))
                    for line in lines:
                        called.add(json.loads(line)["host"])
                        print(json.dumps({"time": time.time(), "token": token.name}), file=lines, flush=True)
        yield ok("peers", f"all {size} nodes reach this one")
    finally:
        token.unlink(missing_ok=True)


def _call(address: str, port: int, run: Path, timeout: float) -> Iterator[Finding]:
    limit = time.monotonic() + timeout
    trips: list[tuple[float, float]] = []  # (round trip, offset)
    answer: dict[str, str] = {}
    while True:
        try:
            with socket.create_connection((address, port), 5.0) as peer, peer.makefile("rw") as lines:
                peer.settimeout(timeout)
                for _ in range(TRIPS):
                    sent = time.time()
                    print(json.dumps({"host": socket.gethostname()}), file=lines, flush=True)
                    answer = json.loads(lines.readline())
                    back = time.time()
                    trips.append((back - sent, float(answer["time"]) - (sent + back) / 2))
                shared = (run / answer["token"]).exists()
            break
        except (OSError, ValueError) as e:
            if time.monotonic() > limit:
                yield fail("peers", f"{address}:{port} cannot be reached: {e}", "a firewall? FABRIC=interface")
                return
            time.sleep(0.2)  # rank 0 may not have started yet
    trip, offset = min(trips)
    yield ok("peers", f"{address}:{port} reached in {1e3 * trip:.1f} ms")
    if abs(offset) > SKEW:
        yield warn("clock", f"{-offset:+.2f} s against {address}", "chronyc tracking: is a time server reached?")
    else:
        yield ok("clock", f"{-1e3 * offset:+.1f} ms against {address}")
    if not shared:
        yield fail("shared disk", f"run: {run} is another folder on {address}", "run=… on a file system of all nodes")
    else:
        yield ok("shared disk", f"run: {run} is the same on {address}")
