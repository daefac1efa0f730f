"""Tokens a second of the rollout engines on mixed lengths, in one run, interleaved. transformers' `generate` is 1.0.

Each request has its own response length, at which every engine must end: all make the same number of tokens. megarl's
engines return the log-prob of every token, `generate` returns none. All requests of a batch are made at once, so an
engine gains if it drops finished rows from its batch.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from megarl.bench.common import result
from megarl.bench.common.choice import chosen
from megarl.bench.common.models import Sizes, write_model
from megarl.config import parse
from megarl.errors import UserError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Engine, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.servers import factory
from megarl.rollout.servers.pool import Pool
from megarl.view import table

# A random model in which the matrix products dominate.
WIDER = Sizes(
    hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
    head_dim=64, vocab_size=2048, initializer_range=0.02,
)  # fmt: skip
SERVERS = ("sglang", "vllm")  # each in its own process
REASONER = Path("examples/quickstart/reasoner")


@dataclass(frozen=True)
class Work:
    """One batch of requests: token ids of the prompts, and the length of each response."""

    prompts: list[list[int]]
    lengths: list[int]
    vocabulary: int

    def shifted(self, by: int) -> list[list[int]]:
        """Other prompts of the same lengths, which share nothing with an engine's cache."""
        return [[3 + (t - 3 + by) % (self.vocabulary - 3) for t in p] for p in self.prompts]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(len(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))


Run = Callable[[Work], None]  # does the work once, or raises


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    engines: Annotated[
        str, typer.Option(help="Comma-separated: local, transformers, sglang, vllm (servers: `make engines`).")
    ] = "local,transformers",
    models: Annotated[str, typer.Option(help="reasoner, wider (random, 4 layers of 384).")] = "reasoner,wider",
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,16,64,256",
    repeats: Annotated[int, typer.Option(help="Timed runs of each engine and batch.")] = 5,
) -> None:
    """Median tokens a second of each engine, its spread, and the ratio to transformers' `generate`.

    `ratio` is the median over the repeats, each of which times the engines one after the other. `cpu_ratio` is the same
    of this process's CPU time, for machines that are busy with something else. Servers run in other processes and have
    none.
    """
    names = chosen(engines, [*ENGINES, *SERVERS], "engines")
    rows: list[dict[str, Any]] = []
    for model in chosen(models, MODELS, "models"):
        with (
            tempfile.TemporaryDirectory() as scratch,
            asyncio.Runner() as runner,
            closing(_Servers(runner, folder := MODELS[model](Path(scratch)))) as servers,
        ):
            for size in _sizes(batches):
                rows += _measure(model, folder, names, size, repeats, runner, servers)
                table.show_rows("so far", rows)
    result.publish("rollout", rows, json, threads=torch.get_num_threads())


def _sizes(given: str) -> list[int]:
    try:
        sizes = [int(size) for size in given.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UserError(f"--batches: {given!r} are not whole numbers from 1 on, such as 1,16,64")
    return sizes


def draw(vocabulary: int, size: int, seed: int = 0) -> Work:
    """Prompts of 8 to 32 tokens; responses log-normal around 64 tokens, 8 to 160."""
    rng = np.random.default_rng([seed, size])
    prompts = [rng.integers(3, vocabulary, n).tolist() for n in rng.integers(8, 33, size)]
    lengths = np.clip(rng.lognormal(np.log(64), 0.6, size), 8, 160).astype(int)
    return Work(prompts, lengths.tolist(), vocabulary)


def _measure(
    model: str, folder: Path, names: list[str], size: int, repeats: int, runner: asyncio.Runner, servers: _Servers
) -> list[dict[str, Any]]:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    work = draw(reference.config.vocab_size, size)
    passes = max(1, 16 // size)  # of small batches several, for a time long enough to measure
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    runs = {
        name: by_contract(runner, servers.pool(name))
        if name in SERVERS
        else ENGINES[name](runner, folder, reference, work)
        for name in names
    }
    for run in runs.values():
        run(work)  # warms caches
    for repeat in range(repeats):
        for name in names if repeat % 2 else reversed(names):
            begun, cpu_begun = time.perf_counter(), time.process_time()
            for _ in range(passes):
                runs[name](work)
            seconds[name].append((time.perf_counter() - begun) / passes)
            cpu[name].append((time.process_time() - cpu_begun) / passes)
    return [
        {
            "model": model,
            "batch": size,
            "engine": name,
            "logprobs": name != "transformers",
            "tokens": work.tokens,
            "tokens_per_s": work.tokens / statistics.median(taken),
            "slowest": work.tokens / max(taken),
            "fastest": work.tokens / min(taken),
            "ratio": _ratio(seconds.get("transformers"), taken),
            "cpu_ratio": None if name in SERVERS else _ratio(cpu.get("transformers"), cpu[name]),
        }
        for name, taken in seconds.items()
    ]


def _ratio(reference: list[float] | None, taken: list[float]) -> float | None:
    """Median over the repeats of how much faster than transformers; None when that did not run."""
    return statistics.median(a / b for a, b in zip(reference, taken, strict=True)) if reference else None


# Each engine is a function of (event loop, model folder, transformers' model, work) → a function that does the work.


def _local(runner: asyncio.Runner, folder: Path, model: Any, work: Work) -> Run:
    vocabulary = Vocabulary(NoTokenizer())  # type: ignore[arg-type]
    engine = LocalEngine(folder, vocabulary, batch_slots=len(work.prompts), max_length=work.longest)
    runner.run(engine.update_weights(0, model.state_dict().items()))
    return by_contract(runner, engine)


def by_contract(runner: asyncio.Runner, engine: Engine) -> Run:
    """Does the work on any `Engine`, all requests at once."""
    turns = count()

    async def everything(work: Work) -> None:
        turn = next(turns)
        jobs = [
            engine.generate(prompt, Sampling(max_tokens=length, seed=turn), f"{turn}/{i}|0")
            for i, (prompt, length) in enumerate(zip(work.shifted(turn), work.lengths, strict=True))
        ]
        found = await asyncio.gather(*jobs)
        assert [len(g.token_ids) for g in found] == [len(g.logprobs) for g in found] == work.lengths

    return lambda work: runner.run(everything(work))


def _transformers(runner: asyncio.Runner, folder: Path, model: Any, work: Work) -> Run:
    longest = max(len(p) for p in work.prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in work.prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in work.prompts])
    limits = torch.tensor(work.lengths) + longest
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    class Limits(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] >= limits

    def run(work: Work) -> None:
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max(work.lengths),
                stopping_criteria=StoppingCriteriaList([Limits()]),
            )
        assert made.shape[1] == longest + max(work.lengths)

    return run


class _Servers:
    """Real servers of one model, one of each kind, started on first use."""

    def __init__(self, runner: asyncio.Runner, folder: Path) -> None:
        self._runner, self._folder = runner, folder
        self._pools: dict[str, Pool] = {}
        self._scratch = tempfile.TemporaryDirectory()

    def pool(self, kind: str) -> Pool:
        if kind not in self._pools:
            flags = [] if (self._folder / "tokenizer.json").exists() else ["--skip-tokenizer-init"]
            model = {"model": {"path": str(self._folder)}, "precision": {"dtype": "fp32"}, "data": {"train": []}}
            rollout = {"engine": kind, "servers": {"flags": flags}}
            settings = parse({"run": self._scratch.name, **model, "rollout": rollout})
            pool = factory.build(settings, Vocabulary(NoTokenizer()))  # type: ignore[arg-type]
            self._runner.run(pool.start())
            self._pools[kind] = pool
        return self._pools[kind]

    def close(self) -> None:
        for pool in self._pools.values():
            self._runner.run(pool.close())
        self._scratch.cleanup()


class NoTokenizer:
    """Requests without stops need no text."""

    eos_token_id = None


def _reasoner(scratch: Path) -> Path:
    if not REASONER.is_dir():
        raise UserError(f"--models: {REASONER} does not exist; run this benchmark from the repository's root")
    return REASONER


def _wider(scratch: Path) -> Path:
    write_model(scratch, **WIDER)
    return scratch


ENGINES: dict[str, Callable[[asyncio.Runner, Path, Any, Work], Run]] = {
    "local": _local,
    "transformers": _transformers,
}
MODELS: dict[str, Callable[[Path], Path]] = {"reasoner": _reasoner, "wider": _wider}
