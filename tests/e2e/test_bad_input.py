"""Mistakes that only a started run can find: exit code 2, one line that names the place, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl import cli, config
from tests.support import runs

pytestmark = [pytest.mark.e2e, pytest.mark.parallel]


def test_a_malformed_line_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"prompt": "1 2 -> 3 <think>", "answer": "1 2 -> 3"}\n{"prompt": \n')
    wanted = runs.settings(tmp_path / "run", "parallel={}", "steps=1", f"data.train=[{problems}]")
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(wanted))
    monkeypatch.setattr("sys.argv", ["megarl", "train", str(file)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megarl: ")]
    assert len(lines) == 1 and "problems.jsonl:2" in lines[0], lines
    assert not wanted.run.exists()
