"""SGLang servers: the native `/generate` protocol, and the command that starts one."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.errors import RunError
from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine import megarl_sglang
from megarl.rollout.in_engine.megarl_guard import NCCL
from megarl.rollout.servers.http import Refused, ServerError
from megarl.rollout.servers.remote import CONTROL_TIMEOUT, RemoteEngine, Segment, field_of
from megarl.rollout.weights.transport import transfer_timeout

REGEX_BYTES = 256  # the server's limit on a stop pattern
FUSED = {  # the server's parameter → the tensors it concatenates
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
IDLE_TIMEOUT = 60.0  # seconds for the scheduler to release requests that it has answered
VOCABULARY_STEP = 64  # the server pads the vocabulary to a multiple of it


class SGLangEngine(RemoteEngine):
    """An SGLang server.

    Seeds: with `servers.deterministic` the server draws the token at each position from (seed, position). A
    continuation with the same seed is then exact. Its kernels for that need CUDA. Without it, and so on every CPU, the
    server uses its own generator and `Sampling.seed` has no effect.
    Stops: a stand-alone word is sent as a pattern that includes the confirming character, so one request is enough.
    """

    kind = "sglang"
    ranks = 1  # processes of the server that have weights
    unreachable = ""  # why a broadcast cannot reach all of them
    _tp = 1  # tensor-parallel ranks
    _digests_known = False  # the server reports digests that `FusedDigests` can compute

    async def start(self) -> None:
        await super().start()
        info = await self.endpoint.get(
            "/server_info", timeout=CONTROL_TIMEOUT, purpose=f"{self.name} to describe itself"
        )
        self._tp, stages, copies = (int(info.get(f"{kind}_size", 1)) for kind in ("tp", "pp", "dp"))
        copies = 1 if info.get("enable_dp_attention") else copies  # those are among the tensor-parallel ranks
        self.ranks = self._tp * stages * copies
        if self.ranks != self._tp:  # the server counts only its tensor-parallel ranks
            flag = f"--pp-size {stages}" if stages > 1 else f"--dp-size {copies}"
            self.unreachable = f"a broadcast does not reach all ranks of {flag}; use 1, or weight_transport: disk"
        self._digests_known = info.get("device") == "cpu" and self.ranks == 1

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_tokens(token_ids)
        answer = await self._post(
            "/generate",
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
            f"score {len(token_ids)} tokens",
            CONTROL_TIMEOUT,
        )
        rows = field_of(answer, "meta_info", "input_token_logprobs")
        # The server reports 0 instead of the last token of the vocabulary, with the right log-prob.
        reported = [0 if token == self._vocab_size - 1 else token for token in token_ids]
        if [row[1] for row in rows] not in (list(token_ids), reported):
            raise ServerError(f"{self.name}: scored other tokens than those sent")
        return [float(row[0]) for row in rows[1:]]

    async def load_folder(self, version: int, folder: Path) -> None:
        await self._control(
            "/update_weights_from_disk",
            {"model_path": str(folder), "weight_version": self.label(version), "flush_cache": False},
            f"load weights {version} from {folder}",
            self.load_timeout(folder),
        )
        await self._drop_prefixes()
        self.version = version

    async def begin_update(self) -> None:
        """Open the session that bucket updates need. Call while paused."""
        await self._control("/begin_weight_update", {}, "begin a weight update")

    async def load_serialized(self, serialized: str) -> None:
        """Load one bucket of tensors from shared memory; see weights/shared_memory.py. Each rank takes its own item."""
        await self._control(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [serialized] * self._tp, "flush_cache": False},
            "load a bucket of tensors",
        )

    async def nccl_version(self) -> list[int] | None:
        """Of the server's NCCL. None if the server was started without megarl_sglang.py, or has none."""
        try:
            answer = await self.endpoint.get(NCCL, timeout=CONTROL_TIMEOUT, purpose=f"{self.name} to tell its NCCL")
        except Refused:
            return None
        return field_of(answer, "nccl")  # type: ignore[no-any-return]

    async def join_group(self, group: str, address: str, port: int, rank: int, world_size: int, backend: str) -> None:
        """Join a broadcast group. Returns when every member has joined."""
        await self._control(
            "/init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": rank,
                "world_size": world_size,
                "group_name": group,
                "backend": backend,
            },
            "join the weight broadcast",
        )

    async def leave_group(self, group: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": group}, "leave the weight broadcast")

    async def receive(self, group: str, named: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Receive one bucket of tensors that rank 0 broadcasts during this request."""
        await self._control(
            "/update_weights_from_distributed",
            {
                "names": [name for name, _ in named],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
                "shapes": [list(tensor.shape) for _, tensor in named],
                "group_name": group,
                "flush_cache": False,
            },
            "receive a bucket of tensors",
            CONTROL_TIMEOUT + transfer_timeout(sum(tensor.nbytes for _, tensor in named)),
        )

    async def end_update(self, version: int) -> None:
        """Close the session: the weights are complete. Drops cached prefixes of the old ones."""
        await self._control("/end_weight_update", {}, "end a weight update")
        await self._control(
            "/update_weight_version",
            {"new_version": self.label(version), "abort_all_requests": False},
            f"take weight version {version}",
        )
        await self._drop_prefixes()
        self.version = version

    async def _drop_prefixes(self) -> None:
        """Waits until idle: the scheduler answers an aborted request a moment before it releases its prefix."""
        await self._tell(f"/flush_cache?timeout={IDLE_TIMEOUT:g}", None, "drop cached prefixes")

    async def abandon_update(self) -> None:
        """Close an incomplete session, so that the next one can open. The version stays the old one."""
        with suppress(RunError):  # the server may be gone
            await self._tell("/end_weight_update", {}, "give up a weight update")

    def digests(self) -> FusedDigests | None:
        """Only for one rank on a CPU. CUDA servers hash with another algorithm, and several ranks hash their shards:
        there only the canary checks."""
        return FusedDigests() if self._digests_known else None

    async def reported_digests(self) -> Sequence[Mapping[str, Any]]:
        answer = await self._post("/weights_checker", {"action": "checksum"}, "hash its weights", CONTROL_TIMEOUT)
        return [field_of(field_of(answer, "ranks")[0], "checksums")]

    async def segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        parameters: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "sampling_seed": sampling.seed,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        texts, ids = self._stop_hints(sampling)
        if ids:
            # ignore_eos would disable these too. Without it, the call resumes at an end of text that is no stop.
            parameters["stop_token_ids"] = ids
        else:
            parameters["ignore_eos"] = True
        if sampling.max_tokens > 1:
            parameters["stop"] = texts
            parameters["stop_regex"] = [word_pattern(word) for word in sampling.stop_words]
        payload = {"input_ids": token_ids, "sampling_params": parameters, "return_logprob": True, "rid": server_id}
        if sampling.experts:
            payload["return_routed_experts"] = True
        answer = await self._post("/generate", payload, f"answer '{server_id}'", self.settings.attempt_timeout)
        made = field_of(answer, "output_ids")
        meta = field_of(answer, "meta_info")
        rows = meta.get("output_token_logprobs") or []
        finish = (meta.get("finish_reason") or {}).get("type")
        if [row[1] for row in rows] != made or finish not in ("stop", "length", "abort"):
            raise ServerError(f"{self.name}: an answer that does not add up: {len(made)} tokens, finish '{finish}'")
        self._check_version([meta.get("weight_version")] if made else [])
        experts = None
        if sampling.experts and finish != "abort":
            experts = self._experts(meta.get("routed_experts"), len(token_ids) + len(made) - 1)
        return Segment(made, [float(row[0]) for row in rows], finish, experts)

    def _experts(self, encoded: str | None, tokens: int) -> np.ndarray:
        """Decode the server's base64 of int32 [tokens, layers, top_k] into int16."""
        if encoded is None or self._routed is None:
            raise ServerError(f"{self.name}: reports no experts; start the server with {megarl_sglang.EXPERTS_FLAG}")
        values = np.frombuffer(base64.b64decode(encoded), np.int32)
        shape = (tokens, *self._routed)
        if len(values) != math.prod(shape):
            raise ServerError(f"{self.name}: reports {len(values)} experts, not {math.prod(shape)} = {shape}")
        return values.reshape(shape).astype(np.int16)

    async def abort_segment(self, server_id: str) -> None:
        await self._tell("/abort_request", {"rid": server_id}, "abort a request")

    async def abort_all(self) -> None:
        await self._tell("/abort_request", {"abort_all": True}, "abort its requests")

    async def _control(
        self, path: str, payload: dict[str, Any], purpose: str, timeout: float = CONTROL_TIMEOUT
    ) -> None:
        """A control request. Some report a failure as HTTP 200 with `success: false`."""
        answer = await self._post(path, payload, purpose, timeout)
        if isinstance(answer, dict) and answer.get("success") is False:
            raise ServerError(f"{self.name}: cannot {purpose}: {answer.get('message')}")


def command(
    port: int, *, python: Path, model: Path, dtype: str, cuda: bool, weights: str, flags: Sequence[str]
) -> list[str]:
    """The server's command line. `flags` come last and override the others."""
    common = ["--model-path", model, "--host", "127.0.0.1", "--dtype", dtype, "--skip-server-warmup"]
    if weights == "random":
        common += ["--load-format", "dummy"]
    if not cuda:
        common += ["--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        common += ["--grammar-backend", "none", "--disable-overlap-schedule", "--disable-cuda-graph"]
        common += ["--disable-custom-all-reduce", "--mem-fraction-static", "0.2"]
        common += ["--max-total-tokens", "65536", "--max-running-requests", "256"]
        common += ["--sleep-on-idle"]  # an idle scheduler would keep busy a core that the learner needs
    return [str(python), megarl_sglang.__file__, *map(str, common), "--port", str(port), *flags]


def deterministic_flags(blackwell: bool) -> list[str]:
    """Flags for exact seeds. On Blackwell SGLang would choose flashinfer, with which it drops its prefix cache."""
    return ["--enable-deterministic-inference", *(["--attention-backend", "triton"] if blackwell else [])]


def environment(*, cuda: bool, api_key: str | None) -> dict[str, str]:
    """Variables that the server needs in addition to ours. The key is one: anyone may read a command line."""
    key = {megarl_sglang.KEY_VARIABLE: api_key or ""}
    return key if cuda else {**key, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONWARNINGS": "ignore"}


@cache
def word_pattern(word: str) -> str:
    """A pattern for `word` and the character that ends it.

    No look-around: the server searches as much text as the pattern can match, and treats look-around as unbounded. The
    client checks the character before the word.
    """
    pattern = re.escape(word) + "[^A-Za-z]"
    if len(pattern.encode()) > REGEX_BYTES:
        raise RunError(f"stop word of {len(word)} characters: SGLang takes patterns of at most {REGEX_BYTES} bytes")
    return pattern


class FusedDigests:
    """The digests that a CPU server reports of the sent tensors: the first 8 bytes of a parameter's SHA-256.

    The server fuses tensors (`FUSED`) and pads the vocabulary with zeros to a multiple of 64. It stacks experts: only
    the canary checks those.
    """

    def __init__(self) -> None:
        self._sent: dict[str, tuple[list[str], set[str]]] = {}  # parameter → (its tensors, valid digests)
        self._parts: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor, total: int | None = None) -> None:
        if ".experts." in name:
            return
        target, modules = _fused(name)
        if len(modules) == 1:
            self._sent[target] = ([name], _digests(tensor, vocabulary="embed_tokens" in name or "lm_head" in name))
            return
        parts = self._parts.setdefault(target, {})
        parts[name.split(".")[-2]] = tensor
        if len(parts) == len(modules):
            names = [name.replace(f".{name.split('.')[-2]}.", f".{module}.") for module in modules]
            self._sent[target] = (names, _digests(torch.cat([parts[module] for module in modules])))
            del self._parts[target]

    def differing(self, reported: Mapping[str, str]) -> list[str]:
        """The tensors that the server does not have as they were sent, or that were not sent at all."""
        wrong = []
        for target, (names, digests) in self._sent.items():
            if target not in reported and target == "lm_head.weight":
                target = "model.embed_tokens.weight"  # tied: the server keeps one of the two
            if reported.get(target) not in digests:
                wrong += names
        for target in reported:
            if target not in self._sent and ".experts." not in target:
                wrong += self._absent(target)
        return wrong

    def _absent(self, target: str) -> list[str]:
        """The tensors of a parameter that were not sent."""
        module = target.split(".")[-2] if "." in target else target
        sent = self._parts.get(target, {})
        return [target.replace(f".{module}.", f".{part}.") for part in FUSED.get(module, (module,)) if part not in sent]


def _digests(tensor: torch.Tensor, *, vocabulary: bool = False) -> set[str]:
    digest = hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    found = {digest.hexdigest()[:16]}
    if vocabulary and (rest := -len(tensor) % VOCABULARY_STEP):
        digest.update(bytes(rest * tensor[0].nbytes))
        found.add(digest.hexdigest()[:16])
    return found


def _fused(name: str) -> tuple[str, tuple[str, ...]]:
    """The server's parameter that a tensor is part of, and the modules that it fuses."""
    pieces = name.split(".")
    for fused, order in FUSED.items():
        if len(pieces) > 1 and pieces[-2] in order:
            return ".".join([*pieces[:-2], fused, pieces[-1]]), order
    return name, (name,)
