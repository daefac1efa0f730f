"""The embedded engine behind HTTP. rollout/local/server.py is the server, and `megarl serve` starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megarl.rollout.engine import Sampling
from megarl.rollout.in_engine.megarl_sglang import KEY_VARIABLE
from megarl.rollout.servers.remote import CONTROL_TIMEOUT, RemoteEngine, Segment, field_of
from megarl.rollout.weights.verify import Checksums


class LocalServerEngine(RemoteEngine):
    """Makes the same tokens as the embedded engine: seeds are exact by position, log-probs are before top-p and top-k.

    The server has no weights before the first update.
    """

    kind = "local"
    _loaded: Mapping[str, int] = {}  # checksums reported by the last load

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_tokens(token_ids)
        purpose = f"score {len(token_ids)} tokens"
        answer = await self._post("/score", {"token_ids": list(token_ids)}, purpose, CONTROL_TIMEOUT)
        return [float(value) for value in field_of(answer, "logprobs")]

    async def load_folder(self, version: int, folder: Path) -> None:
        payload = {"version": self.label(version), "folder": str(folder)}
        answer = await self._post("/load", payload, f"load weights {version} from {folder}", self.load_timeout(folder))
        self._loaded = field_of(answer, "held")
        self.version = version

    def digests(self) -> Checksums:
        return Checksums(complete=False)  # of a tied pair it reports one

    async def reported_digests(self) -> Sequence[Mapping[str, int]]:
        return [self._loaded]

    async def _first_token(self) -> None:
        """Skipped: it could not generate one."""

    async def segment(self, server_id: str, token_ids: list[int], sampling: Sampling) -> Segment:
        payload = {"id": server_id, "token_ids": token_ids, "sampling": sampling._asdict()}
        answer = await self._post("/generate", payload, f"answer '{server_id}'", self.settings.attempt_timeout)
        self._check_version(field_of(answer, "versions"))
        return Segment(field_of(answer, "token_ids"), field_of(answer, "logprobs"), field_of(answer, "finish"))

    async def abort_segment(self, server_id: str) -> None:
        await self._tell("/abort", {"id": server_id}, "abort a request")

    async def abort_all(self) -> None:
        await self._tell("/abort", {"id": None}, "abort its requests")


def command(
    port: int, *, python: Path, model: Path, dtype: str, cuda: bool, weights: str, flags: Sequence[str]
) -> list[str]:
    """The server's command line. It ignores `weights`: it has none before the first update."""
    common = ["--model", str(model), "--dtype", dtype, "--device", "cuda" if cuda else "cpu", "--port", str(port)]
    return [str(python), "-m", "megarl.rollout.local.server", *common, *flags]


def environment(*, cuda: bool, api_key: str | None) -> dict[str, str]:
    """Variables that the server needs in addition to ours: the key, because anyone may read a command line."""
    return {KEY_VARIABLE: api_key or ""}
