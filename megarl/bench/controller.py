"""The CPU time that the controller needs to drive thousands of early-exit completions over many engines at once."""

from __future__ import annotations

import asyncio
import json as jsonlib
import multiprocessing
import re
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from aiohttp import web
from transformers import PreTrainedTokenizerFast

from megarl.bench.common import result
from megarl.bench.weight_sync import byte_tokenizer
from megarl.config import Servers, Settings, parse
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.groups import rollout
from megarl.rollout.servers.pool import Pool
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.weights.transport import Outcome
from megarl.types import Prompt, Span

THOUGHT = "so 5+2=7 is no good. Wait, 5+9=14 is not it either. Wait, 9+2=11 fits. Wait, "
ANSWER = " 11 </think>"


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    completions: Annotated[int, typer.Option(help="Completions in flight at once.")] = 4096,
    endpoints: Annotated[int, typer.Option(help="Scripted HTTP servers in place of engines.")] = 16,
    latency: Annotated[float, typer.Option(help="Seconds until a server answers a request.")] = 2.0,
) -> None:
    """CPU milliseconds of the controller per completion (three thoughts, three probes, the last one accepted).

    `direct`: in-process engines that answer at once. `pool`: the pool in front of them; `own_ms` is the difference, the
    cost of routing, queues, timeouts and retries. `http`: real connections to servers in another process, which adds
    JSON and sockets.
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

    script = _Script(tokenizer)
    pools = [
        Pool([_Instant(script) for _ in addresses], _NoWeights(), servers),  # type: ignore[misc]
        Pool(
            [
                SGLangEngine(f"e{i}", address, vocabulary, servers, vocab_size=len(tokenizer))
                for i, address in enumerate(addresses)
            ],
            _NoWeights(),
            servers,
        ),
    ]
    await pools[1].start()
    await rollout(_Instant(script), prompts, settings, tokenizer, 0)  # type: ignore[arg-type]  # warms caches
    rows: list[dict[str, Any]] = []
    for way, engine in (("direct", _Instant(script)), ("pool", pools[0]), ("http", pools[1])):
        meter = _Meter(engine)
        begun, cpu = time.perf_counter(), time.process_time()
        groups = await rollout(meter, prompts, settings, tokenizer, 0)  # type: ignore[arg-type]
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        found = [completion for group in groups for completion in group.completions]
        assert len({(completion.prompt_uid, completion.index) for completion in found}) == len(found)
        assert all(completion.exit_reason == "confident" and len(completion.probes) == 3 for completion in found)
        rows.append(
            {
                "way": way,
                "endpoints": len(addresses),
                "completions": len(found),
                "most_at_once": meter.most_at_once,
                "requests": meter.requests,
                "seconds": seconds,
                "cpu_ms_per_completion": 1000 * cpu / len(found),
                "own_ms_per_completion": None,
            }
        )
    await pools[1].close()
    for row in rows[1:]:
        row["own_ms_per_completion"] = rows[1]["cpu_ms_per_completion"] - rows[0]["cpu_ms_per_completion"]
    return rows


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
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
    """What every engine generates: the thought, marker by marker, and an answer that is sure the third time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.thought = tokenizer.encode(THOUGHT)
        self.answer = tokenizer.encode(ANSWER)
        self.end = tokenizer.eos_token_id
        self.inducer = tokenizer.encode("\nAnswer:")
        self.prompt = len(tokenizer.encode("Q: which pair makes 11? "))
        self.stops = [m.end() for m in re.finditer("Wait,", THOUGHT)]  # bytes are tokens

    def after(self, given: Sequence[int]) -> tuple[list[int], float]:
        """The tokens after `given` up to the next marker, or the whole answer; and the log-prob of each."""
        if list(given[-len(self.inducer) :]) == self.inducer:
            done = len(given) - len(self.inducer) - self.prompt
            return self.answer, 0.0 if done >= self.stops[1] else -1.0
        at = len(given) - self.prompt
        if at >= len(self.thought) or given[-1] == self.end:
            return [self.end], 0.0
        stop = next((stop for stop in self.stops if stop > at), None)
        return (self.thought[at:stop], -0.5) if stop else ([self.end], 0.0)


class _Instant:
    """An engine in this process that answers after one turn of the event loop."""

    name, server = "instant", None

    def __init__(self, script: _Script) -> None:
        self._script = script

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        await asyncio.sleep(0)
        tokens, logprob = self._script.after(token_ids)
        logprobs = [logprob] * len(tokens)
        if sampling.stop_words and len(tokens) > 5:
            return Generation(tokens, logprobs, "stop", "Wait", len(tokens) - 5, [Span(0, 0, len(tokens))])
        last = tokens[-1] if tokens[-1] in sampling.stop_token_ids else None
        return Generation(tokens, logprobs, "stop", last, None, [Span(0, 0, len(tokens))])


class _Meter:
    """Counts the requests to an engine."""

    def __init__(self, engine: Pool | _Instant) -> None:
        self._engine = engine
        self.requests = self.most_at_once = self._at_once = 0

    async def generate(self, token_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        self.requests += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._engine.generate(token_ids, sampling, request_id)
        finally:
            self._at_once -= 1


class _NoWeights:
    async def send(self, version: int, tensors: Iterable[Any], engines: Sequence[Any]) -> Outcome:
        return Outcome()

    async def resend(self, engine: Any) -> bool:
        return True

    async def close(self) -> None:
        pass


class _Endpoints:
    """Scripted SGLang servers in another process. `with` gives their addresses."""

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


def _serve(count: int, latency: float, addresses_to: Connection) -> None:
    script = _Script(_tokenizer())

    async def generate(request: web.Request) -> web.Response:
        body = jsonlib.loads(await request.read())
        await asyncio.sleep(latency)
        tokens, logprob = script.after(body["input_ids"])
        tokens = tokens[: body["sampling_params"]["max_new_tokens"]]
        rows = [[logprob, token, None] for token in tokens]
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": rows, "weight_version": "default"}
        return web.Response(
            body=jsonlib.dumps({"output_ids": tokens, "meta_info": meta}), content_type="application/json"
        )

    async def empty(request: web.Request) -> web.Response:
        return web.json_response({})

    async def serve() -> None:
        addresses = []
        for _ in range(count):
            app = web.Application()
            app.router.add_post("/generate", generate)
            app.router.add_get("/v1/models", empty)
            app.router.add_get("/server_info", empty)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
            await site.start()
            addresses.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        addresses_to.send(addresses)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    typer.run(main)
