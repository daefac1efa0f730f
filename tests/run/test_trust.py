"""A run directory of somebody else names code in its config.yaml: it is imported only when the user says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megarl import cli
from megarl.config import load
from megarl.errors import UserError
from megarl.run import trust

NOBODY = 65534
QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
CODE = {
    "reward": "reward: {function: 'timeit:timeit'}",
    "interpreter": "rollout: {engine: sglang, servers: {python: evil/python}}",
    "flags": "rollout: {engine: vllm, servers: {flags: ['--trust-remote-code']}}",
    "secret": "rollout: {engine: sglang, servers: {addresses: ['http://evil:1'], api_key_env: AWS_SECRET_ACCESS_KEY}}",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    write(folder, CODE["reward"])
    return folder


def write(folder: Path, code: str) -> None:
    problems = QUICKSTART / "problems"
    (folder / "config.yaml").write_text(
        f"run: {folder}\nmodel: {{path: {QUICKSTART / 'reasoner'}}}\n"
        f"data: {{train: [{problems / 'train.jsonl'}], eval: [{problems / 'heldout.jsonl'}]}}\n{code}\n"
    )


def give(path: Path) -> None:
    """To another user: only root may."""
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    os.chown(path, NOBODY, NOBODY)


def check(place: Path, overrides: list[str] | None = None, trusted: bool = False) -> None:
    settings = load(place / "config.yaml" if place.is_dir() else place, overrides)
    trust.check(place, settings, overrides, trusted)


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("given", ["run", "run/config.yaml"])
def test_code_of_another_user_is_refused(code: str, given: str, run: Path) -> None:
    """Whether the folder or only its config.yaml is another's, and whether the folder or the file is named."""
    write(run, CODE[code])
    give(run.parent / given)
    for place in (run, run / "config.yaml"):
        with pytest.raises(UserError, match="belongs to user .*names code: .*--trust-run"):
            check(place)
        check(place, trusted=True)


def test_a_run_of_ones_own_needs_no_word(run: Path) -> None:
    check(run)
    check(run / "config.yaml")


def test_what_the_user_sets_is_his_own(run: Path) -> None:
    give(run)
    check(run, ["reward.function=json:dumps"])


def test_a_run_that_names_no_code_needs_no_word(run: Path) -> None:
    write(run, "")
    give(run)
    check(run)


def test_what_everybody_may_write_is_nobodys(run: Path) -> None:
    run.chmod(0o777)
    with pytest.raises(UserError, match="can be written by everybody"):
        check(run)


def test_a_yaml_file_that_is_no_runs_is_the_users_choice(run: Path, tmp_path: Path) -> None:
    """Shipped recipes belong to root, and a colleague's file is named on purpose."""
    (tmp_path / "mine.yaml").write_text((run / "config.yaml").read_text())
    give(tmp_path / "mine.yaml")
    check(tmp_path / "mine.yaml")


@pytest.mark.parametrize("command", ["eval {run}", "train {run}/config.yaml --resume", "serve {run}/config.yaml"])
def test_the_commands_refuse_before_they_import(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    give(run)
    monkeypatch.setattr(sys, "argv", ["megarl", *command.format(run=run).split()])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    assert leave.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "reward.function=timeit:timeit" in error
