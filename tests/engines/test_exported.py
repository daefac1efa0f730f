"""A checkpoint of the loop, converted to Hugging Face's layout, in real servers: they load what transformers loads.

The quick start's model, two steps on two tensor-parallel ranks. Says nothing about other families
(tests/checkpoints_conv) nor about CUDA.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoints_conv import commands
from megarl import config
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling
from megarl.rollout.servers import factory
from megarl.runtime.spawn import spawn
from megarl.train import train
from tests.support.real_servers import BF16, Policy, settings
from tests.support.tiny_policy import reference_logprobs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples" / "quickstart" / "reasoner"


@dataclass
class Exported:
    """A trained policy in bf16, and a sequence of it: prompt and response."""

    policy: Policy
    token_ids: list[int]
    prompt: int  # tokens of the prompt
    sampled: list[int]  # indices of the tokens that the policy drew; no one trained it on the others


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What `megarl train` and `megarl convert megatron-to-hf --dtype bf16` leave behind."""
    folder = tmp_path_factory.mktemp("exported")
    small = [
        f"run={folder / 'run'}",
        "data.eval=[]",
        "batch={prompts_per_step: 4, completions_per_prompt: 8, tokens_per_row: 512}",
        "rollout.max_response_tokens=96",
        "optimizer.lr=3e-4",  # moves the log-probs visibly; far more makes unlikely tokens, which bf16 rounds coarsely
        "steps=2",
        "checkpoint.every=2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        spawn(train, 2, (config.load(ROOT / "examples" / "quickstart" / "train.yaml", small),), 280)
        commands.megatron_to_hf(folder / "run" / "checkpoints" / "step_000002", folder / "hf", dtype="bf16")
    rows = [json.loads(line) for line in (folder / "run" / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    row = max(rows, key=lambda row: len(row["response_ids"]))
    policy = Policy(folder / "hf", AutoModelForCausalLM.from_pretrained(folder / "hf").eval())
    prompt = len(row["prompt_ids"])
    sampled = [prompt + i for i, logprob in enumerate(row["logprobs"]) if logprob is not None]
    return Exported(policy, row["prompt_ids"] + row["response_ids"], prompt, sampled)


def distance(scores: list[float], expected: list[float], indices: Iterable[int]) -> float:
    """The largest one over the tokens at `indices`; the first score is of token 1."""
    assert len(scores) == len(expected)
    return max(abs(scores[i - 1] - expected[i - 1]) for i in indices)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_server_loads_a_checkpoint_of_the_loop(engine: str, exported: Exported, tmp_path: Path) -> None:
    """By itself, from the folder: no weights are sent. What the run sampled, and what the server generates, has
    transformers' log-probs in bf16; those of the model that the run began with are further away."""
    folder, model = exported.policy.folder, exported.policy.model
    token_ids, sampled = exported.token_ids, exported.sampled
    assert model.dtype == torch.bfloat16
    expected = reference_logprobs(model, token_ids)
    untrained = AutoModelForCausalLM.from_pretrained(REASONER, dtype=torch.bfloat16).eval()
    assert distance(reference_logprobs(untrained, token_ids), expected, sampled) > 2 * BF16
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(folder))

    async def main() -> None:
        pool = factory.build(settings(exported.policy, tmp_path / "run", engine), vocabulary)
        try:
            await pool.start()
            assert distance(await pool.score(token_ids), expected, sampled) <= BF16
            prompt = token_ids[: exported.prompt]
            made = await pool.generate(prompt, Sampling(max_tokens=24), "g/0|0")
            wanted = reference_logprobs(model, prompt + made.token_ids)[len(prompt) - 1 :]
            assert len(made.token_ids) == 24 and distance(made.logprobs, wanted, range(1, 25)) <= BF16
        finally:
            await pool.close()

    asyncio.run(main())
