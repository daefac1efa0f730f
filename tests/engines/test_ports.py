"""Nobody else's program is taken for a server that megarl starts: ports are bound first, and listeners are checked."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megarl.config import Servers
from megarl.errors import RunError, UserError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.servers import factory
from megarl.rollout.servers.http import Endpoint, ServerError
from megarl.rollout.servers.process import Server, bound, is_loopback
from megarl.rollout.servers.serve import serve
from megarl.rollout.servers.sglang import SGLangEngine
from tests.support.real_servers import Policy, settings
from tests.support.server_processes import pid_of
from tests.support.tiny_policy import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
NOBODY = 65534
SLEEPS = "import time; time.sleep(600)"
# Answers every request as a healthy server would, and writes down what it was sent.
SQUAT = """
import encodings.idna, http.server, os, sys
if len(sys.argv) > 2: os.setuid(int(sys.argv[2]))  # after the imports, which that user may not be able to read
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print(self.headers, flush=True)
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok)
print("squats", flush=True)
server.serve_forever()
"""
BIND = """
import socket, sys
for reuse in (0, 1):
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        try:
            s.bind(("127.0.0.1", int(sys.argv[1])))
            s.listen()
            print("bound")
        except OSError as e:
            print(e.strerror)
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("policy")
    return Policy(folder, make_model(folder))


@contextmanager
def squatter(port: int, log: Path) -> Iterator[None]:
    """Another user's server on the port (ours, where this test is not root)."""
    user = [str(NOBODY)] if os.getuid() == 0 else []
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", SQUAT, str(port), *user], stdout=out, cwd="/")
    try:
        while "squats" not in log.read_text():
            assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def engine(server: Server) -> SGLangEngine:
    limits = Servers(start_timeout=2.0)
    return SGLangEngine("toy", server, Vocabulary(TOKENIZER), limits, vocab_size=len(TOKENIZER), api_key="THE-KEY")


def test_a_squatter_is_not_taken_for_the_server_and_gets_no_key(tmp_path: Path) -> None:
    """It binds the port while our server loads its model. The start fails, and names the port."""
    log = tmp_path / "squatter.log"

    async def main() -> None:
        toy = Server("toy", lambda port: [sys.executable, "-c", SLEEPS], log=tmp_path / "toy.log")
        started = asyncio.ensure_future(engine(toy).start())
        while not toy.port:
            await asyncio.sleep(0.01)
        with squatter(toy.port, log), pytest.raises(RunError, match=f"does not listen on port {toy.port}"):
            await started
        await asyncio.to_thread(toy.stop)

    asyncio.run(asyncio.wait_for(main(), 100))
    assert log.read_text() == "squats\n"  # it was sent nothing


def test_a_dead_servers_port_gets_no_key(tmp_path: Path) -> None:
    """The server was healthy and is killed. Another program binds its port before we notice."""
    log = tmp_path / "squatter.log"

    async def main() -> None:
        toy = Server("toy", lambda port: [sys.executable, "-c", SQUAT, str(port)], log=tmp_path / "toy.log")
        toy.start()
        endpoint = Endpoint(toy.address, api_key="THE-KEY", check=toy.check_listener)
        await toy.wait_until(lambda: endpoint.get("/", timeout=5, purpose="toy"), 60)
        await endpoint.close()
        os.kill(pid_of(toy), signal.SIGKILL)
        assert toy.reaper is not None
        toy.reaper.wait(60)
        with squatter(toy.port, log), pytest.raises(ServerError, match="does not listen on port .* any more"):
            await endpoint.get("/", timeout=5, purpose="toy")
        await asyncio.to_thread(toy.stop)

    asyncio.run(asyncio.wait_for(main(), 100))
    assert "Authorization" in (tmp_path / "toy.log").read_text() and log.read_text() == "squats\n"


def test_nobody_else_can_bind_the_port_of_the_embedded_engines_server(policy: Policy, tmp_path: Path) -> None:
    """From before its process exists, whatever options the other one sets."""
    server = factory.server(settings(policy, tmp_path, "local", api_key_env=None), 0, "local-0", None)
    server.start()
    try:
        told = subprocess.run(
            [sys.executable, "-c", BIND, str(server.port)], capture_output=True, text=True, check=True
        )
        assert told.stdout.split("\n")[:2] == ["Address already in use"] * 2
    finally:
        server.stop()


def test_a_reserved_port_is_the_servers_alone_to_bind() -> None:
    """No port of another connection or server gets it by chance, and the server binds it as servers do."""
    with bound("127.0.0.1", 0, listen=False) as reserved, socket.socket() as chance, socket.socket() as server:
        place = reserved.getsockname()
        with pytest.raises(OSError):
            chance.bind(place)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(place)
        server.listen()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = Server("toy", lambda port: [], log=tmp_path / "log", port=port)
        with pytest.raises(RunError, match=rf"port {port} of 127\.0\.0\.1 cannot be used: Address already in use"):
            taken.start()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2", "node7"])
def test_beyond_loopback_a_server_needs_a_key(host: str, policy: Policy, tmp_path: Path) -> None:
    keyless = settings(policy, tmp_path, "local", api_key_env=None)
    with pytest.raises(UserError, match=rf"--host {host}: .* name a key in rollout\.servers\.api_key_env"):
        serve(keyless, 30000, 1.0, host)
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("flag", ["--host", "--host=0.0.0.0", "--hos", "--port", "--api-key", "--api_key=x"])
def test_flags_that_move_the_server_are_refused(flag: str) -> None:
    """They would come last and win. A parser takes the beginning of a flag for the flag."""
    with pytest.raises(UserError, match=r"rollout\.servers\.flags: '--"):
        factory.check_flags([flag])


def test_started_servers_have_a_random_key(policy: Policy, tmp_path: Path) -> None:
    """One for all servers of a run, another for the next run, and none on a command line."""
    keys = []
    for _ in range(2):
        pool = factory.build(settings(policy, tmp_path, "local", api_key_env=None, count=2), Vocabulary(TOKENIZER))
        servers = [member.engine.server for member in pool.members]
        (key,) = {server.environment["MEGARL_ENGINE_KEY"] for server in servers}
        assert len(key) > 30 and not any(key in part for server in servers for part in server.command(1))
        keys.append(key)
    assert keys[0] != keys[1]


def test_a_key_file_is_private(policy: Policy, tmp_path: Path) -> None:
    """It is read where only its owner can, and refused with the mode where others can."""
    file = tmp_path / "key"
    wanted = settings(policy, tmp_path, "local", api_key_env=None, api_key_file=str(file)).rollout.servers
    with pytest.raises(UserError, match=r"api_key_file: .*key: No such file"):
        factory.api_key_of(wanted)
    file.write_text("a-key\n")
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        with pytest.raises(UserError, match=rf"others may use it \(mode {mode:o}\); chmod 600"):
            factory.api_key_of(wanted)
    file.chmod(0o600)
    assert factory.api_key_of(wanted) == "a-key"
    for text in ("", "\n", "two words", "schlüssel", "a\nb"):
        file.write_text(text)
        with pytest.raises(UserError, match="is empty|cannot carry"):
            factory.api_key_of(wanted)


def test_a_variable_without_a_key_is_refused(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, it would have meant a server that anybody may use."""
    monkeypatch.setenv("EMPTY_KEY", "")
    wanted = settings(policy, tmp_path, "local", api_key_env="EMPTY_KEY").rollout.servers
    with pytest.raises(UserError, match="the variable EMPTY_KEY is empty"):
        factory.api_key_of(wanted)
