"""Documentation as a program reads it: the links, commands, files and edits of a Markdown page."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "megarl", "python", "torchrun", "srun", "sbatch", "make", "pytest", "pip", "git", "cp", "tensorboard", "docker",
    "conda", "uv", "curl", "wget", "hf", "huggingface-cli", "bash", "sh", "export", "source",
    "mkdir", "scancel", "squeue",
)  # fmt: skip
PLACEHOLDERS = {"…", "key=value", ""}


def pages() -> list[Path]:
    """Every Markdown page of the repository, except what is installed or built."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for folder in ("docs", "examples", "tools", "checkpoints_conv", "slurm", "tests"):
        found += sorted((ROOT / folder).rglob("*.md"))
    return [page for page in found if page.is_file()]


def links(page: Path) -> list[str]:
    """Targets of the page's links; code is not looked at."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path, program: str = "megarl") -> Iterator[list[str]]:
    """Arguments of every `program …` line of a code block (continued lines joined) and of every code span."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(rf"^(?: {{4,}}|\t)?{program} (.+)$", text, flags=re.MULTILINE)
    spans = re.findall(rf"`{program} ([^`]+)`", page.read_text())
    for line in (*lines, *(" ".join(span.split()) for span in spans)):
        if line.startswith(("#", "is ", "starts ")):
            continue
        words = [_bare(word) for word in shlex.split(line, comments=True)]
        yield [word for word in words[: words.index("|") if "|" in words else None] if word not in PLACEHOLDERS]


def shell(page: Path) -> Iterator[str]:
    """Every command of the page: the lines of code blocks that begin with one of `PROGRAMS`, or set a variable for it,
    and code spans that are whole commands; comments, brackets and placeholders of a synopsis left out.

    A span with … or | or with options alone (`megarl train --resume`) names something and is no command.
    """
    text = page.read_text()
    fenced = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^(?: {4}|\t).*\n)+", text, flags=re.MULTILINE)
    start = rf"^\s*((?:[A-Z_]+=\S* +)*(?:{'|'.join(PROGRAMS)}) .+)$"
    for block in (*fenced, *blocks):
        for line in re.findall(start, block.replace("\\\n", " "), flags=re.MULTILINE):
            words = [_bare(word) for word in shlex.split(line, comments=True)]
            yield " ".join(word for word in words if word not in PLACEHOLDERS)
    for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(start, span := " ".join(span.split())) and not re.search(r"[…|]", span):
            words = shlex.split(span)
            if not all(word.startswith("-") for word in words[2:] or ["-"]) or words[0] != "megarl":
                yield " ".join(words)


def _bare(word: str) -> str:
    """Without the brackets of a synopsis: `[key=value …]`."""
    word = word.removeprefix("[")
    return word if "[" in word else word.removesuffix("]")


@dataclass(frozen=True)
class Edit:
    """Replace `old`, found exactly once in `file`, by `new`."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        text = (tree / self.file).read_text()
        assert text.count(self.old) == 1, f"{self.file} holds {text.count(self.old)} of:\n{self.old}"
        (tree / self.file).write_text(text.replace(self.old, self.new))


def python(page: Path) -> list[tuple[str | None, str]]:
    """(file, code) of the page's Python blocks; a block for a file names it in its first line's comment."""
    found = []
    for block in blocks(page, "python"):
        name = re.match(r"# (\S+\.py)\n", block)
        found.append((name[1] if name else None, block[name.end() :] if name else block))
    return found


def files(page: Path) -> dict[str, str]:
    """The Python and YAML blocks of the page that name a file in their first line's comment."""
    texts = [block for language in ("python", "yaml") for block in blocks(page, language)]
    return {name[1]: text[name.end() :] for text in texts if (name := re.match(r"# (\S+\.(?:py|yaml))\n", text))}


def edits(page: Path) -> list[Edit]:
    """The page's diffs: `--- file`, then hunks set apart by `@@`, without line numbers."""
    found = []
    for block in blocks(page, "diff"):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            file, _, body = part.partition("\n")
            for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
                lines = hunk.splitlines()
                old = "\n".join(line[1:] for line in lines if line[0] in " -")
                found.append(Edit(file, old, "\n".join(line[1:] for line in lines if line[0] in " +")))
    return found


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of one language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(body) if language != "diff" else _unindent(body, len(indent)) for indent, body in found]


def _unindent(body: str, by: int) -> str:
    return "".join(line[by:] for line in body.splitlines(keepends=True))
