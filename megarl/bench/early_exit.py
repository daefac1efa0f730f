"""What early exit costs on the `local` engine: time against plain generation of the same tokens, interleaved.

The quick start's reasoner solves held-out problems, all at once, under the quick start's settings. `every` probes at
every marker. This model writes one in nine tokens, large models write one in about a hundred: `once` therefore probes
only at a completion's first marker. `once_whole` does so without ending rejected probes early. Each run is followed by
two plain ones with the same number of tokens for each request. `overhead` compares with the tokens of the completions,
so it includes the probes' tokens. `machinery` compares with all decoded tokens (completions, probes, discarded ones).
It is the cost of stopping, branching, asking and continuing, whatever the number of markers.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from megarl import config
from megarl.bench.common import result
from megarl.data.prompts import read_prompts
from megarl.errors import UserError
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout import groups
from megarl.rollout.detokenize import vocabulary_of
from megarl.rollout.early_exit import plan, thinker
from megarl.rollout.local.engine import LocalEngine
from megarl.types import Completion, Prompt, derive_seed
from megarl.view import table

CONFIG = Path("examples/quickstart/train.yaml")
ONCE = ["rollout.early_exit.max_probes=1"]
PROBES = {"every": [], "once": ONCE, "once_whole": [*ONCE, "rollout.early_exit.reject_early=false"]}


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    batch: Annotated[int, typer.Option(help="Completions at once.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each kind.")] = 15,
) -> None:
    """Median overhead of each schedule, and what was generated.

    `cpu_` figures count CPU time, for machines that are busy with something else.
    """
    if not CONFIG.is_file():
        raise UserError(f"early_exit: {CONFIG} does not exist; run this benchmark from the repository's root")
    rows = []
    for probes in PROBES:
        for schedule in ("blocking", "speculative"):
            with asyncio.Runner() as runner:
                rows.append(runner.run(_measure(schedule, probes, batch, repeats)))
            table.show_rows("so far", rows)
    result.publish("early_exit", rows, json, threads=torch.get_num_threads(), batch=batch)


async def _measure(schedule: str, probes: str, batch: int, repeats: int) -> dict[str, Any]:
    settings = config.load(CONFIG, [f"rollout.early_exit.schedule={schedule}", *PROBES[probes]])
    tokenizer = load_tokenizer(settings.model.path)
    vocabulary = vocabulary_of(tokenizer, settings.model.path)
    table, _ = read_prompts(settings.data.eval, tokenizer, settings.data, setting="data.eval")
    prompts = [table[i] for i in range(batch)]
    exit_plan = plan.Plan.of(settings.rollout, vocabulary)
    exits = settings.rollout.early_exit
    weights = load_file(settings.model.path / "model.safetensors")
    # Room for every completion's probe beside it.
    engine = LocalEngine(
        settings.model.path,
        vocabulary,
        batch_slots=2 * batch,
        max_length=settings.longest_sequence + exits.max_probes * exits.probe_tokens + exits.probe_tokens,
    )
    seconds: dict[str, list[float]] = {"early": [], "same": [], "decoded": []}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    made: list[Completion] = []

    async def timed(name: str, work: Sequence[Coroutine[Any, Any, Completion]]) -> list[Completion]:
        await engine.update_weights(0, weights.items())  # empties the cache
        begun, cpu_begun = time.perf_counter(), time.process_time()
        found = await asyncio.gather(*work)
        seconds[name].append(time.perf_counter() - begun)
        cpu[name].append(time.process_time() - cpu_begun)
        return found

    def plain(prompt: Prompt, index: int, seed: int, length: int) -> Coroutine[Any, Any, Completion]:
        sampling = exit_plan.sampling._replace(max_tokens=length, stop_token_ids=())
        return groups.plain(engine, prompt, index, sampling, vocabulary, seed, f"plain/{index}")

    for repeat in range(repeats + 1):
        seeds = [derive_seed(settings.seed, repeat, prompt.uid) for prompt in prompts]
        jobs = list(zip(prompts, range(batch), seeds, strict=True))
        found = await timed("early", [thinker.complete(engine, p, i, exit_plan, s, f"early/{i}") for p, i, s in jobs])
        for name, length in (("same", len), ("decoded", _decoded)):
            lengths = [length(completion) for completion in found]
            await timed(name, [plain(*job, n) for job, n in zip(jobs, lengths, strict=True)])
        if repeat:
            made += found
        else:  # a warm-up
            for values in (*seconds.values(), *cpu.values()):
                values.clear()
    await engine.close()
    return {
        "schedule": schedule,
        "probes": probes,
        "overhead": _overhead(seconds["early"], seconds["same"]),
        "cpu_overhead": _overhead(cpu["early"], cpu["same"]),
        "machinery": _overhead(seconds["early"], seconds["decoded"]),
        "cpu_machinery": _overhead(cpu["early"], cpu["decoded"]),
        "seconds": statistics.median(seconds["early"]),
        "slowest": max(seconds["early"]),
        "fastest": min(seconds["early"]),
        **_content(made),
    }


def _overhead(taken: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(taken, plain, strict=True)) - 1


def _decoded(completion: Completion) -> int:
    """How many tokens were sampled, kept or not, and inserted."""
    return len(completion) + completion.discarded_tokens + sum(len(p.token_ids) for p in completion.probes)


def _content(made: list[Completion]) -> dict[str, float]:
    """Means over the completions of all runs."""
    probes = sum(len(c.probes) for c in made)
    tokens = sum(map(len, made))
    return {
        "tokens": tokens / len(made),
        "probes_each": probes / len(made),
        "tokens_between_probes": tokens / max(probes, 1),
        "tokens_a_probe": sum(len(p.token_ids) for c in made for p in c.probes) / max(probes, 1),
        "discarded": sum(c.discarded_tokens for c in made) / len(made),
        "exits": sum(c.exit_reason == "confident" for c in made) / len(made),
    }
