"""A run's output outlives its reader, in a process of its own with a real pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os, subprocess, sys
from pathlib import Path
from megarl.runtime.output import lasting
with lasting(Path(sys.argv[1])):
    print("read", flush=True)
    os.read(0, 1)  # until the reader is gone
    print("kept", file=sys.stderr)
    print("kept too")
    os.write(1, b"from C\\n")
print("after")
"""


def run(logs: Path) -> tuple[int, str]:
    """The exit code of a process whose reader closes the pipe after the first line, and that line."""
    command = [sys.executable, "-c", CODE, str(logs)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert process.stdout is not None and process.stdin is not None
    first = process.stdout.readline()
    process.stdout.close()
    process.stdin.close()
    return process.wait(60), first


def test_output_goes_on_in_a_file(tmp_path: Path) -> None:
    """Proves that Python's and C's lines are kept in the run's logs, and that the process ends as it would have."""
    assert run(tmp_path / "logs") == (0, "read\n")
    assert (tmp_path / "logs" / "output.txt").read_text().splitlines() == ["kept", "kept too", "from C", "after"]


def test_without_a_place_for_the_file_the_process_goes_on(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("not a folder")
    assert run(tmp_path / "logs") == (0, "read\n")
