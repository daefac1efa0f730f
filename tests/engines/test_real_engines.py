"""Real SGLang and vLLM servers on the CPU: tokens, log-probs, stops, seeds, aborts, and weights that really arrive.

Nothing here says anything about CUDA kernels or several tensor-parallel ranks.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.errors import RunError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.in_engine.megarl_sglang import HIDDEN
from megarl.rollout.servers.pool import Pool
from megarl.rollout.stops import Stops
from megarl.rollout.weights import shared_memory, verify
from megarl.rollout.weights.broadcast import BroadcastTransport
from megarl.rollout.weights.disk import DiskTransport
from megarl.rollout.weights.shared_memory import SharedMemoryTransport
from megarl.rollout.weights.transport import Transport
from megarl.rollout.weights.verify import Canary
from megarl.types import Span
from tests.support.real_servers import BF16, CANARY, TOKENIZER, Live, Policy
from tests.support.server_processes import GUARDED, check_the_key
from tests.support.tiny_policy import make_model, reference_logprobs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500)]

PROMPT = TOKENIZER.encode("Hello there. ")


LONG = Sampling(max_tokens=1900)
ATTEMPTS = 5  # at cutting a LONG request short: now and then a server is done with it just before


def next_policy(policy: Policy, tmp_path: Path, seed: int) -> Policy:
    """Other weights of the same model."""
    return Policy(tmp_path / "next", make_model(tmp_path / "next", seed=seed))


def test_tokens_and_logprobs_are_the_models(live: Live, policy: Policy) -> None:
    """Sampled, greedy, at another temperature, and scored: all against transformers in bf16."""
    for sampling in (Sampling(max_tokens=24), Sampling(max_tokens=24, temperature=0.0)):
        generation = live.runner.run(live.pool.generate(PROMPT, sampling, "g/0|0"))
        assert len(generation.token_ids) == 24 and generation.finish == "length"
        expected = reference_logprobs(policy.model, PROMPT + generation.token_ids)[len(PROMPT) - 1 :]
        assert max(abs(a - b) for a, b in zip(generation.logprobs, expected, strict=True)) <= BF16
    generation = live.runner.run(live.pool.generate(PROMPT, Sampling(max_tokens=8, temperature=0.5), "g/0|0"))
    with torch.no_grad():
        logits = policy.model(torch.tensor([PROMPT + generation.token_ids])).logits[0].float() / 0.5
    table = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
    expected = [row[token].item() for row, token in zip(table, generation.token_ids, strict=True)]
    assert max(abs(a - b) for a, b in zip(generation.logprobs, expected, strict=True)) <= 2 * BF16
    scores = live.runner.run(live.pool.score(CANARY))
    expected = reference_logprobs(policy.model, CANARY)
    assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) <= BF16


def test_the_api_key_guards_the_server_and_is_nowhere_to_be_read(live: Live, api_key: str) -> None:
    """Of what generates and of what controls. SGLang logs all its settings: the key is among them, but not shown."""
    engine = live.pool.engines[0]
    assert engine.server is not None
    live.runner.run(check_the_key(engine.server, api_key, *GUARDED[engine.kind]))
    assert engine.kind != "sglang" or f"'api_key': '{HIDDEN}'" in engine.server.log.read_text()


def test_stops_are_exact_on_a_real_server(live: Live, policy: Policy) -> None:
    """Words that the policy says by chance. Every stop is a stand-alone word with its confirming token, and no
    generation holds an earlier one; the end of text stops too."""
    end = TOKENIZER.eos_token_id
    sampling = Sampling(max_tokens=300, stop_words=("the", "a", "I"), stop_token_ids=(end,))

    async def ask() -> list:
        return await asyncio.gather(
            *(live.pool.generate(PROMPT, sampling._replace(seed=i), f"g{i}/0|0") for i in range(16))
        )

    generations = live.runner.run(ask())
    words = [g for g in generations if isinstance(g.matched_stop, str)]
    assert words and all(g.finish == "stop" for g in generations if g.matched_stop)
    for g in words:
        assert g.matched_stop in TOKENIZER.decode(g.token_ids[g.stop_start :])
        stops = Stops(sampling, Vocabulary(TOKENIZER), len(TOKENIZER))
        for n in range(1, len(g.token_ids)):
            assert stops.check(g.token_ids, 0, n)[0] is None
        assert stops.check(g.token_ids, 0, len(g.token_ids))[0] is not None


def test_seeds(live: Live) -> None:
    """The same request draws the same on vLLM. On a CPU, SGLang cannot: its seeded kernels are CUDA's."""
    if live.pool.engines[0].kind == "sglang":
        return
    sampling = Sampling(max_tokens=32, seed=11)
    first = live.runner.run(live.pool.generate(PROMPT, sampling, "g/0|0"))
    again = live.runner.run(live.pool.generate(PROMPT, sampling, "g/1|0"))
    other = live.runner.run(live.pool.generate(PROMPT, sampling._replace(seed=12), "g/2|0"))
    assert first.token_ids == again.token_ids != other.token_ids


def test_an_abort_ends_a_request_early_with_its_tokens(live: Live) -> None:
    async def attempt(number: int) -> Generation:
        task = asyncio.ensure_future(live.pool.generate(PROMPT, LONG, f"g/{number}|0"))
        beside = await live.pool.generate(PROMPT, Sampling(max_tokens=8), "h/0|0")  # by then the other runs
        assert len(beside.token_ids) == 8
        await live.pool.abort(f"g/{number}|0")
        return await task

    generation = next(g for g in map(live.runner.run, map(attempt, range(ATTEMPTS))) if g.finish == "abort")
    assert 0 < len(generation.token_ids) < LONG.max_tokens
    assert len(generation.logprobs) == len(generation.token_ids)


async def sync(pool: Pool, version: int, tensors: Iterable[tuple[str, torch.Tensor]], canary: Canary) -> None:
    """As the run does after every step."""
    await verify.send(pool, version, tensors)
    await verify.check(pool, version, canary, BF16)


def transports(pool: Pool, policy: Policy, tmp_path: Path) -> Iterator[tuple[str, Transport]]:
    """Every way for weights that this kind of server takes; small buckets, so that there are several."""
    yield "disk", DiskTransport(tmp_path / "weights", policy.folder, torch.bfloat16, bucket=1 << 17)
    if pool.engines[0].kind == "sglang":
        yield "tensor", SharedMemoryTransport(torch.bfloat16, bucket=1 << 17)
        yield "distributed", BroadcastTransport(torch.bfloat16, bucket=1 << 17)


def test_weights_arrive_by_every_way_while_a_request_runs(
    live: Live, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each update the server's log-probs are the new model's; a request cut by it goes on under the new weights
    with a span for each version; then the first weights are put back for the next test."""
    pool = live.pool
    updated = next_policy(policy, tmp_path, seed=1)
    versions = itertools.count(101)

    async def update(source: Policy) -> bool:
        """New weights into the middle of a request, which is aborted some tokens later; whether it was cut by them."""
        version = next(versions)
        asked: list[str] = []
        arrived = asyncio.Event()

        async def ask() -> Generation:
            """One request after the other: a small model is soon done with one, and the update shall meet the next."""
            while True:
                asked.append(f"g/{len(asked)}|0")
                generation = await pool.generate(PROMPT, LONG, asked[-1])
                if arrived.is_set():
                    return generation

        running = asyncio.ensure_future(ask())
        await pool.generate(PROMPT, Sampling(max_tokens=4), "h/1|0")
        await sync(pool, version, source.tensors(), source.canary())
        arrived.set()
        await pool.generate(PROMPT, Sampling(max_tokens=32), "h/2|0")
        await pool.abort(asked[-1])
        generation = await running
        if len(generation.spans) == 1:
            return False
        before, after = generation.spans
        assert before.start == 0 and after == Span(version, before.end, len(generation.token_ids))
        tail = reference_logprobs(source.model, PROMPT + generation.token_ids)[len(PROMPT) - 1 + after.start :]
        differences = [abs(a - b) for a, b in zip(generation.logprobs[after.start :], tail, strict=True)]
        assert differences and max(differences) <= BF16
        return True

    for _, transport in transports(pool, policy, tmp_path):
        monkeypatch.setattr(pool, "transport", transport)
        for source in (updated, policy):
            assert any(live.runner.run(update(source)) for _ in range(ATTEMPTS))
        live.runner.run(transport.close())


VICTIM = "model.layers.1.self_attn.k_proj.weight"


def sabotaged_disk(folder: Path, sabotage: str) -> None:
    """Damage VICTIM in a written folder, or take it away."""
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    file = folder / placed["weight_map"][VICTIM]
    held = load_file(file)
    tensor = held.pop(VICTIM)
    if sabotage == "corrupted":
        held[VICTIM] = -tensor
    save_file(held, file, {"format": "pt"})
    if sabotage == "lost":
        del placed["weight_map"][VICTIM]
        index.write_text(json.dumps(placed))


@pytest.mark.parametrize("sabotage", ["corrupted", "lost", "stale", "not sent", "untied"])
def test_a_sabotaged_sync_stops_and_names_the_tensor(
    live: Live, policy: Policy, tmp_path: Path, sabotage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every way whose bytes the servers read themselves: one tensor damaged or lost after the trainer's own check,
    an update that the server only claims, a tensor that the learner leaves out, an output layer that is no longer the
    embedding. The error is the run's: the loop calls the same `sync`.

    On a CPU. On CUDA SGLang's digests are of another kind and the canary decides alone: that has not been run.
    """
    pool, run = live.pool, live.runner.run
    engine, updated = pool.engines[0], next_policy(policy, tmp_path, seed=2)
    tensors, says = updated.tensors(), VICTIM
    load, share = engine.load_folder, shared_memory.share

    async def load_sabotaged(version: int, folder: Path) -> None:
        if sabotage == "stale":
            engine.version = version
            return
        sabotaged_disk(folder, sabotage)
        await load(version, folder)

    def share_sabotaged(bucket: list) -> tuple[torch.Tensor, str]:
        kept = [(name, tensor) for name, tensor in bucket if name != VICTIM or sabotage == "corrupted"]
        return share([(name, -tensor if name == VICTIM else tensor) for name, tensor in kept])

    if sabotage == "stale":
        says = "model.embed_tokens.weight"
    if sabotage == "not sent":
        tensors = [(name, tensor) for name, tensor in tensors if name != VICTIM]
    if sabotage == "untied":
        tensors.append(("lm_head.weight", tensors[0][1] + 1))
        says = "lm_head.weight differs from model.embed_tokens.weight"
    version = 200
    for way, transport in transports(pool, policy, tmp_path):
        if way == "distributed" or (way == "tensor" and sabotage == "stale"):
            continue
        monkeypatch.setattr(pool, "transport", transport)
        run(sync(pool, version, policy.tensors(), policy.canary()))
        if sabotage in ("corrupted", "lost", "stale"):
            monkeypatch.setattr(engine, "load_folder", load_sabotaged)
            monkeypatch.setattr(shared_memory, "share", share_sabotaged)
        with pytest.raises(RunError, match=says):
            run(sync(pool, version + 1, tensors, updated.canary()))
        monkeypatch.setattr(engine, "load_folder", load)
        monkeypatch.setattr(shared_memory, "share", share)
        run(sync(pool, version + 2, policy.tensors(), policy.canary()))
        run(transport.close())
        version += 3
