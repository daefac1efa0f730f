"""`megarl doctor`: each check finds what it is there to find, and says what to do; the exit code is for scripts."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from megarl import cli, config
from megarl.doctor import machine, peers, software
from megarl.doctor.finding import Finding

ROOT = Path(__file__).parents[2]
CONFIG = "examples/quickstart/train.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def settings(run: Path, *overrides: str) -> config.Settings:
    return config.load(ROOT / CONFIG, [f"run={run}", *overrides])


def of(findings: Iterable[Finding], check: str) -> Finding:
    return next(f for f in findings if f.check == check)


def doctor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["megarl", "doctor", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_this_machine_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Code 0, every check named in the JSON, nothing left in the run directory. Not a proof that a GPU node passes."""
    file = tmp_path / "found.json"
    assert doctor(monkeypatch, CONFIG, f"run={tmp_path / 'run'}", "--json", str(file)) == 0
    found = json.loads(file.read_text())["findings"]
    assert {f["check"] for f in found} >= {"python", "torch", "megatron-core", "devices", "fabric", "disk", "engine"}
    assert not any(f["status"] == "fail" for f in found)
    assert list((tmp_path / "run").iterdir()) == []
    assert "torch" in capsys.readouterr().out


def test_failures_are_one_line_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Missing devices and an unwritable run directory: code 1, and both on the one line of stderr."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor(monkeypatch, CONFIG, f"run={tmp_path / 'file' / 'run'}", "--gpus", "8") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    for word in ("8 CUDA devices", "nvidia-smi", "Not a directory", "run="):
        assert word in lines[0]


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is counted against the checkpoints that the run would keep."""
    need = of(machine.disk(settings(tmp_path / "run")), "disk")
    assert need.status == "ok"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))
    found = of(machine.disk(settings(tmp_path / "run")), "disk")
    assert found.status == "fail"
    assert "checkpoint.keep" in found.hint


def test_engines_of_their_own_are_looked_at(tmp_path: Path) -> None:
    """An interpreter that is not there, and one that lacks the engine."""
    missing = of(
        software.engines(settings(tmp_path, "rollout.engine=vllm", "rollout.servers.python=/no/python")), "engine"
    )
    assert missing.status == "fail"
    assert "make engines" in missing.hint
    bare = of(
        software.engines(settings(tmp_path, "rollout.engine=vllm", "rollout.servers.python=/usr/bin/env")), "engine"
    )
    assert bare.status == "fail"


@pytest.mark.parametrize(("theirs", "status"), [("2.29.7", "ok"), ("2.30.7", "fail"), ("", "fail")])
def test_an_engine_of_another_nccl_is_named(
    theirs: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub interpreter answers as an environment with another torch would, or with a torch for CPUs."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho 'sglang 0.5.23'\ncase \"$2\" in *nccl*) echo '{theirs}';; esac\n")
    python.chmod(0o755)
    wanted = settings(
        tmp_path, "rollout.engine=sglang", "rollout.servers.device=cuda", f"rollout.servers.python={python}"
    )
    monkeypatch.setattr(software, "nccl_version", lambda: [2, 29, 7])
    found = of(software.engines(wanted), "engine")
    assert found.status == status
    if status == "fail":
        assert f"has NCCL {theirs or 'unknown'}, the learner 2.29.7" in found.text
        assert "weight_transport=disk" in found.hint
    monkeypatch.setattr(software, "nccl_version", lambda: None)  # a learner on CPUs
    assert of(software.engines(wanted), "engine").status == "ok"


def test_wrong_versions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed", {"torch": "2.9.0", "transformer-engine": "2.9"}.get)
    monkeypatch.setattr(software.device, "on_cuda", lambda: False)
    found = {f.check: f for f in software.versions()}
    assert (found["torch"].status, found["megatron-core"].status) == ("warn", "fail")
    assert "2.9.0" in found["torch"].text
    assert found["transformer-engine"].status == "fail"  # it breaks `import megatron.core` without CUDA


def test_infiniband_ports_that_are_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two down: the run is slowed; both: it would not start."""
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        (tmp_path / card / "ports" / "1").mkdir(parents=True)
        (tmp_path / card / "ports" / "1" / "state").write_text(state)
    monkeypatch.setattr(machine, "ports", lambda: sorted(tmp_path.glob("*/ports/*")))
    found = of(machine.fabric(2), "fabric")
    assert (found.status, "mlx5_1" in found.text, "mlx5_0" in found.text) == ("warn", True, False)
    (tmp_path / "mlx5_0" / "ports" / "1" / "state").write_text("1: DOWN")
    assert of(machine.fabric(2), "fabric").status == "fail"


def meet(run: Path, other: Path, size: int = 2, callers: int = 1, skew: float = 0.0) -> list[list[Finding]]:
    """Findings of the first node and of those that call it, each in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: list[list[Finding]] = [[] for _ in range(1 + callers)]

    def node(rank: int) -> None:
        place = run if rank == 0 else other
        found[rank] = list(peers.meet(rank, size, "127.0.0.1", port, place, timeout=5.0))

    threads = [threading.Thread(target=node, args=(rank,), name=f"node {rank}") for rank in range(1 + callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_nodes_meet(tmp_path: Path) -> None:
    """Reachable, clocks agree, one folder."""
    found = meet(tmp_path, tmp_path)
    assert {f.status for node in found for f in node} == {"ok"}
    assert of(found[1], "clock").status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_another_file_system_is_found(tmp_path: Path) -> None:
    """The run directory has the same name on both nodes but is not the same folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    _, caller = meet(tmp_path / "a", tmp_path / "b")
    assert of(caller, "shared disk").status == "fail"


def test_a_node_that_does_not_call_is_counted(tmp_path: Path) -> None:
    """Of three nodes to call, two are silent: the first one says so."""
    host, _ = meet(tmp_path, tmp_path, size=4)
    found = of(host, "peers")
    assert found.status == "fail"
    assert "2 of 3 nodes did not call" in found.text


def test_a_clock_that_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's clock is moved by two minutes."""
    real = peers.time.time

    def moved() -> float:
        return real() + (120.0 if threading.current_thread().name == "node 1" else 0.0)

    monkeypatch.setattr(peers.time, "time", moved)
    _, caller = meet(tmp_path, tmp_path)
    found = of(caller, "clock")
    assert found.status == "warn"
    assert "+120" in found.text


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        found = list(peers.meet(0, 2, "127.0.0.1", taken.getsockname()[1], tmp_path, timeout=1.0))
    assert of(found, "ports").status == "fail"


def test_too_few_devices_for_the_ranks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick start's two ranks on one CUDA device: refused on CUDA, fine on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    found = of(machine.chosen(settings(tmp_path, "device=cuda", "parallel.tp=2")), "device")
    assert (found.status, "2 ranks on this machine, but 1 CUDA device" in found.text) == ("fail", True)
    assert of(machine.chosen(settings(tmp_path, "device=cpu", "parallel.tp=2")), "device").status == "ok"


@pytest.mark.parametrize(
    ("version", "source", "status", "words"),
    [
        ("2.11.0", "", "ok", "2.11.0"),
        ("2.9.0", "", "warn", "2.9.0, made for"),
        ("2.11.0", "raise ImportError('undefined symbol: _ZN3c10')", "fail", "does not load: undefined symbol"),
    ],
)
def test_transformer_engine_is_imported_and_its_version_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, source: str, status: str, words: str
) -> None:
    """One built for another torch loads nowhere; the hint is the command that builds it for this one."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(software.device, "on_cuda", lambda: True)
    monkeypatch.setattr(software, "installed", {"torch": "2.13.0", "transformer-engine": version}.get)
    wanted = ["transformer-engine[pytorch]>=2.10,<2.12; extra == 'gpu'"]
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: wanted)
    found = of(software.versions(), "transformer-engine")
    assert (found.status, words in found.text) == (status, True)
    if status != "ok":
        assert "pip install --no-build-isolation --no-cache-dir" in found.hint
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules.pop(name, None)


def test_a_precision_that_cannot_be_is_named(tmp_path: Path) -> None:
    """Before a model is built."""
    fp8 = ("precision.dtype=fp8", "precision.recipe=delayed", "precision.high_precision_layers=1")
    found = of(software.precision(settings(tmp_path, *fp8)), "precision")
    assert (found.status, "recipe delayed cannot leave layers in bf16" in found.text) == ("fail", True)
    assert of(software.precision(settings(tmp_path)), "precision").status == "ok"
