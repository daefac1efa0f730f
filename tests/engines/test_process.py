"""Starting and ending server processes, with a three-line HTTP server in place of an engine."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.errors import DeadlineExceeded, RunError
from megarl.rollout.servers import reaper
from megarl.rollout.servers.http import Endpoint
from megarl.rollout.servers.process import Server
from tests.support.server_processes import pid_of

SERVE = """
import http.server, os, subprocess, sys
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *_): pass
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # an engine's scheduler
print("worker", worker.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


def server(tmp_path: Path, code: str = SERVE) -> Server:
    return Server("toy", lambda port: [sys.executable, "-c", code, str(port)], log=tmp_path / "logs" / "toy.log")


def test_a_server_does_not_take_itself_for_a_learner_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun's variables SGLang would wait for a rendezvous store that nobody serves."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    code = "import os; print('names', *os.environ, flush=True)"
    told = server(tmp_path, code)
    told.start()
    assert told.reaper is not None
    told.reaper.wait(60)
    told.stop()
    names = told.log.read_text().split()
    assert "GLOO_SOCKET_IFNAME" in names and "PATH" in names
    assert not [name for name in names if "RANK" in name or "MASTER" in name or "TORCHELASTIC" in name]


async def healthy(toy: Server) -> None:
    endpoint = Endpoint(toy.address)
    try:
        await endpoint.get("/", timeout=5, purpose="toy")
    finally:
        await endpoint.close()


def worker_of(toy: Server) -> int:
    return int(toy.log.read_text().rpartition("worker ")[2].split()[0])


def ended(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_start_health_stop_and_start_again(tmp_path: Path) -> None:
    """Proves that stopping ends the server's own children too, and that a second start works."""

    async def main() -> None:
        toy = server(tmp_path)
        for _ in range(2):
            toy.start()
            await toy.wait_until(lambda: healthy(toy), 60)
            pid, worker = pid_of(toy), worker_of(toy)
            assert toy.running and not ended(pid) and not ended(worker)
            await asyncio.to_thread(toy.stop)
            assert not toy.running and ended(pid) and ended(worker)

    asyncio.run(main())


def test_a_killed_server_is_seen_and_its_workers_are_ended(tmp_path: Path) -> None:
    async def main() -> None:
        toy = server(tmp_path)
        toy.start()
        await toy.wait_until(lambda: healthy(toy), 60)
        worker = worker_of(toy)
        os.kill(pid_of(toy), signal.SIGKILL)
        await asyncio.to_thread(toy.reaper.wait, 60)
        assert not toy.running and ended(worker)
        await asyncio.to_thread(toy.stop)

    asyncio.run(main())


def test_a_server_that_ends_while_starting_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    async def main() -> None:
        toy = server(tmp_path, "print('loading'); raise SystemExit('no such model')")
        toy.start()
        with pytest.raises(RunError, match=r"toy ended while starting .*no such model"):
            await toy.wait_until(lambda: healthy(toy), 60)
        await asyncio.to_thread(toy.stop)

    asyncio.run(main())


def test_a_server_that_never_gets_healthy_meets_its_deadline(tmp_path: Path) -> None:
    async def main() -> None:
        toy = server(tmp_path, "import time; time.sleep(600)")
        toy.start()
        with pytest.raises(DeadlineExceeded, match="gave up after 0.5 s waiting for toy to become healthy"):
            await toy.wait_until(lambda: healthy(toy), 0.5)
        await asyncio.to_thread(toy.stop)

    asyncio.run(main())


def test_a_signal_to_the_whole_job_leaves_no_server_behind(tmp_path: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach the reaper too. It survives them, and still ends the server on request."""

    async def main() -> None:
        toy = server(tmp_path)
        toy.start()
        await toy.wait_until(lambda: healthy(toy), 60)
        pid, worker = pid_of(toy), worker_of(toy)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            toy.reaper.send_signal(number)
        await healthy(toy)
        assert toy.running
        await asyncio.to_thread(toy.stop)
        assert ended(pid) and ended(worker)

    asyncio.run(main())


@pytest.mark.parametrize("stopped", ["reaper", "server"])
def test_a_stopped_process_is_ended_on_request(tmp_path: Path, stopped: str) -> None:
    """SIGSTOP of the reaper or of the server: stopping the server still ends both, and its worker."""

    async def main() -> None:
        toy = server(tmp_path)
        toy.start()
        await toy.wait_until(lambda: healthy(toy), 60)
        assert toy.reaper is not None
        pid, worker = pid_of(toy), worker_of(toy)
        os.kill(toy.reaper.pid if stopped == "reaper" else pid, signal.SIGSTOP)
        await asyncio.to_thread(toy.stop)
        assert ended(pid) and ended(worker)

    asyncio.run(main())


def test_the_server_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent gets SIGKILL: it can clean up nothing, and only its end of the pipe closes."""
    told = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    code = (
        "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, reaper.__file__, sys.executable, "-c", told],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    reaper_pid = int(Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()[0])
    waits = [os.pidfd_open(pid), os.pidfd_open(reaper_pid)]
    parent.kill()
    parent.wait()
    while waits:
        readable, _, _ = select.select(waits, [], [], 60)
        assert readable, "the server outlived the process that started it"
        waits = [fd for fd in waits if fd not in readable]
