"""The device of the learner: what is chosen, what is refused, and that every process of a run agrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.runtime import device
from tests.support import pretended_cuda

QUICKSTART = "examples/quickstart/train.yaml"


@pytest.fixture(autouse=True)
def _auto_again():
    """The choice of a test ends with it."""
    yield
    device.choose("auto")


@pytest.fixture
def visible(monkeypatch):
    """Let torch see so many CUDA devices, and drop what the tests' environment says."""

    def see(count: int) -> None:
        monkeypatch.delenv(device.VARIABLE, raising=False)
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("devices", "setting", "variable", "wanted"),
    [
        (0, "auto", "", "gloo"),
        (1, "auto", "", "nccl"),
        (1, "cpu", "", "gloo"),
        (1, "auto", "cpu", "gloo"),
        (1, "cuda", "cpu", "nccl"),
        (1, "cpu", "cuda", "gloo"),
    ],
)
def test_the_setting_decides_then_the_environment_then_the_machine(
    visible, monkeypatch, devices, setting, variable, wanted
):
    """And what is chosen is what a process started meanwhile is told."""
    visible(devices)
    monkeypatch.setenv(device.VARIABLE, variable)
    device.choose(setting)
    assert device.backend() == wanted
    with device.exported():
        device.choose("auto")  # as in the new process
        assert device.backend() == wanted


def test_cuda_without_a_device_is_refused(visible, monkeypatch):
    """By the name of whatever asked for it; so is a word that means nothing."""
    visible(0)
    with pytest.raises(UserError, match="^device: cuda, but torch sees no CUDA device; nearest valid value: cpu"):
        device.choose("cuda")
    monkeypatch.setenv(device.VARIABLE, "cuda")
    with pytest.raises(UserError, match="^MEGARL_DEVICE: cuda, but"):
        device.choose("auto")
    monkeypatch.setenv(device.VARIABLE, "gpu")
    with pytest.raises(UserError, match="^MEGARL_DEVICE: gpu; valid values: auto, cpu, cuda"):
        device.choose("auto")


def test_more_ranks_than_devices_are_refused(visible):
    """But not on the CPU, and not where a launcher may have given each rank the one device that it sees."""
    visible(1)
    device.check_ranks(1)
    device.check_ranks(8, own_devices=True)
    with pytest.raises(UserError, match="2 ranks on this machine, but 1 CUDA device; set device=cpu, or .* at most 1"):
        device.check_ranks(2)
    visible(2)
    with pytest.raises(UserError, match="8 ranks on this machine, but 2 CUDA devices"):
        device.check_ranks(8, own_devices=True)
    device.choose("cpu")
    device.check_ranks(8)


@pytest.mark.parametrize(("devices", "local", "index"), [(8, 5, 5), (1, 5, 0)])
def test_a_rank_claims_its_own_device(visible, monkeypatch, devices, local, index):
    """The one of its number or, bound by the launcher, the only one it sees."""
    visible(devices)
    claimed = []
    monkeypatch.setattr("torch.cuda.set_device", claimed.append)
    assert device.claim(local, 8).index == index
    assert claimed == [index]


def megarl(tmp_path: Path, devices: int, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megarl.cli", *words, f"run={tmp_path / 'run'}"]
    environment = pretended_cuda.environment(tmp_path, devices, **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_too_few_devices_are_refused_before_anything_is_written(tmp_path):
    """One device, two ranks, `device: auto`: exit 2, one line that says what to do."""
    done = megarl(tmp_path, 1, "train", QUICKSTART, "device=auto", "--dry-run")
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("megarl: ")]
    assert "2 ranks on this machine, but 1 CUDA device; set device=cpu" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["spawned", "launched"])
def test_the_quick_start_trains_beside_a_device(tmp_path, how):
    """Every rank computes on the CPU, whoever started it: the pretended device would fail at first use."""
    small = ("steps=1", "batch.prompts_per_step=2", "batch.completions_per_prompt=2", "evaluation.every=0")
    small += ("rollout.max_response_tokens=24", "rollout.early_exit.enabled=false", "data.eval=[]", "parallel.tp=1")
    variables = {} if how == "spawned" else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    done = megarl(tmp_path, 1, "train", QUICKSTART, *small, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1
