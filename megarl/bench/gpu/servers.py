"""Weights from a learner on the first device to a real server on the second."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from megarl.bench.common.learners import new_learner, settings
from megarl.bench.common.models import write_model
from megarl.bench.gpu.part import Scale
from megarl.bench.weight_sync import byte_tokenizer
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.servers import factory
from megarl.runtime import device

UPDATES = 3


def weight_sync(scale: Scale, folder: Path, engine: str) -> dict[str, Any]:
    """Seconds of the first update, which forms the group, and of later ones. The rehearsal has megarl's own server."""
    tokenizer = byte_tokenizer()
    model = folder / "model"
    tokenizer.save_pretrained(model)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    sizes: Any = {**scale.small, "max_position_embeddings": 2048, **ends}
    if not scale.rehearsal:
        sizes |= {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8}
    write_model(model, tied=True, **sizes)
    dtype = "fp32" if scale.rehearsal else "bf16"
    chosen = settings(model, precision={"dtype": dtype}, rollout={"engine": "local" if scale.rehearsal else engine})
    learner = new_learner(chosen)
    if device.on_cuda():  # the server's device; this process has its own already
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[1]
    return asyncio.run(_updates(learner, factory.build(chosen, Vocabulary(tokenizer))))


async def _updates(learner: Any, pool: Any) -> dict[str, Any]:
    size = sum(tensor.nbytes for _, tensor in learner.named_tensors())
    seconds = []
    begun = time.perf_counter()
    await pool.start()
    try:
        started = time.perf_counter() - begun
        for version in range(UPDATES):
            begun = time.perf_counter()
            await pool.update_weights(version, learner.named_tensors())
            seconds.append(time.perf_counter() - begun)
    finally:
        await pool.close()
    return {
        "server_start_s": started,
        "megabytes": size / 1e6,
        "first_s": seconds[0],
        "later_s": min(seconds[1:]),
        "gb_per_s": size / 1e9 / min(seconds[1:]),
    }
