"""Wrong requests to the embedded engine's server: each is refused with one line, and costs the others nothing."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from aiohttp import web
from safetensors.torch import load_file, save_file

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.local.engine import LocalEngine
from megarl.rollout.local.server import LocalServer
from tests.support.tiny_policy import make_model, make_tokenizer

VOCABULARY = Vocabulary(make_tokenizer())
GOOD: dict[str, Any] = {"id": "good", "token_ids": [5, 6, 7], "sampling": {"max_tokens": 6, "seed": 3}}
DEEP = "[" * 100_000 + "]" * 100_000

SAMPLINGS = [  # what is wrong in it
    *({"seed": value} for value in (-1, 2**64, 2**80, 1.5, "3", None, True)),
    *({"temperature": value} for value in (-1, float("nan"), float("inf"), 1e-30, 1e30, "hot", None, True, [1])),
    *({"top_p": value} for value in (0, -0.1, 1.1, 1e-30, float("nan"), "1")),
    *({"top_k": value} for value in (-1, 2**31, 0.5, "4", None)),
    *({"offset": value} for value in (-1, 4, 2**40, "0", None)),
    *({"max_tokens": value} for value in (0, -1, 10**9, 2**70, "6", 1.5, None)),
    *({"min_logprob": value} for value in (float("nan"), float("-inf"), "-3")),
    *({"stop_token_ids": value} for value in ([-1], [10**6], ["5"], [[5]], 5, [None], [5] * 1000)),
    *({"stop_sequences": value} for value in ([[]], [[10**6]], [5], [[-1, 5]], [["a"]])),
    *({"stop_words": value} for value in ([""], [5], "Wait", [None], ["x" * 10_000], ["x"] * 1000)),
    *({"stop_texts": value} for value in ([""], [["a"]], {"a": 1}, ["x" * 10_000])),
    *({"scratch": value} for value in (1, "yes", None)),
    {"experts": True},
    {"unknown": 1},
]
BODIES = [
    *({**GOOD, "sampling": {**GOOD["sampling"], **wrong}} for wrong in SAMPLINGS),
    *({**GOOD, "token_ids": ids} for ids in ([], [999_999], [-1], [2**31], [2**70], [1.5], ["5"], [[5]], "5")),
    *({**GOOD, "token_ids": ids} for ids in (None, [None], [True], {"5": 5})),
    {**GOOD, "token_ids": [5] * 300},
    *({**GOOD, "id": name} for name in ("", None, 5, "x" * 10_000)),
    *({**GOOD, "sampling": value} for value in (None, [], "greedy")),
    *({name: value for name, value in GOOD.items() if name != left} for left in GOOD),
    [], None, "text", 5,
]  # fmt: skip
TEXTS = [b"", b"{", b"\xff\xfe", b"{}", DEEP.encode(), b"1" * 10_000, json.dumps(GOOD).encode("utf-16"), b"NaN"]
TEXTS += [json.dumps({**GOOD, "sampling": {"max_tokens": 2, "stop_texts": ["\ud800"]}}).encode()]

PIECES = [b"", b"9", b"-", b'"', b"[", b"\xff", b"e9", b"null"]  # put into requests by chance


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    make_model(folder, dtype=torch.float32)
    return folder


class Client:
    """Plain HTTP to a server of the policy, in this event loop."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session, self.address = session, address

    async def post(self, path: str, text: bytes, **headers: str) -> tuple[int, Any]:
        told = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        async with self.session.post(self.address + path, data=text, headers=told) as response:
            return response.status, await response.json()

    async def load(self, folder: Path, version: str = "1") -> tuple[int, Any]:
        return await self.post("/load", json.dumps({"version": version, "folder": str(folder)}).encode())

    async def good(self) -> Any:
        status, answer = await self.post("/generate", json.dumps(GOOD).encode())
        assert status == 200, answer
        return answer["token_ids"], answer["versions"]  # the log-probs' last bit depends on what is cached

    async def refused(self, path: str, text: bytes, status: int = 400) -> str:
        """The one line with which it is refused."""
        got, answer = await self.post(path, text)
        assert got == status, (text[:200], got, answer)
        assert "\n" not in answer["error"] and len(answer["error"]) < 500, answer
        return answer["error"]


@asynccontextmanager
async def serving(policy: Path, key: str = "") -> AsyncIterator[Client]:
    engine = LocalEngine(policy, VOCABULARY, batch_slots=4, max_length=256)
    runner = web.AppRunner(LocalServer(engine, key).application(), shutdown_timeout=0, auto_decompress=False)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    try:
        async with aiohttp.ClientSession() as session:
            yield Client(session, f"http://{host}:{port}")
    finally:
        await runner.cleanup()


def with_server(policy: Path, body: Callable[[Client], Awaitable[None]]) -> None:
    """Run `body` with a server that has weights."""

    async def main() -> None:
        async with serving(policy) as client:
            assert (await client.load(policy))[0] == 200
            await body(client)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_wrong_request_is_refused_and_the_next_one_is_answered(policy: Path) -> None:
    """Every field wrong in every way, and text that is no JSON. The engine then samples what it did before."""

    async def body(client: Client) -> None:
        expected = await client.good()
        for text in [*(json.dumps(wrong).encode() for wrong in BODIES), *TEXTS]:
            await client.refused("/generate", text)
        for text in (*TEXTS, b'{"token_ids": [999999]}', b'{"token_ids": []}', b'{"token_ids": [5, -1]}'):
            await client.refused("/score", text)
        for text in (*TEXTS, b'{"id": 5}'):
            await client.refused("/abort", text)
        assert await client.good() == expected

    with_server(policy, body)


def test_a_wrong_request_costs_those_that_run_nothing(policy: Path) -> None:
    """Sent while another request is decoded: that one has the tokens that it has alone."""

    async def body(client: Client) -> None:
        long = {**GOOD, "id": "long", "sampling": {"max_tokens": 200, "seed": 1}}
        _, expected = await client.post("/generate", json.dumps(long).encode())
        running = asyncio.ensure_future(client.post("/generate", json.dumps(long).encode()))
        for number, wrong in enumerate(BODIES):
            if running.done():
                break
            text = {**wrong, "id": f"{number}"} if isinstance(wrong, dict) and wrong.get("id") == "good" else wrong
            await client.refused("/generate", json.dumps(text).encode())
        status, answer = await running
        assert (status, answer["token_ids"]) == (200, expected["token_ids"])

    with_server(policy, body)


def test_the_error_names_the_field_its_value_and_what_is_valid(policy: Path) -> None:
    async def body(client: Client) -> None:
        bad = {**GOOD, "token_ids": [5, 999_999]}
        told = await client.refused("/generate", json.dumps(bad).encode())
        assert told == f"token_ids: 999999 is no token; the model's are 0 to {len(make_tokenizer()) - 1}"
        bad = {**GOOD, "sampling": {"max_tokens": 1, "seed": -1}}
        told = await client.refused("/generate", json.dumps(bad).encode())
        assert told == "sampling.seed: -1: Input should be greater than or equal to 0"

    with_server(policy, body)


def test_mutated_requests_end_in_an_answer_or_a_refusal(policy: Path) -> None:
    """300 requests with bytes changed, left out or put in: 200 or 4xx, never 5xx, and the engine serves on."""

    async def body(client: Client) -> None:
        expected = await client.good()
        whole = {**GOOD["sampling"], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "offset": 1, "stop_words": ["Wait"]}
        text = json.dumps({**GOOD, "sampling": {**whole, "stop_sequences": [[5, 6]], "min_logprob": -9.5}}).encode()
        draw = random.Random(0)
        statuses = set()
        for _ in range(300):
            mutated = bytearray(text)
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(len(mutated))
                mutated[at : at + draw.randint(0, 2)] = draw.choice(PIECES)
            statuses.add((await client.post("/generate", bytes(mutated)))[0])
        assert statuses == {200, 400}
        assert await client.good() == expected

    with_server(policy, body)


def test_weights_that_are_not_the_models_change_nothing(policy: Path, tmp_path: Path) -> None:
    """A folder that lacks a tensor, has one more, has another shape, is cut short, is absent or no path at all."""
    tensors = load_file(policy / "model.safetensors")
    name = "model.norm.weight"
    folders = {
        "lacks": {key: value for key, value in tensors.items() if key != name},
        "more": {**tensors, "model.extra": torch.ones(2)},
        "shape": {**tensors, name: torch.ones(3)},
    }
    for folder, wrong in folders.items():
        (tmp_path / folder).mkdir()
        save_file(wrong, tmp_path / folder / "model.safetensors")
    for folder in ("cut", "garbage", "fifo", "empty"):
        (tmp_path / folder).mkdir()
    whole = (policy / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"\xff" * 1000)
    os.mkfifo(tmp_path / "fifo" / "model.safetensors")

    async def body(client: Client) -> None:
        expected = await client.good()
        for folder in (*folders, "cut", "garbage", "fifo", "empty", "absent"):
            request = {"version": "2", "folder": str(tmp_path / folder)}
            assert str(tmp_path / folder) in await client.refused("/load", json.dumps(request).encode())
        for wrong in (
            {"folder": "/"},
            {"version": 2, "folder": "/"},
            {"version": "2", "folder": "a"},
            {"version": "2"},
            {"version": "", "folder": "/"},
        ):
            await client.refused("/load", json.dumps(wrong).encode())
        for text in (*TEXTS, b'{"version": "2", "folder": "/\\u0000"}'):
            await client.refused("/load", text)
        assert await client.good() == expected
        assert expected[1] == ["1"]

    with_server(policy, body)


@pytest.mark.slow
def test_bodies_are_json_of_a_sane_size(policy: Path) -> None:
    """Other content types and compressed bodies are not read, and large ones do not keep others waiting."""

    async def body(client: Client) -> None:
        good = json.dumps(GOOD).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
            status, answer = await client.post("/generate", good, Content_Type=kind)
            assert (status, "application/json" in answer["error"]) == (415, True)
        await client.good()
        large = b'{"id": "x", "token_ids": [' + b"5," * 10_000_000 + b"5]}"
        sending = asyncio.ensure_future(client.refused("/generate", large, 413))
        waits = []
        loop = asyncio.get_running_loop()
        while not sending.done():
            begun = loop.time()
            await client.good()
            waits.append(loop.time() - begun)
        assert "bytes" in await sending
        assert waits and max(waits) < 5

    with_server(policy, body)


@pytest.mark.parametrize("given", ["Bearer schlüssel", "Bearer \udcff", "", "Bearer ", "bearer key", "Bearer key "])
def test_any_other_key_is_refused(policy: Path, given: str) -> None:
    """Also one that is not ASCII, as raw bytes on the wire."""

    async def main() -> None:
        async with serving(policy, key="key") as client:
            reader, writer = await asyncio.open_connection(*client.address.removeprefix("http://").split(":"))
            value = given.encode("utf-8", "surrogateescape")
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: " + value + b"\r\n\r\n")
            status = (await reader.readline()).split()[1]
            writer.close()
            assert status == (b"200" if given.strip() == "Bearer key" else b"401")

    asyncio.run(asyncio.wait_for(main(), 60))
