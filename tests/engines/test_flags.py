"""`rollout.servers.flags` in a dry run: what the engine's own parser says of them, and that nothing else runs."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.config import Settings, parse
from megarl.errors import DeadlineExceeded, RunError, UserError
from megarl.rollout.servers import factory, flags
from megarl.rollout.servers.process import Server
from tests.support.real_servers import Policy, settings

pytestmark = pytest.mark.slow

PROGRAM = """
import argparse, os, subprocess, sys
print("a line that is no answer")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # an engine's scheduler
parser = argparse.ArgumentParser(prog="toy")
parser.add_argument("model", nargs="?")
parser.add_argument("--tp-size", type=int)
parser.parse_args()
open(os.environ["STARTED"], "w").close()
"""


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The processes started in the test that still run."""
    mark = f"MEGARL_TEST_MARK={secrets.token_hex(8)}"
    monkeypatch.setenv(*mark.split("="))

    def running() -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text())
            except (OSError, ProcessLookupError):  # ended meanwhile, or another user's
                continue
        return found

    return running


def toy(tmp_path: Path, *words: str, code: str = PROGRAM, timeout: float = 60.0) -> str | None:
    """What the toy engine's parser says of `words`; asserts that the program did not go on."""
    (tmp_path / "toy.py").write_text(code)
    started = tmp_path / "started"
    line = [sys.executable, str(tmp_path / "toy.py"), *words]
    try:
        return flags.refusal("toy", line, {"STARTED": str(started)}, timeout)
    finally:
        assert not started.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp-size", "4"], None),
        (["--tp-sze", "4"], "unrecognized arguments: --tp-sze (did you mean '--tp-size'?)"),
        (["--tp-size", "four"], "argument --tp-size: invalid int value: 'four'"),
        (["--tp-size", "4", "5"], "unrecognized arguments: 5"),
        (["--help"], "one of them, such as --help, makes the server print something and exit"),
    ],
)
def test_the_programs_own_parser_decides_and_nothing_is_left(
    words: list[str], said: str | None, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    """Also of what the program had started, and with output of its own; a text that is no flag would go unread."""
    assert toy(tmp_path, *words) == said
    assert left() == []


def test_a_module_is_run_as_python_does() -> None:
    line = [sys.executable, "-m", "megarl.rollout.local.server", "--model", "x", "--port", "1"]
    assert flags.refusal("local", line, {}) is None
    said = flags.refusal("local", [*line, "--slot-s", "2"], {})
    assert said == "unrecognized arguments: --slot-s 2 (did you mean '--slots'?)"


def test_a_program_that_ends_before_or_never_reads_its_flags(tmp_path: Path, left: Callable[[], list[str]]) -> None:
    with pytest.raises(RunError, match="ended before it read its flags: ModuleNotFoundError: .*'no_such_engine'"):
        toy(tmp_path, code="import no_such_engine")
    with pytest.raises(DeadlineExceeded, match="after 0.5 s waiting for toy to read its flags"):
        toy(tmp_path, code="import time; time.sleep(600)", timeout=0.5)
    assert left() == []


def of_a_run(tmp_path: Path, engine: str = "sglang", **servers: object) -> Settings:
    rollout = {"engine": engine, "servers": {"device": "cpu", **servers}}
    return parse({"run": str(tmp_path), "model": {"path": "."}, "data": {"train": []}, "rollout": rollout})


def test_flags_that_no_server_here_would_read_are_not_checked(tmp_path: Path) -> None:
    given = ["--tp-sze", "4"]
    assert flags.checked(of_a_run(tmp_path)) == "none"
    assert "embedded" in flags.checked(of_a_run(tmp_path, "local", flags=given))
    for addresses in ([], ["http://10.0.0.1:1"]):
        missing = of_a_run(tmp_path, python="/no/python", addresses=addresses, flags=given)
        assert "not checked: /no/python does not exist" in flags.checked(missing)


def test_an_interpreter_without_the_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout.servers.python: .*: the server ended before .*sglang"):
        flags.checked(of_a_run(tmp_path, python=sys.executable, flags=["--tp-size", "1"]))


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--tp-size 4", r"'--tp-size 4': .* two texts: \[--tp-size, \"4\"\]"), ("--api-key=x", "--api-key")],
)
def test_flags_that_may_not_stand_on_the_command_line(flag: str, words: str, tmp_path: Path) -> None:
    """For the run itself too."""
    with pytest.raises(UserError, match=words):
        flags.checked(of_a_run(tmp_path, flags=[flag]))
    with pytest.raises(UserError, match=words):
        factory.check(of_a_run(tmp_path, python=sys.executable, flags=[flag]).rollout)


def test_a_server_that_refuses_its_flags_is_quoted_without_the_list_of_them(tmp_path: Path) -> None:
    """As when it is started without a dry run."""
    many = "".join(f"parser.add_argument('--flag-{i}')\n" for i in range(100))
    code = f"import argparse\nparser = argparse.ArgumentParser(prog='toy serve')\n{many}parser.parse_args()"
    server = Server("toy", lambda port: [sys.executable, "-c", code, "--tp-sze"], log=tmp_path / "toy.log")
    server.start()
    assert server.reaper is not None
    server.reaper.wait(60)
    server.stop()
    assert server.last_words() == "toy serve: error: unrecognized arguments: --tp-sze"


REAL = {  # engine → flags that it takes, and what it says of others
    "sglang": (
        ["--tp-size", "1", "--log-level", "warning"],
        {
            ("--tp-sze", "4"): "unrecognized arguments: --tp-sze 4 (did you mean '--tp-size'?)",
            ("--max-running-requests", "many"): "argument --max-running-requests: invalid int value: 'many'",
        },
    ),
    "vllm": (
        ["-tp", "1", "--max_num_seqs=8", "--compilation-config.mode", "0"],
        {
            ("--tensor-paralel-size", "4"): "--tensor-paralel-size (did you mean '--tensor-parallel-size'?)",
            ("--max-model-len", "many"): "argument --max-model-len: invalid human_readable_int_or_auto value: 'many'",
            ("--enforce-eager", "true"): "unrecognized arguments: true",
        },
    ),
}


@pytest.mark.engines
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", REAL)
def test_real_engines_refuse_what_they_do_not_know(
    engine: str, policy: Policy, tmp_path: Path, left: Callable[[], list[str]]
) -> None:
    right, wrong = REAL[engine]
    assert f"read by {engine}'s own parser" in flags.checked(settings(policy, tmp_path / "run", engine, flags=right))
    for given, said in wrong.items():
        with pytest.raises(UserError, match=rf"^rollout.servers.flags: {engine}: ") as refused:
            flags.checked(settings(policy, tmp_path / "run", engine, flags=list(given)))
        assert said in str(refused.value)
    assert left() == []
    assert not (tmp_path / "run").exists()
