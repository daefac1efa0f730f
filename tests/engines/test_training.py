"""The whole loop on real servers: `train`, Step-GRPO's early exit on, weights into the servers after every step.

The learner and the reasoner of the quick start, a few small steps on a CPU. Says nothing about learning
(tests/e2e/test_learns.py) nor about CUDA.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from real_servers import KEY_VARIABLE

from megarl import config
from megarl.learner.spawn import spawn
from megarl.rundir import read_metrics
from megarl.train import train

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PROMPTS, GROUP = 6, 4
DEADLINE = 1500.0  # seconds for one run, starting the servers included
FP32, BF16 = 1e-3, 0.1  # bounds on |engine - learner| log-probs


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick start's settings name files and its grader from there."""
    monkeypatch.chdir(ROOT)


def settings(run: Path, engine: str, *overrides: str) -> config.Settings:
    """The quick start on servers that the run starts, cut down; weights move visibly at every step."""
    small = [
        f"run={run}",
        "data.eval=[]",
        f"batch={{prompts_per_step: {PROMPTS}, completions_per_prompt: {GROUP}, tokens_per_row: 512}}",
        f"rollout.engine={engine}",
        "rollout.max_response_tokens=64",
        "rollout.servers.device=cpu",
        f"rollout.servers.api_key_env={KEY_VARIABLE}",
        "parallel={}",
        "steps=3",
        "checkpoint.every=0",
        "optimizer.lr=1e-3",
        *overrides,
    ]
    return config.load(ROOT / "examples" / "quickstart" / "train.yaml", small)


def check_rollouts(run: Path, step: int) -> Counter[str]:
    """Every prompt of the step has its completions, each once; returns how they ended."""
    rows = [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
    assert Counter(row["uid"] for row in rows) == dict.fromkeys({row["uid"] for row in rows}, GROUP)
    assert len({(row["uid"], row["index"]) for row in rows}) == PROMPTS * GROUP
    return Counter(row["exit_reason"] for row in rows)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_loop_trains_on_a_real_server(engine: str, tmp_path: Path) -> None:
    """Three steps in fp32. After each one the server's log-probs are the learner's to 1e-3, though the step moved them
    by more than that; what was sampled has the log-probs that the learner gives it; thoughts exit at markers."""
    wanted = settings(tmp_path / "run", engine, f"rollout.canary_limit={FP32}")
    spawn(train, 1, (wanted,), DEADLINE)
    metrics = read_metrics(wanted.run)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert [line["weight_version"] for line in metrics] == [0, 1, 2]
    for line in metrics:
        assert line["canary_difference"] <= FP32
        assert line["mismatch_max"] <= 10 * FP32  # of some thousand tokens, the canary has 31
        assert line["grad_norm"] > 0 and line["probe_tokens"] > 0
    exits = sum((check_rollouts(wanted.run, step) for step in (1, 2, 3)), Counter())
    assert exits["confident"] > 0


def train_while_servers_die(wanted: config.Settings) -> dict[str, Any]:
    """Train on two servers, of which one gets SIGKILL in mid-rollout of step 2 and the other in the weight update after
    step 3; each is waited for before the next step. Returns what became of the pool."""
    from megarl.collector import Collector
    from megarl.rollout import fleet
    from megarl.rollout.sglang import SGLangEngine

    pools, killed, segments = [], [], [0]
    build, collect = fleet.build, Collector.collect
    segment, load = SGLangEngine._segment, SGLangEngine.load_serialized

    def remember(*arguments: Any) -> Any:
        pools.append(build(*arguments))
        return pools[-1]

    def kill(engine: SGLangEngine) -> None:
        os.kill(engine.server.pid, signal.SIGKILL)
        killed.append(engine.name)

    async def counted(self: SGLangEngine, server_id: str, *arguments: Any) -> Any:
        if server_id.startswith("2/") and self.name == "sglang-0":
            segments[0] += 1
            if segments[0] == 10:
                kill(self)
        return await segment(self, server_id, *arguments)

    async def cut(self: SGLangEngine, serialized: str) -> None:
        if self.name == "sglang-1" and self.version == 2 and "sglang-1" not in killed:
            kill(self)
        await load(self, serialized)

    async def recovered() -> None:
        pending = [member.recovery for member in pools[0]._members if member.recovery]
        await asyncio.wait_for(asyncio.gather(*pending), 900)

    def collect_and_wait(self: Collector, *arguments: Any) -> Any:
        collected = collect(self, *arguments)
        self.loop.run(recovered())
        return collected

    fleet.build, SGLangEngine._segment, SGLangEngine.load_serialized = remember, counted, cut
    Collector.collect = collect_and_wait
    train(wanted)
    (pool,) = pools
    return {
        "killed": killed,
        "redone": pool.redone,
        "engines": [(member.engine.name, member.state, member.engine.version) for member in pool._members],
    }


def test_killed_servers_cost_no_completion(tmp_path: Path) -> None:
    """`kill -9` of one of two servers in mid-rollout, and of the other in a weight update: both steps complete, every
    prompt has exactly its completions, and each server is back with the next update's weights. In bf16."""
    wanted = settings(
        tmp_path / "run",
        "sglang",
        "rollout.servers.count=2",
        "precision.dtype=bf16",
        f"rollout.canary_limit={BF16}",
        "steps=4",
    )
    (report,) = spawn(train_while_servers_die, 1, (wanted,), DEADLINE)
    assert report["killed"] == ["sglang-0", "sglang-1"] and report["redone"] > 0
    assert report["engines"] == [("sglang-0", "up", 4), ("sglang-1", "up", 4)]
    metrics = read_metrics(wanted.run)
    assert [line["weight_version"] for line in metrics] == [0, 1, 2, 3]
    assert all(line["canary_difference"] <= BF16 for line in metrics)
    for step in (1, 2, 3, 4):
        check_rollouts(wanted.run, step)
