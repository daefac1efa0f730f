"""`megarl bench gpu` without a GPU: a part that fails in any way is a row, and the rest goes on. No word of CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

from megarl import bench as benchmarks
from megarl.bench import gpu
from megarl.bench.gpu import attention, fp8, parts, results, speed
from megarl.bench.gpu.part import TINY, Unsupported
from megarl.bench.gpu.runner import run
from megarl.errors import RunError, UserError
from tests.support.odd_parts import part

ROOT = Path(__file__).parents[2]
TROUBLE = (
    "raises", "runs_out_of_memory", "is_killed", "leaves", "prints_garbage", "returns_garbage", "is_unsupported",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """What became of every odd part, with one that measures first and last."""
    odd = [part("measures"), *map(part, TROUBLE), part("hangs", seconds=0.2), part("measures", value=3.0)]
    found = list(run(odd, TINY, 10.0, lambda each: ""))
    assert [row["part"] for row in found] == [each.name for each in odd]
    return {row["part"]: row for row in found[1:-1]}, found[0], found[-1]


def test_what_comes_after_trouble_is_measured(rows):
    """NaN, which JSON lacks, is a word."""
    _, first, last = rows
    assert first["outcome"] == last["outcome"] == "measured"
    assert first["metrics"] == {"value": 1.0, "not_a_number": "nan"} and last["metrics"]["value"] == 3.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "RuntimeError: CUDA error: device-side assert triggered"),
        ("runs_out_of_memory", "MemoryError"),
        ("is_killed", "the process was ended by SIGKILL"),
        ("leaves", "the process ended with code 7"),
        ("returns_garbage", "ValueError: Circular reference detected"),
        ("hangs", "to run"),
    ],
)
def test_a_part_that_fails_is_a_row_that_says_how(rows, name, words):
    odd, *_ = rows
    assert odd[name]["outcome"] == "failed"
    assert words in odd[name]["error"].splitlines()[-1]


def test_an_error_has_the_last_lines_of_what_was_printed(rows):
    """Of a process that was killed its own last words; of one that hung the line where it stood."""
    odd, *_ = rows
    assert "NCCL WARN the last words" in odd["is_killed"]["error"]
    assert "odd_parts.py" in odd["hangs"]["error"] and "in hangs" in odd["hangs"]["error"]


def test_garbage_on_the_output_harms_nothing(rows):
    odd, *_ = rows
    assert odd["prints_garbage"]["metrics"] == {"value": 2.0}


def test_what_a_device_cannot_do_is_skipped_not_failed(rows):
    odd, *_ = rows
    assert odd["is_unsupported"]["outcome"] == "skipped"
    assert odd["is_unsupported"]["error"] == "Transformer Engine: not on this device"


def test_what_no_longer_fits_or_lacks_something_is_skipped_by_name():
    """A shorter part behind one that is too long still runs."""
    wanted = [part("measures", seconds=600.0), part("raises"), part("measures", seconds=1.0)]
    found = list(run(wanted, TINY, 5.0, lambda each: "needs 2 devices" if each.name == "raises" else ""))
    assert [row["outcome"] for row in found] == ["skipped", "skipped", "measured"]
    assert found[0]["error"].startswith("needs about 600 s, and ") and found[1]["error"] == "needs 2 devices"


def test_the_page_has_every_row(rows):
    odd, first, _ = rows
    text = results.markdown([first, *odd.values()], complete=False, rehearsal=True)
    assert "says nothing about GPUs" in text and "still going on" in text
    assert all(name in text for name in odd) and "value 1, not_a_number nan" in text
    assert "\x1b" not in text


@pytest.mark.slow
def test_results_survive_a_sigkill_of_the_command(tmp_path):
    """Killed while its second part hangs, the command leaves two whole files with the first, and no process."""
    code = "import sys; from pathlib import Path; from tests.support import odd_parts; "
    code += "odd_parts.command(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, env=environment)
    pid = tmp_path / "pid"
    until = time.monotonic() + 200
    while not (pid.exists() and pid.read_text()):
        assert command.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    command.kill()
    command.wait()
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["part"] for row in found["rows"]] == ["measures"] and not found["complete"]
    assert "| measures |" in (tmp_path / "page.md").read_text()
    while Path("/proc", pid.read_text()).exists():
        assert time.monotonic() < until, "the part outlives the command"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_rehearsal_runs_every_part(tmp_path, monkeypatch, bench):
    """End to end: whatever needs no CUDA device is measured, the rest is skipped by name; 3 parts need one."""
    monkeypatch.chdir(tmp_path)
    bench("gpu", "--rehearse", "--minutes", "14")
    found = json.loads((tmp_path / "runs" / "gpu_rehearsal.json").read_text())
    assert found["complete"] and found["rehearsal"]
    assert [row["part"] for row in found["rows"]] == [each.name for each in parts.PARTS]
    skipped = {row["part"]: row["error"] for row in found["rows"] if row["outcome"] == "skipped"}
    assert skipped == {each.name: "needs a CUDA device" for each in parts.PARTS if each.cuda}
    measured = {row["part"]: row["metrics"] for row in found["rows"] if row["outcome"] == "measured"}
    assert measured["gradients, fp32, Megatron's layers"]["relgrad"] < 1e-5
    assert measured["resume"]["bit_equal"] is True
    assert "says nothing about GPUs" in (tmp_path / "runs" / "gpu_rehearsal.md").read_text()


def test_a_failed_part_ends_the_command_with_an_error(tmp_path, monkeypatch, bench):
    """With --only no file is written unless it is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "PARTS", [part("raises"), part("measures")])
    with pytest.raises(RunError, match="1 of 1 parts failed: raises"):
        gpu.main(rehearse=True, only=["raises"], minutes=1.7, json=None, report=None)
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_only_the_rehearsal_runs(bench):
    with pytest.raises(UserError, match="torch sees no CUDA device; on a CPU, try the command with --rehearse"):
        bench("gpu")
    with pytest.raises(UserError, match="--only: 'checksum' is not one of .*checksums"):
        bench("gpu", "--rehearse", "--only", "checksum")


def test_the_parts_have_names_and_functions_of_their_own():
    """Every name once; those for one device fit into ten minutes by their own estimate, imports left out."""
    names = [each.name for each in parts.PARTS]
    assert len(set(names)) == len(names)
    assert sum(each.seconds for each in parts.PARTS if each.devices == 1) < 600
    assert "gpu" in benchmarks.names() and "common" not in benchmarks.names()


def test_what_a_machine_lacks_is_said(monkeypatch):
    """One device without Transformer Engine: its parts, and those for two devices, are skipped."""
    monkeypatch.setattr(parts.device, "on_cuda", lambda: True)
    monkeypatch.setattr(parts.torch.cuda, "device_count", lambda: 1)
    said = {parts.lacking(each, rehearsal=False) for each in parts.PARTS}
    assert said == {"", "needs Transformer Engine", "needs 2 devices, 1 found"}
    assert {parts.lacking(each, rehearsal=True) for each in parts.PARTS} == {"", "needs a CUDA device"}


@pytest.mark.parametrize(
    ("name", "memory", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA GH200 96GB HBM3 H100", 94.5, "h100-500w"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GB200", 184.0, "gb200"),
        ("NVIDIA B200", 178.4, "b200"),
        ("NVIDIA L40S", 44.4, None),
    ],
)
def test_the_planner_plans_for_the_card_at_hand(name, memory, wanted):
    """By name and memory; for a card it does not know it plans nothing."""
    found = speed.card(name, memory)
    assert (found.name if found else None) == wanted


@pytest.mark.parametrize(
    ("recipe", "able"), [("tensorwise", True), ("delayed", True), ("blockwise", True), ("mxfp8", False)]
)
def test_transformer_engine_is_asked_for_a_recipe(monkeypatch, recipe, able):
    """A stand-in for Hopper's answers, by the names of TE 2.10 to 2.14."""
    te = types.ModuleType("transformer_engine")
    te.pytorch = types.SimpleNamespace(
        is_fp8_available=lambda return_reason: (True, ""),
        is_fp8_block_scaling_available=lambda return_reason: (True, ""),
        is_mxfp8_available=lambda return_reason: (False, "Device compute capability 10.0 or higher required"),
    )
    monkeypatch.setitem(sys.modules, "transformer_engine", te)
    monkeypatch.setattr(fp8.device, "on_cuda", lambda: True)
    if able:
        fp8.check_recipe({"dtype": "fp8", "recipe": recipe})
    else:
        with pytest.raises(Unsupported, match="Transformer Engine: Device compute capability 10.0"):
            fp8.check_recipe({"dtype": "fp8", "recipe": recipe})


def test_synchronisations_are_counted_by_place():
    """torch's warning, as its CUDA code words it."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for line in (7, 7, 9):
            text = "called a synchronizing CUDA operation (Triggered internally at c10/cuda/CUDAFunctions.cpp)"
            warnings.warn_explicit(text, UserWarning, "/site-packages/megatron/core/layer.py", line)
        warnings.warn_explicit("something else", UserWarning, "/site-packages/other.py", 1)
    assert attention.by_place(heard) == {"core/layer.py:7": 2, "core/layer.py:9": 1}
