"""The closing table. Proves that it shows the first and the last evaluation, and does without when there is none."""

import json
from pathlib import Path

from rich.console import Console

from megarl.view.summary import summary


def render(folder: Path) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(summary(folder))
    return capture.get()


def evaluation(accuracy: float, tokens: float) -> dict[str, float]:
    return {
        "eval/accuracy": accuracy,
        "eval/response_tokens": tokens,
        "eval/steps_per_response": tokens / 8,
        "eval/completions": 400,
    }


def write(folder: Path, *lines: dict[str, float]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_first_and_last_evaluation_are_compared(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"step": 0, **evaluation(0.5, 120.0)},
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.6, **evaluation(0.6, 100.0)},
        {"step": 3, "reward": 0.6, **evaluation(0.8, 90.0)},
    )
    text = render(tmp_path)
    assert "before (step 0)" in text and "after (step 3)" in text
    assert "50.0% ± 2.5" in text and "80.0% ± 2.0" in text and "+30.0 points" in text
    assert "120.0" in text and "90.0" in text and "-25%" in text
    assert "400 held-out responses" in text
    for folder in ("rollouts", "evaluations"):
        assert str(tmp_path / folder / "step_000003.jsonl") in text.replace("\n", "")


def test_numbers_beside_accuracy(tmp_path: Path) -> None:
    """Graders of any numbers: their mean has a row with its standard error, and accuracy stays a share. A run of an
    older version, whose accuracy was a mean score, has a table too."""
    before = {**evaluation(0.5, 9), "eval/score": -1.0, "eval/score_std": 2.0}
    after = {**evaluation(0.6, 9), "eval/score": 7.5, "eval/score_std": 4.0}
    write(tmp_path, {"step": 0, **before}, {"step": 1, **after})
    (row,) = [line for line in render(tmp_path).splitlines() if "score" in line]
    assert "-1.000 ± 0.100" in row and "7.500 ± 0.200" in row and "+8.500" in row
    assert "60.0% ± 2.4" in render(tmp_path)
    write(tmp_path, {"step": 0, **before, "eval/score": 0.5}, {"step": 1, **after, "eval/score": 0.6})
    assert "score" not in render(tmp_path)
    write(tmp_path, {"step": 0, **evaluation(-0.75, 9)}, {"step": 1, **evaluation(7.5, 9)})
    assert "± 0.0" in render(tmp_path)


def test_replaced_completions_are_not_trained(tmp_path: Path) -> None:
    step = {"early_exit_fraction": 0.0, "completions_dropped": 1, "completions_replaced": 2, "verdict_right": 8}
    write(tmp_path, {"step": 0, **evaluation(0.5, 9)}, {"step": 1, **step, **evaluation(0.5, 9)})
    (row,) = [line for line in render(tmp_path).splitlines() if "completions not trained" in line]
    assert "38%" in row


def test_savings_are_shares_of_all_completions(tmp_path: Path) -> None:
    """What was off is not shown."""
    step = {"early_exit_fraction": 0.25, "completions_dropped": 3, "verdict_right": 5, "verdict_wrong": 3}
    lines = [{"step": 0, **evaluation(0.5, 9)}, {"step": 1, **step}, {"step": 2, **step, "completions_dropped": 1}]
    write(tmp_path, *lines, {"step": 3, **step, "completions_dropped": 2, **evaluation(0.5, 9)})
    rows = [line.split() for line in render(tmp_path).splitlines()]
    assert any(row[1:5] == ["rollouts", "that", "ended", "early"] and "25%" in row for row in rows)
    assert any(row[1:4] == ["completions", "not", "trained"] and "25%" in row for row in rows)
    write(tmp_path, lines[0], {"step": 1, **step, "early_exit_fraction": 0.0, **evaluation(0.5, 9)})
    assert "ended early" not in render(tmp_path)


def test_without_evaluations_only_the_pointers_are_shown(tmp_path: Path) -> None:
    write(tmp_path, {"step": 1, "reward": 0.5})
    text = render(tmp_path)
    assert "held-out" not in text
    assert "metrics.jsonl" in text
