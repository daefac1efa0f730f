"""`megarl scaling` in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megarl import cli
from tests.support.studies import Tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Tool:
    """The command, given its words, from the repository's root; returns what it prints, raises its errors."""
    monkeypatch.chdir(Path(__file__).parents[2])

    def call(*arguments: object) -> str:
        done = CliRunner().invoke(cli.app, ["scaling", *map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    return call
