"""The whole loop on real servers: `train`, Step-GRPO's early exit on, weights into the servers after every step.

The learner and the reasoner of the quick start, a few small steps on a CPU. Says nothing about learning
(tests/e2e/test_learns.py) nor about CUDA.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megarl import config
from megarl.bench.common.models import write_model
from megarl.run.directory import read_metrics
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support.real_servers import BF16, KEY_VARIABLE
from tests.support.server_processes import pid_of

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
PROMPTS, GROUP = 6, 4
DEADLINE = 1500.0  # seconds for one run, starting the servers included
FP32 = 1e-3  # bound on |engine - learner| log-probs


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
        assert line["mismatch_max"] <= 10 * FP32  # of some thousand tokens, the canary has 64
        assert line["grad_norm"] > 0 and line["probe_tokens"] > 0
    exits = sum((check_rollouts(wanted.run, step) for step in (1, 2, 3)), Counter())
    assert exits["confident"] > 0


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_the_loop_trains_in_bf16(engine: str, tmp_path: Path) -> None:
    """Four steps at the quick start's own rate, learner and server in bf16: after each one every log-prob of the canary
    is the learner's to 0.1, and within the default limit, which comes from the learner's rounding."""
    wanted = settings(tmp_path / "run", engine, "precision.dtype=bf16", "optimizer.lr=2e-4", "steps=4")
    assert wanted.rollout.canary_limit is None
    spawn(train, 1, (wanted,), DEADLINE)
    metrics = read_metrics(wanted.run)
    assert [line["weight_version"] for line in metrics] == [0, 1, 2, 3]
    for line in metrics:
        assert line["canary_difference"] <= BF16
        assert 0 < line["canary_rounding"] <= BF16
        assert line["mismatch_mean"] <= BF16 / 10
        assert line["grad_norm"] > 0


def test_the_loop_replays_the_routing_of_a_real_server(tmp_path: Path) -> None:
    """Two steps of a random mixture of experts in fp32: the learner takes the experts that SGLang reports, and gives
    what was sampled the same log-probs, thoughts that were cut and answered among it; so it does after an update.

    That a named expert is taken, whatever the learner's router says, is tests/learner/test_routing_replay.py's.
    """
    write_model(tmp_path / "model", "qwen3_moe", vocab_size=36, num_hidden_layers=3)  # SGLang has no tied one
    for file in (ROOT / "examples" / "quickstart" / "reasoner").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    wanted = settings(
        tmp_path / "run", "sglang", f"model.path={tmp_path / 'model'}", "rollout.replay_routing=true", "steps=2",
        "reward.function=tests.support.graders:odd", "reward.shaping=none", "rollout.early_exit.threshold=0.01",
        "rollout.early_exit.strict=false",
    )  # fmt: skip
    spawn(train, 1, (wanted,), DEADLINE)
    metrics = read_metrics(wanted.run)
    assert [line["weight_version"] for line in metrics] == [0, 1]
    for line in metrics:
        assert line["mismatch_max"] <= FP32 and line["tokens_trained"] > 100 and line["grad_norm"] > 0
    assert sum((check_rollouts(wanted.run, step) for step in (1, 2)), Counter())["confident"] > 0


def train_while_servers_die(wanted: config.Settings) -> dict[str, Any]:
    """Train on two servers, of which one gets SIGKILL in mid-rollout of step 2 and the other in the weight update after
    step 3; each is waited for before the next step. Returns what became of the pool, at the end and after each step's
    rollout and recovery."""
    from megarl.loop.collector import Collector
    from megarl.rollout.servers import factory
    from megarl.rollout.servers.remote import RemoteEngine

    kind, *_ = factory.ENGINES[wanted.rollout.engine]
    way = "load_serialized" if kind.kind == "sglang" else "load_folder"
    first, second = f"{kind.kind}-0", f"{kind.kind}-1"
    pools, killed, segments, after = [], [], [0], []
    build, collect, segment, load = factory.build, Collector.collect, kind.segment, getattr(kind, way)

    def remember(*arguments: Any) -> Any:
        pools.append(build(*arguments))
        return pools[-1]

    def kill(engine: RemoteEngine) -> None:
        os.kill(pid_of(engine.server), signal.SIGKILL)
        killed.append(engine.name)

    async def counted(self: RemoteEngine, server_id: str, *arguments: Any) -> Any:
        if server_id.startswith("2/") and self.name == first:
            segments[0] += 1
            if segments[0] == 10:
                kill(self)
        return await segment(self, server_id, *arguments)

    async def cut(self: RemoteEngine, *arguments: Any) -> None:
        if self.name == second and self.version == 2 and second not in killed:
            kill(self)
        await load(self, *arguments)

    def members() -> list[tuple[str, str, int | None]]:
        return [(member.engine.name, member.state, member.engine.version) for member in pools[0].members]

    async def recovered() -> None:
        pending = [member.recovery for member in pools[0].members if member.recovery]
        await asyncio.wait_for(asyncio.gather(*pending), wanted.rollout.servers.start_timeout + 60)

    def collect_and_wait(self: Collector, *arguments: Any) -> Any:
        collected = collect(self, *arguments)
        self.loop.run(recovered())
        after.append(members())
        return collected

    factory.build, kind.segment, Collector.collect = remember, counted, collect_and_wait
    setattr(kind, way, cut)
    train(wanted)
    return {"killed": killed, "retries": pools[0].retries, "after": after, "engines": members()}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_killed_servers_cost_no_completion(engine: str, tmp_path: Path) -> None:
    """`kill -9` of one of two servers in mid-rollout, and of the other in a weight update: both steps complete, every
    prompt has exactly its completions, and each server is back within its deadline. vLLM, whose weights lie in a
    folder, then has the current ones; SGLang waits for the next update to bring them. In fp32, as above."""
    wanted = settings(
        tmp_path / "run",
        engine,
        "rollout.servers.count=2",
        "rollout.servers.start_timeout=600",
        f"rollout.canary_limit={FP32}",
        "steps=4",
    )
    (report,) = spawn(train_while_servers_die, 1, (wanted,), DEADLINE)
    first, second = f"{engine}-0", f"{engine}-1"
    assert report["killed"] == [first, second] and report["retries"] > 0
    assert report["engines"] == [(first, "up", 4), (second, "up", 4)]
    back = ("stale", None) if engine == "sglang" else ("up", 1)
    assert report["after"][1] == [(first, *back), (second, "up", 1)]  # the rollout of step 2 is over
    metrics = read_metrics(wanted.run)
    assert [line["weight_version"] for line in metrics] == [0, 1, 2, 3]
    assert all(line["canary_difference"] <= FP32 for line in metrics)
    for step in (1, 2, 3, 4):
        check_rollouts(wanted.run, step)
