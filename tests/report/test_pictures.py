"""`make pictures`: the curve shows what the run measured, and the screenshots come from a real Chromium. What they look
like is for a person to judge."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megarl.errors import UserError
from megarl.report import write
from tests.support import synthetic
from tools import pictures


def measured(folder: Path, accuracies: list[float]) -> Path:
    """A run directory with an evaluation of 100 tokens and more at every tenth step."""
    lines = [{"step": 10 * i, "eval/accuracy": a, "eval/response_tokens": 100.0 + i} for i, a in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 99}]))
    return folder


def test_the_curve_has_every_evaluation_and_names_both_ends(tmp_path: Path) -> None:
    """Higher values lie higher; steps without an evaluation are left out. It is well-formed XML."""
    svg = pictures.curve(measured(tmp_path, [0.5, 0.75, 0.625]))
    ElementTree.fromstring(svg)
    assert "accuracy: 50.0% → 62.5%" in svg and "tokens: 100.0 → 102.0" in svg
    accuracy, tokens = ([tuple(map(float, p.split(","))) for p in points.split()]
                        for points in re.findall(r'points="([^"]+)"', svg))  # fmt: skip
    assert len(accuracy) == len(tokens) == 3
    assert accuracy[1][1] < accuracy[2][1] < accuracy[0][1]
    assert tokens[0][1] > tokens[1][1] > tokens[2][1]


def test_a_run_without_two_evaluations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 evaluations; .*evaluation\.every"):
        pictures.curve(measured(tmp_path, [0.5]))


@pytest.mark.browser
def test_the_report_is_shot_in_both_schemes_and_widths(tmp_path: Path) -> None:
    """Four PNGs of the sizes asked for; light and dark differ."""
    page = write([synthetic.write(tmp_path / "run", 4, 6, 4)])
    pictures.screenshots(page, tmp_path)
    for screen, (width, height, scale) in pictures.SCREENS.items():
        light, dark = ((tmp_path / f"report_{screen}_{scheme}.png").read_bytes() for scheme in ("light", "dark"))
        assert struct.unpack(">II", light[16:24]) == (width * scale, height * scale)
        assert light != dark
