"""The embedded engine behind HTTP, on any node; the server is rollout/local/server.py, started by `megarl serve`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine.megarl_sglang import KEY_VARIABLE
from megarl.rollout.servers.remote import CONTROL_DEADLINE, RemoteEngine, Segment, field_of
from megarl.rollout.weights.verify import checksum


class ServedEngine(RemoteEngine):
    """Seeds are exact by position and log-probs precede top-p and top-k, as of the embedded engine: the same tokens."""

    kind = "local"

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_tokens(token_ids)
        purpose = f"score {len(token_ids)} tokens"
        answer = await self._post("/score", {"token_ids": list(token_ids)}, purpose, CONTROL_DEADLINE)
        return [float(value) for value in field_of(answer, "logprobs")]

    async def load_folder(self, version: int, folder: Path) -> None:
        payload = {"version": version, "folder": str(folder)}
        answer = await self._post("/load", payload, f"load weights {version} from {folder}", CONTROL_DEADLINE)
        self._loaded: dict[str, int] = field_of(answer, "held")
        self.version = version

    def digests(self) -> Checksums:
        return Checksums()

    async def _held(self) -> Sequence[Mapping[str, int]]:
        return [self._loaded]

    async def _first_token(self) -> None:
        """It has no weights before the first update."""

    async def _segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        payload = {"id": server_id, "token_ids": token_ids, "sampling": sampling._asdict()}
        answer = await self._post("/generate", payload, f"answer '{server_id}'", self.settings.attempt_timeout)
        self._check_version([str(version) for version in field_of(answer, "versions")])
        return Segment(field_of(answer, "token_ids"), field_of(answer, "logprobs"), field_of(answer, "finish"))

    async def _abort(self, server_id: str) -> None:
        await self._tell("/abort", {"id": server_id}, "abort a request")

    async def _abort_all(self) -> None:
        await self._tell("/abort", {"id": None}, "abort its requests")


class Checksums:
    """Of the tensors as they are sent."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._sent[name] = checksum(tensor)

    def differing(self, held: Mapping[str, int]) -> list[str]:
        return [name for name, digest in held.items() if self._sent.get(name) != digest]


def command(
    python: Path, model: Path, *, dtype: str, cuda: bool, weights: str, flags: Sequence[str]
) -> Callable[[int], Sequence[str]]:
    """The server's command line, given its port. Whatever `weights` says, it has the learner's."""
    common = ["--model", str(model), "--dtype", dtype, "--device", "cuda" if cuda else "cpu"]

    def build(port: int) -> list[str]:
        return [str(python), "-m", "megarl.rollout.local.server", *common, "--port", str(port), *flags]

    return build


def environment(*, cuda: bool, api_key: str | None) -> dict[str, str]:
    """Variables that the server needs beside ours: the key, since all may read a command line."""
    return {KEY_VARIABLE: api_key or ""}
