"""vLLM servers: the tokens-in, tokens-out protocol, and the command that starts one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megarl.errors import DeadlineExceeded
from megarl.rollout import in_engine
from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine import megarl_guard
from megarl.rollout.servers.http import ServerError
from megarl.rollout.servers.remote import CONTROL_TIMEOUT, RemoteEngine, Segment, field_of
from megarl.rollout.weights.verify import Checksums
from megarl.types import derive_seed

POLL = 0.05  # seconds between attempts to drop cached prefixes
MODEL = "policy"  # the name of the server's one model
EXTENSION = "megarl_weights.WeightReader"  # runs in the server's workers; see in_engine/
MIDDLEWARE = "megarl_guard.Guard"  # runs in the HTTP layer; vLLM's own key leaves the control endpoints open


class VLLMEngine(RemoteEngine):
    """A vLLM server started with VLLM_SERVER_DEV_MODE=1 and `--logprobs-mode processed_logprobs`.

    Seeds: the server's random stream starts with the request, so each call gets a seed derived from (seed, offset). A
    repeated call draws the same tokens. A continuation does not draw what an uninterrupted call would have drawn.
    Log-probs: the server reports them *after* top-p and top-k, but the contract wants them before. With either in use
    they are nan. Training needs top_p = 1 and top_k = 0 here; see `factory.check`.
    Stops: a stand-alone word is confirmed by a request for one more token.
    Experts are not reported: `--enable-return-routed-experts` needs vLLM's model runner V2, which needs Triton. Our CPU
    environment has no Triton, so this is untested.
    """

    kind = "vllm"
    _read: Sequence[Mapping[str, str]] = ()  # checksums of the last load in hexadecimal, for each of the server's ranks

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
            CONTROL_TIMEOUT,
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
            self.load_timeout(folder),
        )
        self._read = field_of(answer, "results")
        label = {"new_version": self.label(version)}
        await self._post("/update_weight_version", label, f"take weight version {version}", CONTROL_TIMEOUT)
        await self._drop_prefixes()
        self.version = version

    async def _drop_prefixes(self) -> None:
        """Retries: the server refuses while an aborted request still has cache blocks."""
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT):
                while True:
                    answer = await self._post("/reset_prefix_cache", None, "drop cached prefixes", CONTROL_TIMEOUT)
                    if field_of(answer, "success"):
                        return
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise DeadlineExceeded(f"{self.name} to drop cached prefixes", CONTROL_TIMEOUT) from None

    def digests(self) -> Checksums:
        """Of what the ranks read. On a CPU vLLM repacks what it loads: only the canary checks the result."""
        return Checksums(complete=True)

    async def reported_digests(self) -> Sequence[Mapping[str, int]]:
        return [{name: int(text, 16) for name, text in sums.items()} for sums in self._read]

    async def segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        texts, ids = self._stop_hints(sampling)
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
                    "ignore_eos": True,  # all stops are listed above
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

    async def abort_segment(self, server_id: str) -> None:
        await self._post(
            "/abort_requests", {"request_ids": [f"generate-tokens-{server_id}"]}, "abort a request", CONTROL_TIMEOUT
        )

    async def abort_all(self) -> None:
        await self._tell("/abort_requests", {}, "abort its requests")


def command(
    port: int, *, python: Path, model: Path, dtype: str, cuda: bool, weights: str, flags: Sequence[str]
) -> list[str]:
    """The server's command line. `flags` come last and override the others."""
    common = ["--model", model, "--host", "127.0.0.1", "--dtype", dtype, "--served-model-name", MODEL]
    common += ["--logprobs-mode", "processed_logprobs", "--enable-scale-out", "--generation-config", "vllm"]
    common += ["--disable-uvicorn-access-log", "--worker-extension-cls", EXTENSION]
    common += ["--middleware", MIDDLEWARE]
    if weights == "random":
        common += ["--load-format", "dummy"]
    if not cuda:
        common += ["--enforce-eager"]
    program = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    return [*program, *map(str, common), "--port", str(port), *flags]


def environment(*, cuda: bool, api_key: str | None) -> dict[str, str]:
    """Variables that the server needs in addition to ours.

    They enable the control endpoints, locate EXTENSION and MIDDLEWARE, pass the key (anyone may read a command line),
    and set a CPU's cache size in GiB.
    """
    dev = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(in_engine.__file__).resolve().parent)}
    dev[megarl_guard.KEY_VARIABLE] = api_key or ""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    cpu["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "1800"  # a busy CPU takes minutes for a first token; our timeouts apply
    return {**dev, **({} if cuda else cpu)}
