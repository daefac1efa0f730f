"""The experts that a real SGLang server reports on the CPU, against transformers' routers.

Says nothing of CUDA, where SGLang chooses and keeps the experts by other code.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarl.bench.common.models import write_model
from megarl.config import Settings, parse
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.servers import factory
from megarl.rollout.servers.pool import Pool
from tests.support.real_servers import KEY_VARIABLE, TOKENIZER

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

PROMPT = TOKENIZER.encode("Hello there. ")
LAYERS, TOP_K = 3, 2
SIZES = {
    "num_hidden_layers": LAYERS, "hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 8, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 64, "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None,
}  # fmt: skip


def settings(folder: Path) -> Settings:
    """Of a run on one server of the mixture in `folder`, in float32 so that no choice is near a tie by rounding."""
    servers = {"start_timeout": 600, "device": "cpu", "api_key_env": KEY_VARIABLE}
    return parse(
        {
            "run": folder / "run",
            "model": {"path": folder / "model"},
            "data": {"train": []},
            "precision": {"dtype": "fp32"},
            "rollout": {"engine": "sglang", "replay_routing": True, "servers": servers},
        }
    )


def check(model: Any, prompt: list[int], made: Generation) -> None:
    """All but the newest token's experts are transformers', in any order; and so are the log-probs."""
    whole = [*prompt, *made.token_ids]
    with torch.no_grad():
        out = model(torch.tensor([whole]), output_router_logits=True)
    wanted = torch.stack([layer.topk(TOP_K).indices for layer in out.router_logits], 1).sort(-1).values.numpy()
    assert made.experts.dtype == np.int16 and made.experts.shape == (len(whole) - 1, LAYERS, TOP_K)
    np.testing.assert_array_equal(np.sort(made.experts, -1), wanted[:-1])
    table = out.logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    expected = [row[token].item() for row, token in zip(table, made.token_ids, strict=True)]
    np.testing.assert_allclose(made.logprobs, expected, atol=1e-3)


def test_reported_experts_are_the_models(tmp_path: Path) -> None:
    """Of many requests at once, at stops that cut what was sampled, behind a cached prefix, and after new weights."""
    model = write_model(tmp_path / "model", "qwen3_moe", **SIZES)
    TOKENIZER.save_pretrained(tmp_path / "model")
    other = write_model(tmp_path / "other", "qwen3_moe", seed=1, **SIZES)
    sampling = Sampling(max_tokens=40, stop_words=("the", "a", "I"), experts=True)

    async def ask(pool: Pool, policy: Any) -> None:
        asked = (pool.generate(PROMPT, sampling._replace(seed=i), f"g{i}/0|0") for i in range(32))
        made = await asyncio.gather(*asked)
        assert {"stop", "length"} == {generation.finish for generation in made}
        for generation in made:
            check(policy, PROMPT, generation)
        known = [*PROMPT, *made[0].token_ids]
        going_on = sampling._replace(offset=len(made[0].token_ids), max_tokens=8, stop_words=())
        check(policy, known, await pool.generate(known, going_on, "g0/0|1"))
        assert (await pool.generate(PROMPT, Sampling(4), "plain/0|0")).experts is None

    async def run() -> None:
        pool = factory.build(settings(tmp_path), Vocabulary(TOKENIZER))
        try:
            await pool.start()
            await ask(pool, model)
            await pool.update_weights(1, named(other))
            await ask(pool, other)
        finally:
            await pool.close()

    asyncio.run(run())


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    """As a learner sends them: each expert's matrices by names of their own."""
    found = []
    for name, tensor in model.state_dict().items():
        prefix, stacked, matrix = name.partition(".experts.")
        if not stacked:
            found.append((name, tensor))
            continue
        parts = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
        for i, expert in enumerate(tensor):
            for part, piece in zip(parts, expert.chunk(len(parts)), strict=True):
                found.append((f"{prefix}.experts.{i}.{part}.weight", piece.contiguous()))
    return found
