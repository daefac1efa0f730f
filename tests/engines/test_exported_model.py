"""From the loop to the outside world: a trained checkpoint, converted, is what transformers, SGLang and vLLM load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from real_servers import Policy, settings
from tiny_policy import reference_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conv import commands
from megarl import config
from megarl.config import Precision
from megarl.learner.spawn import spawn
from megarl.rollout import fleet
from megarl.rollout.detokenize import vocabulary_of
from megarl.train import train

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
FP32 = 1e-3  # bound on log-probs between two float32 forward passes


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Two steps of the quick start under tp=2, at a rate that moves every weight; transformers reads what came out."""
    run = tmp_path_factory.mktemp("trained") / "run"
    small = [
        f"run={run}",
        "steps=2",
        "data.eval=[]",
        "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
        "rollout.max_response_tokens=48",
        "optimizer.lr=1e-2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wanted = config.load(ROOT / "examples" / "quickstart" / "train.yaml", small)
        spawn(train, 2, (wanted,), 600)
        commands.megatron_to_hf(run / "checkpoints" / "step_000002", run / "hf")
    return Policy(run / "hf", AutoModelForCausalLM.from_pretrained(run / "hf").eval())


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_an_engine_loads_what_the_loop_trained(engine: str, exported: Policy, tmp_path: Path) -> None:
    """In fp32, its log-probs are transformers' to 1e-3, and are not those of the model before training."""
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    before = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "quickstart" / "reasoner").eval()
    ids = tokenizer.encode("5 2 9 7 -> 11 <think> 5 + 2 = 7 no Wait 2 + 9 = 11 yes </think>")
    wanted = settings(exported, tmp_path / "run", engine).model_copy(update={"precision": Precision(dtype="fp32")})

    async def scored() -> list[float]:
        pool = fleet.build(wanted, vocabulary_of(tokenizer, exported.folder))
        await pool.start()
        try:
            return await pool.score(ids)
        finally:
            await pool.close()

    scores = asyncio.run(scored())
    assert max(abs(a - b) for a, b in zip(scores, reference_logprobs(exported.model, ids), strict=True)) <= FP32
    assert max(abs(a - b) for a, b in zip(scores, reference_logprobs(before, ids), strict=True)) > 100 * FP32
