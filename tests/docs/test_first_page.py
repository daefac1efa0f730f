"""README stays a first page: short, plain, with pictures, and with snippets that work as they stand. Not proven: that
the pictures look good; `make pictures` draws them, and a person looks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from megarl import config
from megarl.data.prompts import read_prompts
from tests.support import english, pages

README = pages.ROOT / "README.md"
TEXT = README.read_text()
PICTURES = pages.ROOT / "docs" / "pictures"
WORDS, WORDS_IN_TABLES, WORDS_IN_A_SENTENCE, PICTURE_BYTES = 700, 100, 30, 200_000


def shown() -> set[Path]:
    """The pictures of the page, in all their variants."""
    targets = re.findall(r'(?:src|srcset)="([^"]+)"', TEXT) + re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT)
    return {pages.ROOT / target for target in targets}


def test_it_is_short() -> None:
    """Every word counts, those of code blocks and of pictures' descriptions too."""
    assert len(TEXT.split()) <= WORDS
    rows = re.findall(r"^\|.*$", TEXT, flags=re.MULTILINE)
    assert len(re.sub(r"[|-]{2,}|\|", " ", "\n".join(rows)).split()) <= WORDS_IN_TABLES


def test_its_pictures_exist_and_are_small() -> None:
    """At least three; a picture that is not shown by any page is left over."""
    assert len({re.sub(r"_(light|dark|phone|desktop)", "", picture.stem) for picture in shown()}) >= 3
    for picture in shown():
        assert 0 < picture.stat().st_size <= PICTURE_BYTES, picture
    everywhere = " ".join(page.read_text() for page in pages.pages())
    assert [p.name for p in PICTURES.iterdir() if p.name not in everywhere] == []


def test_every_picture_is_described_in_words() -> None:
    tags = re.findall(r"<img [^>]+>", TEXT)
    assert tags and all(re.search(r'alt="[^"]{20,}"', tag) for tag in tags)


def test_its_sentences_are_short_and_plain() -> None:
    assert english.long(TEXT, WORDS_IN_A_SENTENCE) == []
    assert english.avoided(TEXT) == []


def test_its_quick_start_is_the_one_in_the_picture() -> None:
    """The table's accuracies and tokens stand in the curve's titles, which a run wrote."""
    cells = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", TEXT, flags=re.MULTILINE))
    titles = re.findall(r'class="name"[^>]*>([^<]+)<', (PICTURES / "quickstart.svg").read_text())
    for title, row in zip(titles, ("accuracy", "tokens in a response"), strict=True):
        before, after = re.findall(r"[\d.]+%?", title)
        assert re.fullmatch(rf"{re.escape(before)}( ± [\d.]+)? \| {re.escape(after)}( ± [\d.]+)?", cells[row])


def test_its_settings_load_as_they_stand(tmp_path: Path) -> None:
    """Twelve lines at most; and the engine's lines, put over them."""
    (tmp_path / "my_run.yaml").write_text(files := pages.files(README)["my_run.yaml"])
    assert len(files.splitlines()) <= 12
    settings = config.load(tmp_path / "my_run.yaml", [])
    assert settings.rollout.early_exit.enabled and settings.reward.shaping == "step_aware"
    [engine] = [yaml.safe_load(block) for block in pages.blocks(README, "yaml") if "servers:" in block]
    overrides = [f"rollout.{key}={json.dumps(value)}" for key, value in engine["rollout"].items()]
    assert config.load(tmp_path / "my_run.yaml", overrides).rollout.servers.addresses


def test_its_reward_and_data_work(tmp_path: Path) -> None:
    """The snippets are of at most eight lines; the reward grades a response to the problem that the data line is."""
    for language in ("python", "json"):
        assert all(len(block.splitlines()) <= 8 for block in pages.blocks(README, language))
    space: dict = {}
    exec(pages.files(README)["my_rewards.py"], space)
    [line] = pages.blocks(README, "json")
    (tmp_path / "my_problems.jsonl").write_text(line)
    tokenizer = AutoTokenizer.from_pretrained(pages.ROOT / "examples" / "quickstart" / "reasoner")
    table, _ = read_prompts([tmp_path / "my_problems.jsonl"], tokenizer, config.Data(train=[]))
    assert (prompt := table[0]).answer == "42"
    assert space["in_answer"]("12 and 42? </think> It is \\boxed{42}.", prompt.answer)
    assert not space["in_answer"]("12 and 42? </think> It is \\boxed{41}.", prompt.answer)


@pytest.mark.parametrize("name", ["LICENSE", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md"])
def test_it_names_the_files_of_a_project(name: str) -> None:
    assert f"({name})" in TEXT and (pages.ROOT / name).stat().st_size > 0
