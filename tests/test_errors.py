"""What an error or a table quotes from outside is text: it cannot control the terminal or be read as markup."""

from __future__ import annotations

import io

import pytest

from megarl import cli
from megarl.errors import RunError, UserError, one_line, printable
from megarl.view.console import console, plain
from megarl.view.progress import RunProgress
from megarl.view.table import show, show_rows

HOSTILE = [
    "\x1b[2J\x1b[31mred", "a\rb", "bell\a", "\x9b31m", "back\b\b", "null\0", "\x7f", "\u202egnp.exe", "\u2028line",
    "\ufeffbom", "\ud800", "\x0b\x0c\x85",
]  # fmt: skip
MARKUP = "runs/[/]x[bold]y[/bold] [link=http://a]b[/link] :smile: [red"


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_written_out(text: str) -> None:
    for clean in (printable(text), one_line(text)):
        assert clean.isprintable() and clean.encode()


def test_ordinary_text_stays() -> None:
    text = "naïve – ½ √3 „x“ 数学 🙂 [a] \\x1b"
    assert printable(text) == one_line(text) == text
    assert printable("a\nb\tc\u3000d") == "a\nb c d"
    assert one_line("a\nb") == "a b"


@pytest.mark.parametrize("error", [UserError, RunError])
def test_the_command_prints_errors_without_control(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of it begins with the program's name."""

    def fail() -> None:
        raise error("\n".join(HOSTILE[:5]))

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == (2 if error is UserError else 1)
    said = capsys.readouterr().err
    lines = said.removesuffix("\n").split("\n")
    assert len(lines) == 5 and all(line.isprintable() and line.startswith("megarl: ") for line in lines)


def test_nothing_is_read_as_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, the progress of a run and messages show a path with brackets as it is, and no escape code of others."""
    monkeypatch.setenv("COLUMNS", "200")
    nasty = MARKUP + HOSTILE[0]
    show({"run": nasty, nasty: 1})
    show_rows(nasty, [{nasty: nasty}])
    RunProgress(1).say(nasty)
    said = "".join(capsys.readouterr())
    assert said.count(MARKUP) == 6
    assert "\x1b[2J" not in said


def test_a_style_is_kept() -> None:
    terminal = console(file=io.StringIO(), force_terminal=True, color_system="standard")
    terminal.print(plain("[red]x", "bold"))
    assert terminal.file.getvalue() == "\x1b[1m[red]x\x1b[0m\n"  # type: ignore[attr-defined]
