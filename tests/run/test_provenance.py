"""What a run says of its making: the commit, without waiting for a git that does not answer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megarl.run import provenance


def stub(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `git` that runs `script`."""
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_commit_is_gits_and_says_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, 'test "$1" = status && echo " M file" || echo abc1234', monkeypatch)
    assert provenance.commit() == "abc1234"
    assert provenance.commit(changes=True) == "abc1234+changes"


@pytest.mark.parametrize("script", ["exec sleep 60", "exit 128", "kill -9 $$"])
def test_a_git_that_fails_or_hangs_costs_a_run_nothing(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, script, monkeypatch)
    monkeypatch.setattr(provenance, "GIT_TIMEOUT", 0.2)
    assert provenance.commit() is None
    assert provenance.describe(1)["commit"] is None


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        subprocess.run(["git"], check=False)
    assert provenance.commit() is None
