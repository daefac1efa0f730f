"""Which benchmarks there are, and where they come from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megarl import bench as benchmarks

ROOT = Path(__file__).parents[2]
STUDIES = {"step_grpo", "dppo", "precision", "planner"}
STUDY = '"""A study of mine.\n\nMore about it."""\n\ndef main():\n    print("measured")\n'


def test_the_checkouts_studies_are_benchmarks() -> None:
    assert benchmarks.names().keys() >= {*STUDIES, "parity", "conversion"}
    assert all(benchmarks.summary(name) for name in benchmarks.names())
    assert benchmarks.load("dppo").METHODS


def test_a_study_of_the_working_directory_is_a_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bench
) -> None:
    """It is listed without being imported; it cannot replace an installed one."""
    for name, text in (("mine", STUDY), ("parity", STUDY), ("careless", '"""Not imported."""\n1 / 0\n')):
        (tmp_path / "examples" / name).mkdir(parents=True)
        (tmp_path / "examples" / name / "bench.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    bench("mine")
    assert capsys.readouterr().out == "measured\n"
    assert benchmarks.summary("mine") == "A study of mine."
    assert benchmarks.summary("careless") == "Not imported."
    assert benchmarks.names()["parity"] == "megarl.bench.parity"


def test_outside_a_checkout_only_the_installed_ones_are_listed(tmp_path: Path) -> None:
    """The packages alone, in a folder beside somebody else's `examples`."""
    installed = tmp_path / "site-packages"
    (installed / "examples" / "theirs").mkdir(parents=True)
    (installed / "examples" / "theirs" / "bench.py").write_text(STUDY)
    (installed / "megarl").symlink_to(ROOT / "megarl")
    code = "from megarl import bench; print(*bench.names())"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(installed)},
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "parity" in found and not found & {*STUDIES, "theirs"}
