"""What the controller process pays to drive thousands of early-exit completions over many engine endpoints at once."""

from __future__ import annotations

import asyncio
import json as jsonlib
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl.bench.common import result
from megarl.config import Servers, Settings, parse
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.servers.pool import Pool
from megarl.rollout.servers.remote import Outcome, RemoteEngine
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.types import Prompt, Span

THOUGHT = "so 5+2=7 is no good. Wait, 5+9=14 is not it either. Wait, 9+2=11 fits. Wait, "
ANSWER = " 11 </think>"


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    completions: Annotated[int, typer.Option(help="Completions in flight at once.")] = 4096,
    endpoints: Annotated[int, typer.Option(help="Scripted HTTP servers that play the engines.")] = 16,
    latency: Annotated[float, typer.Option(help="Seconds after which a server answers a request.")] = 2.0,
) -> None:
    """CPU milliseconds of the controller per completion (three thoughts, three probes, the last one accepted).

    Rows: `direct` drives the completions over in-process engines that answer at once; `pool` puts the pool between
    (`own_ms` is the difference: what routing, places, deadlines and retries cost); `http` is the whole, over real
    connections to servers in another process, where the client's JSON and sockets come on top.
    """
    with _Endpoints(endpoints, latency) as addresses:
        rows = asyncio.run(_measure(completions, addresses))
    result.publish("controller", rows, json)


async def _measure(completions: int, addresses: list[str]) -> list[dict[str, Any]]:
    tokenizer = _tokenizer()
    settings = _settings()
    prompt = tokenizer.encode("Q: which pair makes 11? ")
    group = settings.batch.completions_per_prompt
    prompts = [Prompt(f"p{i}", tuple(prompt), "", "11", "bench") for i in range(completions // group)]
    servers = Servers(concurrency=-(-completions // len(addresses)), addresses=addresses)
    vocabulary = Vocabulary(tokenizer)

    def cost(engine: Any) -> Any:
        return _cpu(lambda: groups.rollout(engine, prompts, settings, tokenizer, 0))

    rows: list[dict[str, Any]] = []

    def row(way: str, count: int, requests: int, seconds: float, cpu: float, at_once: int, own: float | None) -> None:
        rows.append(
            {
                "way": way,
                "endpoints": len(addresses),
                "completions": count,
                "most_at_once": at_once,
                "requests": requests,
                "seconds": seconds,
                "cpu_ms_per_completion": 1000 * cpu / count,
                "own_ms_per_completion": None if own is None else 1000 * own / count,
            }
        )

    script = _Script(tokenizer)
    instant = _Instant(script)
    await cost(instant)  # warms caches
    instant.asked = instant.most_at_once = 0
    (groups, seconds, direct) = await cost(instant)
    count = _check(groups, script)
    row("direct", count, instant.asked, seconds, direct, instant.most_at_once, None)

    instants = [_Instant(script) for _ in addresses]
    pool = Pool(instants, _NoWeights(), servers)  # type: ignore[arg-type]
    (groups, seconds, pooled) = await cost(pool)
    asked, at_once = sum(i.asked for i in instants), sum(i.most_at_once for i in instants)
    row("pool", _check(groups, script), asked, seconds, pooled, at_once, pooled - direct)

    engines: list[RemoteEngine] = [
        SGLangEngine(f"e{i}", address, vocabulary, servers, vocab_size=len(tokenizer))
        for i, address in enumerate(addresses)
    ]
    pool = Pool(engines, _NoWeights(), servers)
    await pool.start()
    meter = _Meter(pool)
    (groups, seconds, whole) = await cost(meter)
    await pool.close()
    row("http", _check(groups, script), meter.asked, seconds, whole, meter.most_at_once, pooled - direct)
    return rows


def _check(groups: Sequence[Any], script: _Script) -> int:
    """Every completion exited at the third marker, each once; returns how many there are."""
    found = [completion for group in groups for completion in group.completions]
    assert len({(completion.prompt_uid, completion.index) for completion in found}) == len(found)
    assert all(completion.exit_reason == "confident" and len(completion.probes) == 3 for completion in found)
    return len(found)


async def _cpu(work: Callable[[], Any]) -> tuple[Any, float, float]:
    begun, cpu = time.perf_counter(), time.process_time()
    result = await work()
    return result, time.perf_counter() - begun, time.process_time() - cpu


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one token for the end of the thought."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.add_tokens(["</think>"])
    return tokenizer


def _settings() -> Settings:
    return parse(
        {
            "run": "unused",
            "model": {"path": "unused"},
            "data": {"train": []},
            "batch": {"completions_per_prompt": 8},
            "rollout": {"max_response_tokens": 1024, "early_exit": {"enabled": True, "inducer": "\nAnswer:"}},
        }
    )


class _Script:
    """What every engine says: the thought, marker by marker; to the inducer an answer, sure only the third time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.thought = tokenizer.encode(THOUGHT)
        self.answer = tokenizer.encode(ANSWER)
        self.end = tokenizer.eos_token_id
        self.inducer = tokenizer.encode("\nAnswer:")
        self.prompt = len(tokenizer.encode("Q: which pair makes 11? "))
        text = THOUGHT
        self.stops = [m.end() for m in re.finditer("Wait,", text)]  # bytes are tokens

    def say(self, given: Sequence[int]) -> tuple[list[int], float]:
        """Tokens after `given` up to the next marker (or the whole answer), and the log-prob of each."""
        if list(given[-len(self.inducer) :]) == self.inducer:
            done = len(given) - len(self.inducer) - self.prompt
            return self.answer, 0.0 if done >= self.stops[1] else -1.0
        at = len(given) - self.prompt
        if at >= len(self.thought) or given[-1] == self.end:
            return [self.end], 0.0
        stop = next((stop for stop in self.stops if stop > at), None)
        return (self.thought[at:stop], -0.5) if stop else ([self.end], 0.0)


@dataclass(eq=False)
class _Instant:
    """An engine inside this process that answers at once, after one turn of the loop."""

    script: _Script
    asked: int = 0
    most_at_once: int = 0
    name: str = "instant"
    server: None = None
    _at_once: int = field(default=0)

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        self.asked += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(0)
        self._at_once -= 1
        tokens, logprob = self.script.say(token_ids)
        logprobs = [logprob] * len(tokens)
        if sampling.stop_words and len(tokens) > 5:
            return Generation(tokens, logprobs, "stop", "Wait", len(tokens) - 5, [Span(0, 0, len(tokens))])
        last = tokens[-1] if tokens[-1] in sampling.stop_token_ids else None
        return Generation(tokens, logprobs, "stop", last, None, [Span(0, 0, len(tokens))])


class _Meter:
    """Counts the requests of early exit on their way into the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.asked = self.most_at_once = self._at_once = 0

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        self.asked += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._pool.generate(token_ids, sampling, request_id)
        finally:
            self._at_once -= 1


class _NoWeights:
    async def send(self, version: int, tensors: Iterable, engines: Sequence[RemoteEngine]) -> Outcome:
        return Outcome()

    async def resend(self, engine: RemoteEngine) -> bool:
        return True

    async def close(self) -> None:
        pass


class _Endpoints:
    """Scripted SGLang servers in a process of their own; gives their addresses."""

    def __init__(self, count: int, latency: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(count, latency, theirs), daemon=True)

    def __enter__(self) -> list[str]:
        self._process.start()
        return self._ours.recv()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def _serve(count: int, latency: float, told: Connection) -> None:
    script = _Script(_tokenizer())

    async def generate(request: web.Request) -> web.Response:
        body = jsonlib.loads(await request.read())
        await asyncio.sleep(latency)
        tokens, logprob = script.say(body["input_ids"])
        tokens = tokens[: body["sampling_params"]["max_new_tokens"]]
        rows = [[logprob, token, None] for token in tokens]
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": rows, "weight_version": "default"}
        return web.Response(
            body=jsonlib.dumps({"output_ids": tokens, "meta_info": meta}), content_type="application/json"
        )

    async def nothing(request: web.Request) -> web.Response:
        return web.json_response({})

    async def serve() -> None:
        addresses = []
        for _ in range(count):
            app = web.Application()
            app.router.add_post("/generate", generate)
            app.router.add_get("/v1/models", nothing)
            app.router.add_get("/server_info", nothing)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
            await site.start()
            addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        told.send(addresses)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    typer.run(main)
