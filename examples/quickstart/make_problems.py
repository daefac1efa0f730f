r"""Write the quick start's files: the problems of each split and, on request, the lesson for supervised fine-tuning.

    python -m examples.quickstart.make_problems examples/quickstart/problems
    python -m examples.quickstart.make_problems runs/lesson --lesson 96000
    python -m examples.quickstart.make_problems examples/dppo/problems --train 256 --validation 0 --heldout 0 \
        --easy 0.5 --hopeless 0.25
    python -m examples.quickstart.make_problems examples/step_grpo/problems --train 0 --validation 0 --heldout 0 \
        --longer 500

The same arguments write the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from examples.quickstart.search_verify import MIX, Kind, Split, draw_problems, lesson_rows
from megarl.errors import UserError


def main(
    folder: Annotated[Path, typer.Argument(help="Where the files go.")],
    train: Annotated[int, typer.Option(help="Problems in train.jsonl.")] = 1024,
    validation: Annotated[int, typer.Option(help="Problems in validation.jsonl.")] = 500,
    heldout: Annotated[int, typer.Option(help="Problems in heldout.jsonl.")] = 500,
    longer: Annotated[int, typer.Option(help="Held-out problems with longer lists than any taught.")] = 0,
    lesson: Annotated[int, typer.Option(help="Write this many taught responses to lesson.jsonl instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Other seeds draw other problems of the same splits.")] = 0,
    easy: Annotated[float, typer.Option(min=0, max=1, help="Share of easy problems in train.jsonl.")] = MIX["easy"],
    hopeless: Annotated[float, typer.Option(min=0, max=1, help="Share of hopeless ones.")] = MIX["hopeless"],
) -> None:
    """Write {train,validation,heldout,longer}.jsonl, apart from those of 0 problems, or lesson.jsonl, to FOLDER."""
    if lesson:
        write_jsonl(folder / "lesson.jsonl", lesson_rows(lesson, seed))
        return
    if easy + hopeless > 1:
        raise UserError(f"easy: {easy:g} and hopeless: {hopeless:g} are more than all; at most {1 - hopeless:g}")
    mix = {"easy": easy, "long": 1 - easy - hopeless, "hopeless": hopeless}
    files: list[tuple[str, Split, int, Mapping[Kind, float]]] = [
        ("train", "train", train, mix),
        ("validation", "validation", validation, MIX),
        ("heldout", "heldout", heldout, MIX),
        ("longer", "heldout", longer, {"longer": 1.0}),
    ]
    for name, split, count, shares in files:
        if count:
            problems = draw_problems(split, count, seed, shares)
            rows = ({"prompt": p.prompt, "answer": p.question, "kind": p.kind} for p in problems)
            write_jsonl(folder / f"{name}.jsonl", rows)


def write_jsonl(file: Path, rows: Iterable[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    typer.run(main)
