"""The ways for weights, without a server: buckets, what changed, what is read back, and SGLang's own digests."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarl.errors import RunError
from megarl.rollout.servers.sglang import FusedDigests, word_pattern
from megarl.rollout.weights import disk, transport, verify
from megarl.rollout.weights.disk import DiskTransport, read_back
from megarl.rollout.weights.transport import Changes, buckets
from megarl.rollout.weights.verify import Checksums, checksum
from tests.support.tiny_policy import make_model

NAMED = [(f"t{i}", torch.full((4, 4), float(i))) for i in range(5)]


def test_buckets_keep_order_cast_and_stay_under_their_limit() -> None:
    made = list(buckets(iter(NAMED), torch.bfloat16, limit=2 * 32))
    assert [[name for name, _ in bucket] for bucket in made] == [["t0", "t1"], ["t2", "t3"], ["t4"]]
    assert all(tensor.dtype is torch.bfloat16 for bucket in made for _, tensor in bucket)


def test_only_changed_tensors_travel_to_engines_that_hold_the_others() -> None:
    """Everything travels again when one engine missed the last send, or the last send broke off."""
    changes, engine = Changes(torch.float32), SimpleNamespace(version=1)
    assert len(list(changes.only(1, NAMED, [engine]))) == 5
    other = [*NAMED[:2], ("t2", torch.zeros(4, 4)), *NAMED[3:]]
    assert [name for name, _ in changes.only(2, other, [engine])] == ["t2"]
    assert len(list(changes.only(3, other, [engine]))) == 5  # it still has version 1
    engine.version = 3
    next(changes.only(4, NAMED, [engine]))  # broke off
    assert len(list(changes.only(5, NAMED, [engine]))) == 5


def test_the_folder_holds_what_was_sent_and_the_one_before_is_removed(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    named = [(name, tensor.detach()) for name, tensor in model.named_parameters()]
    transport = DiskTransport(tmp_path / "weights", tmp_path / "model", torch.bfloat16, bucket=1 << 16)
    outcome = asyncio.run(transport.send(1, named, []))
    assert outcome.arrived == {name: checksum(tensor) for name, tensor in named}
    assert outcome.sent_bytes == sum(tensor.nbytes for _, tensor in named)
    asyncio.run(transport.send(2, named, []))
    assert [folder.name for folder in (tmp_path / "weights").iterdir()] == ["weights-2"]
    assert type(model).from_pretrained(tmp_path / "weights" / "weights-2").config.hidden_size == 128


class Folders:
    """The client of an engine that loads folders, and says what it read there if `tells`."""

    def __init__(self, name: str, tells: bool) -> None:
        self.name, self.version, self.tells = name, None, tells
        self.read: dict[str, int] = {}

    @asynccontextmanager
    async def pause(self) -> AsyncIterator[None]:
        yield

    def digests(self) -> Checksums | None:
        return Checksums(complete=True) if self.tells else None

    async def load_folder(self, version: int, folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            self.read |= {name: checksum(tensor) for name, tensor in load_file(file).items()}

    async def verify(self, sent: Checksums) -> None:
        assert self.read and not sent.differing(self.read)


@pytest.mark.parametrize(("tells", "read_backs"), [([True, True], 0), ([True, False], 1), ([], 1)])
def test_each_tensor_is_summed_once_and_read_back_only_for_engines_that_cannot_tell(
    tells: list[bool], read_backs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many engines there are. A restarted engine gets weights whose sums were taken as they were sent."""
    summed: list[tuple[int, ...]] = []

    def counted(tensor: torch.Tensor) -> int:
        summed.append(tuple(tensor.shape))
        return checksum(tensor)

    for module in (disk, verify):
        monkeypatch.setattr(module, "checksum", counted)
    (tmp_path / "model").mkdir()
    sender = DiskTransport(tmp_path / "weights", tmp_path / "model", torch.float32)
    engines = [Folders(f"e{i}", tell) for i, tell in enumerate(tells)]
    outcome = asyncio.run(sender.send(1, NAMED, engines))
    assert not outcome.failures and len(summed) == len(NAMED) * (1 + read_backs)
    assert bool(outcome.arrived) == bool(read_backs)
    assert asyncio.run(sender.resend(Folders("e9", True)))


def test_a_tensor_is_summed_once_for_all_servers_of_a_bucket_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[int] = []

    def counted(tensor: torch.Tensor) -> int:
        summed.append(len(tensor))
        return checksum(tensor)

    for module in (transport, verify):
        monkeypatch.setattr(module, "checksum", counted)
    digests = [Checksums(complete=True), Checksums(complete=True)]
    sent = dict(Changes(torch.bfloat16).only(1, NAMED, [], digests))
    assert len(summed) == len(NAMED) and all(tensor.dtype is torch.bfloat16 for tensor in sent.values())
    reported = {name: checksum(tensor) for name, tensor in sent.items()}
    assert not any(digest.differing(reported) for digest in digests)


def test_a_damaged_or_missing_file_is_told_by_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    assert read_back(tmp_path, {"a": "m.safetensors"}) == {"a": checksum(torch.ones(3))}
    with pytest.raises(RunError, match="b is missing"):
        read_back(tmp_path, {"a": "m.safetensors", "b": "m.safetensors"})
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RunError, match="cannot be read back"):
        read_back(tmp_path, {"a": "m.safetensors"})


def held_by_server(folder: Path) -> dict[str, str]:
    """The digests that an SGLang server reports for a Qwen3: fused, vocabulary padded to a multiple of 64."""
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([rows, torch.zeros(-len(rows) % 64, rows.shape[1]).to(rows)])
    for layer in range(2):
        for fused, parts in {"self_attn.qkv": "qkv", "mlp.gate_up": ("gate", "up")}.items():
            stem = f"model.layers.{layer}.{fused.partition('.')[0]}"
            pieces = [tensors.pop(f"{stem}.{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{fused}_proj.weight"] = torch.cat(pieces)
    digests = {}
    for name, tensor in tensors.items():
        digests[name] = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[
            :16
        ]
    return digests


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, []),
        ("model.norm.weight", ["model.norm.weight"]),
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"]),
        (
            "model.layers.1.self_attn.k_proj.weight",
            [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"],
        ),
    ],
)
def test_digests_name_the_tensors_that_differ(tmp_path: Path, change: str | None, named: list[str]) -> None:
    """A fused parameter is named by all its parts: the server's digest cannot tell which one it is."""
    model = make_model(tmp_path)
    sent = FusedDigests()
    for name, tensor in model.named_parameters():
        sent.add(name, tensor.detach() + 1 if name == change else tensor.detach())
    assert sent.differing(held_by_server(tmp_path)) == named


@pytest.mark.parametrize("skipped", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_digests_name_a_tensor_that_was_not_sent(tmp_path: Path, skipped: str) -> None:
    model = make_model(tmp_path)
    sent = FusedDigests()
    for name, tensor in model.named_parameters():
        if name != skipped:
            sent.add(name, tensor.detach())
    assert sent.differing(held_by_server(tmp_path)) == [skipped]


def test_a_word_too_long_for_the_server_is_refused() -> None:
    with pytest.raises(RunError, match="at most 256 bytes"):
        word_pattern("x" * 300)
