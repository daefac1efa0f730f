"""What the pages say exists: link targets, commands with their options and settings, make targets; the reference of
settings is what the code prints. Not proven: that what a page explains is so (test_adding.py proves it of four)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from checkpoints_conv.cli import app as conversions
from megarl import bench, cli, config, launch
from megarl.config import docs
from megarl.planner.command import main as planner
from megarl.scaling import cells, study
from megarl.scaling.command import app as scaling
from tests.support import english, pages

PAGES = [pytest.param(page, id=str(page.relative_to(pages.ROOT))) for page in pages.pages()]
KEYS = {s.key for g in docs.groups() for s in g.settings} | {g.key for g in docs.groups()} | {"recipe", "include"}


def test_the_settings_reference_is_current() -> None:
    """Else: megarl settings > docs/configuration.md"""
    page = (pages.ROOT / "docs" / "configuration.md").read_text()
    assert page == docs.PREFACE + docs.markdown()
    assert [s.key for g in docs.groups() for s in g.settings if not s.doc] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in pages.links(page):
        if re.match(r"https?://|mailto:", link):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in pages.anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.id.startswith(("C", "README", "docs/", "examples/", "tools/"))])
def test_pages_are_in_plain_english(page: Path) -> None:
    """No sentence of over 30 words, and none of the phrases that english.py lists."""
    assert english.long(page.read_text()) + english.avoided(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: Path) -> None:
    """Every `megarl …` is a command, its options are options of it, its overrides are settings, its files are there."""
    for words in pages.commands(page):
        try:
            _parse(words)
        except Exception as e:  # click's own, or typer's copy of it
            pytest.fail(f"{page.name}: megarl {' '.join(words)}: {getattr(e, 'message', e)}")
    targets = set(re.findall(r"^(\S+?):", (pages.ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for words in pages.commands(page, "make"):
        assert {word for word in words if "=" not in word} <= targets, f"{page.name}: make {' '.join(words)}"


def test_the_studies_of_scaling_commands_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of every study in `megarl scaling …` passes the checks that precede loading weights."""
    monkeypatch.chdir(pages.ROOT)
    found = [
        words for page in pages.pages() for words in pages.commands(page) if words[:1] == ["scaling"] and words[2:]
    ]
    assert found
    for file in {words[2] for words in found}:
        cells.check(study.read(Path(file)), tmp_path)


def test_symptoms_are_words_of_the_code() -> None:
    """Messages and metrics that troubleshooting explains: a reworded message is found here."""
    code = " ".join(
        f.read_text() for folder in ("megarl", "checkpoints_conv") for f in (pages.ROOT / folder).rglob("*.py")
    )
    rows = re.findall(r"^\| (.+?) \|", (pages.ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    symptoms = [span for row in rows for span in re.findall(r"`([^`]+)`", row)]
    assert len(symptoms) > 15
    assert [symptom for symptom in symptoms if symptom not in code] == []


def _training() -> list[list[str]]:
    """Those of the repository's files on the built-in engine: the others need `make engines`. Other files
    (examples/own_model, README's my_run.yaml) are run by test_own_model.py and test_documented.py."""
    lines = [words for page in pages.pages() for words in pages.commands(page) if words[0] == "train" and words[1:]]
    files = [words for words in lines if words[1].endswith(".yaml") and (pages.ROOT / words[1]).is_file()]
    return [words for words in files if not any("rollout.engine=" in word for word in words)]


@pytest.mark.parametrize("words", _training(), ids=" ".join)
def test_training_commands_are_ready_to_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each passes every check that precedes loading weights, data included (`--dry-run`), in a folder of its own."""
    monkeypatch.chdir(pages.ROOT)
    overrides = [word for word in words[2:] if "=" in word and not word.startswith("--")]
    settings = config.load(Path(words[1]), [*overrides, f"run={tmp_path / 'run'}"])
    launch.train(settings, None, "--resume" in words, dry_run=True)
    assert not (tmp_path / "run").exists()


def _parse(words: list[str]) -> None:
    """Resolve and parse as the command line would; nothing runs."""
    command: Any = get_command(cli.app)
    name, *rest = words
    if "|" in name:  # `megarl train|eval`
        for each in name.split("|"):
            _parse([each])
        return
    if name == "…" or name.isupper():  # `megarl COMMAND`
        return
    if name == "bench":
        if not rest or rest[0].isupper():
            return
        module = bench.load(rest[0])
        sub, rest = _single(module.main), rest[1:]
    elif name == "plan":
        sub = _single(planner)
    elif name in ("convert", "scaling"):
        group: Any = get_command({"convert": conversions, "scaling": scaling}[name])
        if not rest:
            return
        assert rest[0] in group.commands, f"no command {rest[0]}"
        sub, rest = group.commands[rest[0]], rest[1:]
    else:
        assert name in command.commands, f"no command {name}"
        sub = command.commands[name]
    if not rest:  # a command's name in running text
        return
    if rest[0].startswith("-") and name != "bench":  # an option's name in running text
        rest = ["CONFIG", *rest]
    rest = ["8" if word in ("N", "M") else word for word in rest]
    sub.make_context(name, rest, resilient_parsing=False)
    for word in rest:
        key, equals, _ = word.partition("=")
        if equals and not word.startswith("-") and name in ("train", "sft", "eval", "plan"):
            assert key in KEYS or key == "key", f"no setting {key}"
        if word.startswith("examples/"):
            assert (pages.ROOT / word).exists(), f"no file {word}"


def _single(function: Any) -> Any:
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return get_command(app)
