"""What servers on GPUs are given: flags, addresses, deadlines, payloads. No GPU and no engine runs here."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megarl.config import Servers
from megarl.errors import UserError
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.in_engine.megarl_weights import WeightReader
from megarl.rollout.servers import factory
from megarl.rollout.servers.sglang import SGLangEngine
from megarl.rollout.weights.verify import checksum
from tests.support.fake_sglang import FakeSGLang
from tests.support.real_servers import TOKENIZER, Policy, settings
from tests.support.tiny_policy import make_model

DETERMINISTIC = "--enable-deterministic-inference"


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return Policy(tmp_path / "policy", make_model(tmp_path / "policy"))


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_deterministic_inference_is_asked_for_and_keeps_the_prefix_cache(
    capability: tuple[int, int], policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off by default. On Blackwell with a backend that keeps the prefix cache, unless flags name another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    plain = factory.command_of(settings(policy, tmp_path, "sglang", device="cuda"))(1)
    assert DETERMINISTIC not in plain and "--attention-backend" not in plain
    flags = ["--attention-backend", "fa4"]
    wanted = settings(policy, tmp_path, "sglang", device="cuda", deterministic=True, flags=flags)
    line = list(factory.command_of(wanted)(1))
    assert DETERMINISTIC in line and line[-2:] == flags
    named = [after for word, after in zip(line, line[1:], strict=False) if word == "--attention-backend"]
    assert named == (["fa4"] if capability[0] == 9 else ["triton", "fa4"])


@pytest.mark.parametrize(("engine", "device"), [("sglang", "cpu"), ("vllm", "cuda")])
def test_deterministic_inference_elsewhere_is_refused(engine: str, device: str, policy: Policy, tmp_path: Path) -> None:
    wanted = settings(policy, tmp_path, engine, device=device, deterministic=True, python=sys.executable)
    with pytest.raises(UserError, match=r"rollout\.servers\.deterministic: true needs SGLang on CUDA"):
        factory.check(wanted.rollout)


def test_remote_servers_are_told_an_address_that_they_can_dial(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the run's own ranks use as a rendezvous may be loopback. No packet is sent."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert factory.broadcast_address(Servers()) == "127.0.0.1"
    assert factory.broadcast_address(Servers(addresses=["http://127.0.0.1:30000"])) == "127.0.0.1"
    named = Servers(addresses=["http://127.0.0.1:1"], broadcast_address="10.0.0.7")
    assert factory.broadcast_address(named) == "10.0.0.7"
    routes = {"127.0.0.1": "127.0.0.1", "192.0.2.7": "192.0.2.1"}

    class Probe:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, place: tuple[str, int]) -> None:
            self.peer = place[0]

        def getsockname(self) -> tuple[str, int]:
            return routes[self.peer], 0

    monkeypatch.setattr(factory.socket, "socket", Probe)
    servers = Servers(addresses=["http://127.0.0.1:30000", "http://192.0.2.7:30000"])
    assert factory.broadcast_address(servers) == "192.0.2.1"


def test_a_server_without_an_address_is_named() -> None:
    servers = Servers(addresses=["http://no.such.host.invalid:30000"])
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid:30000 cannot be reached: .*broadcast_address"):
        factory.broadcast_address(servers)


def test_the_deadline_of_a_folder_grows_with_its_bytes(tmp_path: Path) -> None:
    """65 GB, as the weights of a 32B model: 10 minutes more. Companions do not count."""
    least = SGLangEngine.load_timeout(tmp_path)
    for number in range(2):
        with open(tmp_path / f"model-{number}.safetensors", "wb") as file:
            file.truncate(65 * 10**9 // 2)  # a sparse file: nothing is written
    assert SGLangEngine.load_timeout(tmp_path) >= least + 600
    (tmp_path / "tokenizer.json").write_text("{}" * 10**6)
    assert SGLangEngine.load_timeout(tmp_path) < least + 700


def on_fake(info: dict[str, object], action: Callable[[SGLangEngine], Awaitable[object]]) -> FakeSGLang:
    """Run `action` on the client of a fake server that describes itself by `info`."""

    async def main() -> FakeSGLang:
        async with FakeSGLang(TOKENIZER, [0] * 8) as fake:
            fake.info |= info
            engine = SGLangEngine("sglang-0", fake.address, Vocabulary(TOKENIZER), Servers(), vocab_size=len(TOKENIZER))
            await engine.start()
            await action(engine)
            await engine.close()
            return fake

    return asyncio.run(main())


@pytest.mark.parametrize("ranks", [1, 4])
def test_every_tensor_parallel_rank_gets_a_payload(ranks: int) -> None:
    """A rank takes the item of its own number: with fewer of them SGLang's scheduler dies."""
    fake = on_fake({"tp_size": ranks}, lambda engine: engine.load_serialized("bucket"))
    ((_, body),) = [call for call in fake.controls if call[0] == "update_weights_from_tensor"]
    assert body["serialized_named_tensors"] == ["bucket"] * ranks


@pytest.mark.parametrize(
    ("info", "ranks", "named"),
    [
        ({"tp_size": 8}, 8, None),
        ({"tp_size": 4, "pp_size": 2}, 8, "--pp-size 2"),
        ({"tp_size": 2, "dp_size": 4}, 8, "--dp-size 4"),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, 8, None),
    ],
)
def test_servers_whose_ranks_a_broadcast_does_not_reach_say_so(
    info: dict[str, object], ranks: int, named: str | None
) -> None:
    """SGLang numbers a member by its tensor-parallel rank alone, which stages and copies share."""
    seen: list[tuple[int, str]] = []

    async def look(engine: SGLangEngine) -> None:
        seen.append((engine.ranks, engine.unreachable))
        assert await engine.nccl_version() is None  # the fake has no such path, as a server started by hand

    on_fake(info, look)
    assert seen[0][0] == ranks
    assert (named in seen[0][1]) if named else not seen[0][1]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


@pytest.mark.parametrize(
    ("servers", "ranks", "shares"),
    [
        (Servers(device="cuda", count=2), 4, ["4,5", "6,7"]),
        (Servers(device="cuda", count=2), 0, ["0,1,2,3", "4,5,6,7"]),
        (Servers(device="cuda", count=2, devices=[2, 7]), 2, ["2", "7"]),
    ],
)
@pytest.mark.usefixtures("eight_gpus")
def test_servers_get_the_devices_that_the_ranks_leave(servers: Servers, ranks: int, shares: list[str]) -> None:
    given = [factory.device_share(index, servers, ranks) for index in range(servers.count)]
    assert given == [{"CUDA_VISIBLE_DEVICES": share} for share in shares]


@pytest.mark.parametrize(
    ("servers", "ranks", "named"),
    [
        ({}, 8, r"servers\.devices: the learner's 8 ranks leave none of this host's 8 devices .* at most 7 ranks"),
        ({"count": 3}, 6, r"servers\.count: 3 servers for 2 devices; at most 2"),
        ({"devices": [3, 4]}, 4, r"servers\.devices: \[3\] are the learner's, whose ranks use 0 to 3"),
        ({"devices": [8]}, 4, r"servers\.devices: 8: of the 8 visible devices the last is 7"),
    ],
)
@pytest.mark.usefixtures("eight_gpus")
def test_devices_that_cannot_be_divided_are_refused(
    servers: dict[str, object], ranks: int, named: str, policy: Policy, tmp_path: Path
) -> None:
    """Before anything starts: NCCL would fail at the first broadcast, or memory before that."""
    wanted = settings(policy, tmp_path, "sglang", device="cuda", python=sys.executable, **servers)
    with pytest.raises(UserError, match=named):
        factory.check(wanted.rollout, ranks)


def test_a_vllm_worker_sums_what_it_read_on_its_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a device without data stands for a GPU. The loader gets what was read, and a CPU worker sums it there."""
    weight = torch.arange(6.0)
    save_file({"a": weight}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "m.safetensors"}}')
    summed: list[str] = []
    loaded: list[torch.Tensor] = []

    class Worker(WeightReader):
        model_runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(1, 1))

        def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
            loaded.extend(tensor for _, tensor in weights_iterator)

    def noted(tensor: torch.Tensor) -> int:
        summed.append(tensor.device.type)
        return 7 if tensor.is_meta else checksum(tensor)

    monkeypatch.setattr("megarl.rollout.in_engine.megarl_weights.checksum", noted)
    worker = Worker()
    worker.device = torch.device("meta")
    assert worker.megarl_load(str(tmp_path)) == {"a": f"{7:016x}"}
    worker.device = torch.device("cpu")
    assert worker.megarl_load(str(tmp_path)) == {"a": f"{checksum(weight):016x}"}
    assert summed == ["meta", "cpu"] and all(torch.equal(tensor, weight) for tensor in loaded)
