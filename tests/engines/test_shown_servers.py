"""The servers that examples/engines/README.md starts by hand, and the run that names them, as they are written there.

What a CPU needs is added (see `line`); the model is the quick start's.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from pathlib import Path

import pytest

from megarl import config
from megarl.rollout.servers import sglang, vllm
from megarl.rollout.servers.http import Endpoint
from megarl.rollout.servers.process import Server
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support import pages  # noqa: E402
from tests.support.server_processes import GUARDED, check_the_key

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

PAGE = pages.ROOT / "examples" / "engines" / "README.md"
MODEL = pages.ROOT / "examples" / "quickstart" / "reasoner"
BEGINS = {"sglang": "MEGARL_ENGINE_KEY=", "vllm": "VLLM_API_KEY="}
DEADLINE = 900.0


def documented(begins: str) -> list[str]:
    """The words of the page's one command that begins so."""
    (command,) = {command for command in pages.shell(PAGE) if command.startswith(begins)}
    return shlex.split(command)


def line(engine: str, key: str, log: Path) -> Server:
    """The documented command with this machine's places, one device instead of 8, and what a CPU needs besides: nothing
    else that megarl would give a server of its own."""
    words = [word.replace("$ENGINE_KEY", key) for word in documented(BEGINS[engine])]
    words = [re.sub(r"^(PYTHONPATH=)?MEGARL/", rf"\1{pages.ROOT}/", word) for word in words]
    words = [{"MODEL": str(MODEL), "8": "1"}.get(word, word) for word in words]
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *rest = words[len(given) :]
    assert program == "python"
    python = pages.ROOT / ".engines" / engine / "bin" / "python"
    parts = {"sglang": sglang, "vllm": vllm}[engine]
    sides = {"dtype": "bfloat16", "weights": "pretrained", "flags": ()}
    gpu, cpu = (parts.command(0, python=python, model=MODEL, cuda=cuda, **sides) for cuda in (True, False))
    added = cpu[len(os.path.commonprefix([gpu, cpu])) : cpu.index("--port")]
    ours, theirs = (parts.environment(cuda=cuda, api_key=None) for cuda in (False, True))
    environment = {name: value for name, value in ours.items() if name not in theirs} | given

    def build(port: int) -> list[str]:
        placed = [str(port) if word == "30000" else word for word in rest]
        return [str(python), *placed, "--dtype", "bfloat16", *added]

    return Server(engine, build, log=log, environment=environment)


@pytest.mark.parametrize("engine", BEGINS)
def test_the_documented_server_is_trained_on(
    engine: str, api_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step on a server that was started by hand, with its key, in bf16: the canary agrees. Without the key nobody
    gets in. Not shown: 8 GPUs, two nodes."""
    monkeypatch.chdir(pages.ROOT)
    monkeypatch.setenv("ENGINE_KEY", api_key)
    _, _, _, *wanted = documented("megarl train CONFIG rollout.engine=sglang rollout.servers.addresses=")
    wanted = [word for word in wanted if not word.startswith("http")]  # the second address of two
    server = line(engine, api_key, tmp_path / "server.log")

    async def serve() -> None:
        server.start()
        endpoint = Endpoint(server.address, api_key=api_key)
        try:
            await server.wait_until(lambda: endpoint.get("/v1/models", timeout=15, purpose="health"), 600)
            await check_the_key(server, api_key, *GUARDED[engine])
            await asyncio.to_thread(spawn, train, 1, (settings(),), DEADLINE)
        finally:
            await endpoint.close()
            await asyncio.to_thread(server.stop)

    def settings() -> config.Settings:
        asked = [word.replace("sglang", engine) for word in wanted if "addresses" not in word]
        small = [
            f"run={tmp_path / 'run'}", f"rollout.servers.addresses=[{server.address}]", "parallel={}", "data.eval=[]",
            "steps=2", "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
            "rollout.max_response_tokens=32", "precision.dtype=bf16",
        ]  # fmt: skip
        return config.load(Path("examples/quickstart/train.yaml"), [*asked, *small])

    asyncio.run(serve())
    assert [line["weight_version"] for line in read_metrics(tmp_path / "run")] == [0, 1]
