"""Seconds and GB/s to send a model's weights to a real server by each of its transports, verified."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl.bench.common import result
from megarl.bench.common.models import write_model
from megarl.config import parse
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.servers import factory
from megarl.rollout.weights.broadcast import BroadcastTransport
from megarl.rollout.weights.disk import DiskTransport
from megarl.rollout.weights.shared_memory import SharedMemoryTransport
from megarl.rollout.weights.transport import Transport

SIZES = {"1M": (128, 2), "30M": (512, 8), "120M": (1024, 8)}  # hidden size, layers


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    engines: Annotated[str, typer.Option(help="Comma-separated: sglang, vllm.")] = "sglang,vllm",
    sizes: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SIZES)}.")] = "1M,30M",
    repeats: Annotated[int, typer.Option(help="Updates per transport. The median is reported.")] = 3,
) -> None:
    """One server at a time on this machine.

    `moved` is the share of the model's bytes that left the trainer. The seconds include the cast, the transport, the
    loading, and the check of what arrived.
    """
    rows: list[dict[str, Any]] = []
    for engine in engines.split(","):
        for size in sizes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                rows += asyncio.run(_measure(engine, size, Path(folder), repeats))
    result.publish("weight_sync", rows, json)


async def _measure(engine: str, size: str, folder: Path, repeats: int) -> list[dict[str, Any]]:
    tokenizer, model = _model(folder / "model", *SIZES[size])
    settings = parse(
        {
            "run": str(folder / "run"),
            "model": {"path": str(folder / "model")},
            "data": {"train": []},
            "rollout": {"engine": engine},
        }
    )
    pool = factory.build(settings, Vocabulary(tokenizer))
    named = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    total = sum(tensor.nbytes for _, tensor in named)
    rows = []
    await pool.start()
    try:
        version = 0
        for mode, transport in _transports(engine, folder):
            seconds, moved = [], 0
            for _ in range(repeats):
                version += 1
                with torch.no_grad():
                    for _, tensor in named:
                        tensor.mul_(1.01)  # every tensor changes, as in training
                begun = time.perf_counter()
                outcome = await transport.send(version, named, pool.engines)
                seconds.append(time.perf_counter() - begun)
                if outcome.failures:
                    raise next(iter(outcome.failures.values()))
                moved = outcome.sent_bytes
            await transport.close()
            median = statistics.median(seconds)
            rows.append(
                {
                    "engine": engine,
                    "mode": mode,
                    "parameters": sum(tensor.numel() for _, tensor in named),
                    "megabytes": total / 1e6,
                    "seconds": median,
                    "gb_per_s": total / 1e9 / median,
                    "moved": moved / total,
                }
            )
    finally:
        await pool.close()
    return rows


def _transports(engine: str, folder: Path) -> Iterator[tuple[str, Transport]]:
    yield "disk", DiskTransport(folder / "weights", folder / "model", torch.bfloat16)
    if engine == "sglang":
        yield "tensor", SharedMemoryTransport(torch.bfloat16)
        yield "distributed", BroadcastTransport(torch.bfloat16)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the end of the text."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def _model(folder: Path, hidden: int, layers: int) -> tuple[PreTrainedTokenizerFast, torch.nn.Module]:
    """A random Qwen3 in bfloat16, in `folder` and in memory."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    model = write_model(
        folder, tied=True, vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32,
        max_position_embeddings=2048, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return tokenizer, model.bfloat16()


if __name__ == "__main__":
    typer.run(main)
