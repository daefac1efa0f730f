"""Two jobs pointed at one run directory: the second is refused in one line; what a killed job left blocks nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megarl.errors import UserError
from megarl.run.lock import FILE, only_job

HOLD = """
import sys
from pathlib import Path
from megarl.run.lock import only_job
with only_job(Path(sys.argv[1]), print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has locked tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def nothing(message: str) -> None:
    pytest.fail(message)


def test_the_second_is_refused_and_the_first_named(tmp_path: Path, holder: subprocess.Popen) -> None:
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on") as refusal, only_job(tmp_path, nothing):
        pass
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_jobs_lock_does_not_block(tmp_path: Path, holder: subprocess.Popen, how: signal.Signals) -> None:
    holder.send_signal(how)
    holder.wait()
    with only_job(tmp_path, nothing):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_waited_for(tmp_path: Path, holder: subprocess.Popen) -> None:
    """A lost node's lock goes when the file server gives it up: waited for, with a message, then refused.

    Another machine is played by another name in the file; how long a real file server takes is not tested.
    """
    (tmp_path / FILE).write_text(json.dumps({"host": "lost-node", "pid": 17}))
    said: list[str] = []
    with pytest.raises(UserError, match="process 17 on lost-node"), only_job(tmp_path, said.append, remote_timeout=0.3):
        pass
    assert len(said) == 1 and "waiting" in said[0]

    def let_go(message: str) -> None:
        holder.kill()

    with only_job(tmp_path, let_go, remote_timeout=60):
        pass


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only file system, played by the error that it gives (root may write anywhere)."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=f"run: {tmp_path} cannot be written: Read-only"), only_job(tmp_path, nothing):
        pass


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said: list[str] = []
    with only_job(tmp_path, said.append):
        assert "without locks" in said[0]


def test_deleting_the_lock_file_lets_nobody_in(tmp_path: Path, holder: subprocess.Popen) -> None:
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="in use by another process"), only_job(tmp_path, nothing):
        pass
    holder.kill()
    holder.wait()
    with only_job(tmp_path, nothing):
        pass


@pytest.mark.parametrize("owner", ["[]", "17", '{"pid": "x", "host": []}', "\x00\x00", ""])
def test_a_lock_file_with_anything_in_it_is_one_line(tmp_path: Path, holder: subprocess.Popen, owner: str) -> None:
    (tmp_path / FILE).write_text(owner)
    with pytest.raises(UserError, match="another process"), only_job(tmp_path, lambda _: None, remote_timeout=0.0):
        pass


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """But logs that say something: the mended command is then accepted. What was there before is left alone."""
    made, before = tmp_path / "new" / "run", tmp_path / "before"
    before.mkdir()
    (before / "notes.txt").touch()
    for run in (made, before):
        with pytest.raises(ValueError), only_job(run, nothing):
            for name in ("config.yaml", "phases/rank_00000.jsonl", "logs/empty", "checkpoints/.step_000001.partial/x"):
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                (run / name).write_text("")
            (run / "metrics.jsonl").touch()
            raise ValueError
    assert not made.exists() and (before / "config.yaml").exists()
    with pytest.raises(ValueError), only_job(made, nothing):
        (made / "logs").mkdir()
        (made / "logs" / "engine.log").write_text("no such device")
        (made / "config.yaml").touch()
        raise ValueError
    assert [path.name for path in made.iterdir()] == ["logs"]


def test_a_run_that_recorded_something_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ValueError), only_job(run, nothing):
        (run / "metrics.jsonl").write_text('{"step": 0}\n')
        raise ValueError
    assert (run / "metrics.jsonl").exists()
