"""vLLM servers: its tokens-in, tokens-out protocol, and how megarl starts one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megarl.errors import DeadlineExceeded
from megarl.rollout import in_engine
from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine import megarl_guard
from megarl.rollout.in_engine.megarl_weights import checksum
from megarl.rollout.servers.http import ServerError
from megarl.rollout.servers.remote import CONTROL_DEADLINE, RemoteEngine, Segment, field_of
from megarl.types import derive_seed

POLL = 0.05  # seconds between attempts at dropping cached prefixes
MODEL = "policy"  # the name under which the server offers its one model
EXTENSION = "megarl_weights.WeightReader"  # runs in the server's workers; see in_engine/
MIDDLEWARE = "megarl_guard.Guard"  # runs in the server's front; vLLM's key alone leaves the control endpoints open


class VLLMEngine(RemoteEngine):
    """A vLLM server started with VLLM_SERVER_DEV_MODE=1 and `--logprobs-mode processed_logprobs`.

    Seeds: the server's stream begins with the request, so each call gets a seed derived from (seed, offset). A call
    repeated as it was draws the same again; a continuation does not draw what an uninterrupted call would have.
    Log-probs: at the sampling temperature and *after* top-p and top-k, which the contract does not mean: with either
    in force they are nan. Training needs top_p = 1 and top_k = 0 here; see `check`.
    Stops: a stand-alone word is confirmed by a request for one more token.
    Experts are not asked for: `--enable-return-routed-experts` needs vLLM's model runner V2, and that one a Triton for
    the device, which our CPU environment has not ("Model Runner V2 requires Triton"); what it answers is untried.
    """

    kind = "vllm"
    _read: Sequence[Mapping[str, str]] = ()  # by each of the server's ranks, at the last load

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_tokens(token_ids)
        answer = await self._post(
            "/inference/v1/generate",
            {
                "model": MODEL,
                "token_ids": list(token_ids),
                "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
            },
            f"score {len(token_ids)} tokens",
            CONTROL_DEADLINE,
        )
        rows = field_of(answer, "prompt_logprobs")
        try:
            return [float(row[str(token)]["logprob"]) for token, row in zip(token_ids[1:], rows[1:], strict=True)]
        except (KeyError, TypeError, ValueError):
            raise ServerError(f"{self.name}: scored other tokens than those sent") from None

    async def load_folder(self, version: int, folder: Path) -> None:
        answer = await self._post(
            "/collective_rpc",
            {"method": "megarl_load", "kwargs": {"folder": str(folder)}},
            f"load weights {version} from {folder}",
            CONTROL_DEADLINE,
        )
        self._read = field_of(answer, "results")
        await self._post(
            "/update_weight_version", {"new_version": str(version)}, f"take weight version {version}", CONTROL_DEADLINE
        )
        await self._drop_prefixes()
        self.version = version

    async def _drop_prefixes(self) -> None:
        """The server refuses as long as a request that was cut still holds blocks."""
        try:
            async with asyncio.timeout(CONTROL_DEADLINE):
                while True:
                    answer = await self._post("/reset_prefix_cache", None, "drop cached prefixes", CONTROL_DEADLINE)
                    if field_of(answer, "success"):
                        return
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} to drop cached prefixes", CONTROL_DEADLINE) from None

    def digests(self) -> ReadSums:
        return ReadSums()

    async def _held(self) -> Sequence[Mapping[str, str]]:
        return self._read

    async def _segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        texts, ids = self._hints(sampling)
        answer = await self._post(
            "/inference/v1/generate",
            {
                "model": MODEL,
                "request_id": server_id,
                "token_ids": token_ids,
                "sampling_params": {
                    "max_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": sampling.top_k,
                    "seed": derive_seed(sampling.seed, sampling.offset),
                    "stop": [*texts, *sampling.stop_words] if sampling.max_tokens > 1 else [],
                    "stop_token_ids": ids,
                    "ignore_eos": True,  # the stops that count are listed
                    "logprobs": 0,
                    "skip_special_tokens": False,
                    "spaces_between_special_tokens": False,
                    "include_stop_str_in_output": True,
                },
            },
            f"answer '{server_id}'",
            self.settings.attempt_timeout,
        )
        choice = field_of(answer, "choices")[0]
        made, finish = choice.get("token_ids") or [], choice.get("finish_reason")
        rows = (choice.get("logprobs") or {}).get("content") or []
        if len(rows) != len(made) or finish not in ("stop", "length", "abort"):
            raise ServerError(f"{self.name}: an answer that does not add up: {len(made)} tokens, finish '{finish}'")
        self._check_version([span.get("version") for span in choice.get("weight_versions") or []])
        truncated = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0)
        return Segment(made, [math.nan if truncated else float(row["logprob"]) for row in rows], finish)

    async def _abort(self, server_id: str) -> None:
        await self._post(
            "/abort_requests", {"request_ids": [f"generate-tokens-{server_id}"]}, "abort a request", CONTROL_DEADLINE
        )

    async def _abort_all(self) -> None:
        await self._tell("/abort_requests", {}, "abort its requests")


class ReadSums:
    """Checksums of what is sent, against those of what the server's ranks read; both by Hugging Face's names.

    vLLM on a CPU repacks what it loads, so that what it holds cannot be compared: the canary sees that.
    """

    def __init__(self) -> None:
        self._sent: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._sent[name] = f"{checksum(tensor):016x}"

    def differing(self, read: Mapping[str, str]) -> list[str]:
        """The tensors that were not read as they were sent, or not at all."""
        return [name for name, digest in self._sent.items() if read.get(name) != digest]


def command(
    python: Path, model: Path, *, dtype: str, cuda: bool, weights: str, flags: Sequence[str]
) -> Callable[[int], Sequence[str]]:
    """The server's command line, given its port. `flags` come last and override."""
    common = ["--model", model, "--host", "127.0.0.1", "--dtype", dtype, "--served-model-name", MODEL]
    common += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--generation-config", "vllm"]
    common += ["--disable-uvicorn-access-log", "--worker-extension-cls", EXTENSION]
    common += ["--middleware", MIDDLEWARE]
    if weights == "random":
        common += ["--load-format", "dummy"]
    if not cuda:
        common += ["--enforce-eager"]
    arguments = [str(part) for part in common]

    def build(port: int) -> list[str]:
        return [str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments, "--port", str(port), *flags]

    return build


def environment(*, cuda: bool, api_key: str | None) -> dict[str, str]:
    """Variables that the server needs beside ours: the control endpoints, where EXTENSION and MIDDLEWARE are found, the
    key (all may read a command line), and the size of a CPU's cache in GiB."""
    dev = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(in_engine.__file__).resolve().parent)}
    dev[megarl_guard.KEY_VARIABLE] = api_key or ""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    cpu["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "1800"  # a busy CPU takes minutes for a first token; we have deadlines
    return {**dev, **({} if cuda else cpu)}
