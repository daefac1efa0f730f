"""`megarl bench rollout`: every engine does the whole work. Its ratios are a benchmark's affair, not a test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.bench import rollout
from megarl.errors import UserError

pytestmark = pytest.mark.slow


def test_engines_do_the_same_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]) -> None:
    """Two requests of the quick start's model: both engines make as many tokens, and the file says how fast.

    Each engine's runner checks the lengths itself.
    """
    monkeypatch.chdir(Path(__file__).parents[2])
    small = ("--models", "reasoner", "--batches", 2, "--repeats", 1)
    bench("rollout", "--json", tmp_path / "rollout.json", *small)
    rows = json.loads((tmp_path / "rollout.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["local", "transformers"]
    assert rows[0]["tokens"] == rows[1]["tokens"] == rollout.draw(36, 2).tokens
    assert rows[1]["ratio"] == 1 and rows[0]["ratio"] > 0
    assert [row["logprobs"] for row in rows] == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"engines": "locla"}, ["--engines", "'local'"]), ({"batches": "16,x"}, ["--batches", "16,x"])],
)
def test_refuses_what_it_does_not_know(options: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        rollout.main(**options)
    for word in words:
        assert word in str(caught.value)
