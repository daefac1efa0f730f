"""Every command of README and docs is executed: commands.py says how. Those of `here` run in a copy of the examples,
one after the other in one process (driver.py), each in its documented form with work made small.

Not proven: that the full work of a long command ends well; the figures that README quotes come from it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import commands, pages

README = pages.ROOT / "README.md"
DOCUMENTED = sorted({command for page in pages.pages() for command in pages.shell(page)})
HERE = [c for c in DOCUMENTED if (found := commands.rule(c)) and found.run]
TIMEOUT = 580.0  # a minute or two on a quiet machine
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def to_run(command: str) -> list[str]:
    """The words that are executed for a documented command, placeholders filled in."""
    rule = commands.rule(command)
    assert rule is not None
    if "*" in rule.command and rule.run.startswith(rule.command):  # the documented words, then what makes it small
        words = shlex.split(rule.run.removeprefix(rule.command))
        return [commands.PLACES.get(word, word) for word in (*_words(command), *words)]
    return [commands.PLACES.get(word, word) for word in shlex.split(rule.run)]


def _words(command: str) -> list[str]:
    """Of a command whose quotes are gone: a setting's value may hold blanks, but no command of `here` has such."""
    return command.split()


def order(command: str) -> int:
    return commands.RULES.index(commands.rule(command))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(the folder, what each command of `here` did)."""
    tree = tmp_path_factory.mktemp("documented")
    for folder in ("examples", "tools", "docs"):
        shutil.copytree(pages.ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    for name, text in pages.files(README).items():
        (tree / name).write_text(text)
    (tree / "my_problems.jsonl").write_text("".join(pages.blocks(README, "json")))
    for study in (tree / "examples" / "scaling").glob("*.yaml"):
        study.write_text(yaml.safe_dump(cut(yaml.safe_load(study.read_text()))))
    wanted = sorted(HERE, key=order)
    (tree / "commands.json").write_text(json.dumps([to_run(command) for command in wanted]))
    environment = os.environ | {"PYTHONPATH": str(pages.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(pages.ROOT / "tests" / "support" / "driver.py"), "commands.json", "results.json"],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tree / "results.json").read_text())
    return tree, dict(zip(wanted, results, strict=True))


def cut(study: dict[str, Any]) -> dict[str, Any]:
    """A study of the real trainer with one seed, the first value of what varies, and two steps of a few tokens."""
    if study["how"] != "local":
        return study
    small = {
        "steps": 2, "batch.prompts_per_step": 4, "batch.completions_per_prompt": 4, "evaluation.limit": 8,
        "rollout.max_response_tokens": 24,
    }  # fmt: skip
    varied = {key: values[:1] for key, values in study.get("vary", {}).items()}
    kept = {key: value for key, value in small.items() if key not in varied}
    return study | {
        "seeds": study["seeds"][:1], "skip": 1, "settings": study["settings"] | kept,
        **({"vary": varied} if varied else {}), **({"points": study["points"][:1]} if "points" in study else {}),
    }  # fmt: skip


@pytest.mark.parametrize("command", DOCUMENTED)
def test_it_is_known_how_the_command_is_executed(command: str) -> None:
    """Else: say so in commands.py. A test that executes it is there, does, and is one of those that .ci/run runs."""
    rule = commands.rule(command)
    assert rule is not None, f"commands.py has no rule for: {command}"
    assert rule.run or rule.test or rule.why
    if rule.test:
        file, _, name = rule.test.partition("::")
        text = (pages.ROOT / file).read_text()
        text = function(text, name) if name else text
        assert rule.by in text, f"{rule.test} does not contain {rule.by}"
        assert "skip" not in text.partition("def ")[0], f"{rule.test} may be skipped"
    for word in command.split():
        if word.startswith(("tests/", "slurm/")):
            assert (pages.ROOT / word).exists(), word
    if command.startswith("pip install") and (extras := re.search(r"\[(.*)\]", command)):
        setup = (pages.ROOT / "setup.py").read_text()
        assert all(f'"{extra}":' in setup for extra in extras[1].split(","))


def function(text: str, name: str) -> str:
    """The source of a module's function, decorators included; fails when there is none."""
    found = [f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name == name]
    assert found, f"no test is called {name}"
    first = min([found[0].lineno, *(d.lineno for d in found[0].decorator_list)])
    return "\n".join(text.splitlines()[first - 1 : found[0].end_lineno])


def test_no_rule_is_left_over() -> None:
    used = {id(commands.rule(command)) for command in DOCUMENTED}
    assert [rule.command for rule in commands.RULES if id(rule) not in used] == []


def test_the_quick_start_is_the_command_that_is_executed() -> None:
    """`make quickstart` is that line of the Makefile, after `make setup`."""
    rule = commands.rule("make quickstart")
    recipe = re.search(r"^quickstart: setup\n\t\$\(BIN\)/(.+)$", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe and rule and rule.run.startswith(recipe[1] + " ")


@pytest.mark.parametrize("command", HERE)
def test_the_command_does_what_it_says(executed: tuple[Path, dict[str, dict[str, Any]]], command: str) -> None:
    """Exit code 0, and the file or the words that it is for."""
    tree, results = executed
    found, rule = results[command], commands.rule(command)
    assert rule is not None
    assert found["code"] == 0, f"{shlex.join(to_run(command))}\n{found['output'][-3000:]}"
    assert rule.says in found["output"], found["output"][-3000:]
    assert (tree / rule.leaves).exists()


def test_shipped_problems_are_what_their_commands_write(executed: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """To the byte, of all three examples."""
    tree, _ = executed
    written = list((tree / "examples").glob("*/problems/*"))
    assert len(written) == 5
    for file in written:
        assert file.read_bytes() == (pages.ROOT / file.relative_to(tree)).read_bytes(), file
