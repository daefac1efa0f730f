"""The report without a browser: what is chosen, what is packed, what a fault does. The page itself: test_browser.py."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from megarl import report
from megarl.report import rollouts, run
from megarl.run.directory import read_metrics
from tests.support import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(tmp_path_factory.mktemp("runs") / "small", steps=6, groups=4, per_group=4, hostile=True)


def chunk(page: str, name: str):
    text = re.search(rf'id="chunk-{name}">([^<]*)<', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_is_one_file_that_names_no_address_and_holds_no_foreign_markup(folder: Path) -> None:
    page = report.write([folder]).read_text()
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "onerror" not in page and "default-src 'none'" in page
    assert not list(folder.glob("*.partial"))


def test_packed_rollouts_are_those_on_disk(folder: Path) -> None:
    """Token ids, log-probs to the thousandth, origins, probes and figures of every completion."""
    page = report.write([folder]).read_text()
    table = chunk(page, "tokens-0")
    records = synthetic.rows(folder, 3)
    shown = [c for group in chunk(page, "step-0-3") for c in group["completions"]]
    assert len(shown) == len(records) == 16
    for c, record in zip(shown, records, strict=True):
        assert [table[n][0] for n in c["t"]] == record["response_ids"]
        assert [o for o, count in c["o"] for _ in range(count)] == record["origin"]
        for ours, theirs in zip(c["l"], record["logprobs"], strict=True):
            assert (ours is None and theirs is None) or abs(ours / -1000 - theirs) <= 5.1e-4
        assert [p[:3] for p in c["probes"]] == [p[:3] for p in record["probes"]]
        assert all(c[key] == record[key] for key in ("reward", "advantage", "weight", "verdict", "exit_reason"))


def test_metrics_are_kept_digit_by_digit(folder: Path) -> None:
    columns = chunk(report.write([folder]).read_text(), "main")[0]["metrics"]
    lines = read_metrics(folder)
    assert columns["step"] == [line["step"] for line in lines]
    assert columns["reward"] == [line.get("reward") for line in lines]
    assert columns["loss"][:2] == [None, "nan"]  # JSON has no NaN


def test_what_does_not_fit_is_left_out_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups and evenly spread steps, the first and the last among them; never above the budget by much."""
    everything = len("".join(rollouts.pack(run.read(folder)).chunks.values()))
    packed = rollouts.pack(run.read(folder), everything // 3)
    assert {row["step"] for row in packed.index} >= {1, 6} and len(packed.index) < 6
    assert sum(map(len, packed.chunks.values())) <= everything // 2
    assert all(row["completions"] % 4 == 0 for row in packed.index)
    monkeypatch.setattr(rollouts, "BUDGET", everything // 3)
    assert "out of 6 steps" in report.write([folder]).read_text()
    assert rollouts.choose([10**9] * 1000, 10**9)[::3][0] == 0
    assert rollouts.choose([10**9] * 1000, 10**9)[-1] == 999


def test_calibration_counts_every_probe(folder: Path) -> None:
    counted = rollouts.pack(run.read(folder)).calibration
    records = [r for step in range(1, 7) for r in synthetic.rows(folder, step)]
    pairs = [(c, r["verdict"] == "right") for r in records for _, c, *_ in r["probes"]]
    last = [(c, right) for c, right in pairs if c >= 0.9]
    assert sum(n for n, _, _ in counted) == len(pairs)
    assert counted[9][0] == len(last)
    assert counted[9][1] == pytest.approx(sum(c for c, _ in last) / len(last))
    assert counted[9][2] == pytest.approx(sum(right for _, right in last) / len(last))


def test_only_settings_that_differ_are_marked(folder: Path) -> None:
    rows = {row["key"]: row for row in run.settings_rows(run.read(folder).settings)}
    assert rows["pruning.completions"]["changed"] and rows["pruning.completions"]["default"] == "0"
    assert not rows["optimizer.lr"]["changed"] and not rows["run"]["changed"]
    assert "r_o" in rows["pruning.completions"]["doc"]


def test_the_ledger_is_summed_by_step_and_epoch(folder: Path) -> None:
    view = run.ledger_view(run.read(folder).ledger)
    assert view["fates"]["trained"] == [4] * 6 and view["fates"]["pruned"] == [1] * 6
    assert [e["epoch"] for e in view["epochs"]] == [0, 1, 2]
    assert sum(e["repeated"] for e in view["epochs"]) == 4 + 4 + 0  # steps share an epoch here: found, not hidden
    assert view["total"] == 30


def test_held_out_responses_are_on_the_page(folder: Path, tmp_path: Path) -> None:
    """Beside the rollouts, in order, with score and message; without them the rollouts have the whole budget."""
    shutil.copytree(folder, tmp_path / "run")
    for step in (2, 6):
        records = synthetic.write_held_out(tmp_path / "run", step)
    page = report.write([tmp_path / "run"]).read_text()
    index = chunk(page, "main")[0]["rollouts"]
    assert [row["key"] for row in index] == [1, 2, 3, 4, 5, 6, "eval-2", "eval-6"]
    assert [row["held_out"] for row in index] == [False] * 6 + [True] * 2
    shown = [c for group in chunk(page, "step-0-eval-6") for c in group["completions"]]
    assert [(c["score"], c["message"], c["weight"]) for c in shown] == [
        (0.75, f"why {r['index']}", None) for r in records
    ]
    with_them, without = (rollouts.pack(run.read(each)) for each in (tmp_path / "run", folder))
    assert with_them.calibration == without.calibration


def test_numbers_of_graders_are_told_from_accuracy(tmp_path: Path) -> None:
    """Any numbers have a page, the mean score its own tile; where it is the accuracy there is none."""
    end = {"step": 1, "eval/accuracy": 0.5, "eval/score": 7.5, "eval/score_std": 1.0, "eval/completions": 100}
    lines = [{**end, "step": 0, "eval/score": -1.0}, {**end, "reward": 7.5, "accuracy": 0.25, "score": -0.75}]

    def tiles() -> dict[str, tuple[float, str]]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        report.write([tmp_path])
        return {tile["label"]: (tile["value"], tile["note"]) for tile in run.tiles(run.read(tmp_path))}

    assert tiles()["Held-out accuracy"] == (0.5, "± 5.0, 100 held-out responses")
    assert tiles()["Held-out score"] == (7.5, "± 0.100, the graders' mean")
    assert tiles()["Training accuracy"][0] == 0.25 and tiles()["Training score"][0] == -0.75
    lines = [{**lines[0], "eval/score": 0.5}, {**lines[1], "eval/score": 0.5, "score": 0.25}]
    assert not {"Held-out score", "Training score"} & tiles().keys()
    lines = [{**line, "eval/accuracy": 7.5} for line in lines]  # an older run's mean score
    assert tiles()["Held-out accuracy"][0] == 7.5


def test_a_run_that_was_over_early_says_why(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "reward": 1.0, "ended": "nothing is left to learn"}\n')
    assert run.read(tmp_path).finished
    assert "the run was over at step 3: nothing is left to learn" in report.write([tmp_path]).read_text()


def test_a_run_that_just_began_has_a_page(tmp_path: Path) -> None:
    """No checkpoint, no rollouts, no environment, no config: absent, not an error."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.5}\n{"step": 1, "rew')
    page = report.write([tmp_path]).read_text()
    assert "settings are not shown" in page and chunk(page, "main")[0]["ledger"] is None


def test_without_the_tokenizer_the_text_is_shown(folder: Path, tmp_path: Path) -> None:
    moved = run.read(folder)
    moved.settings["model"]["path"] = str(tmp_path / "gone")
    packed = rollouts.pack(moved)
    assert "shown as text" in packed.notice
    assert json.loads(gzip.decompress(base64.b64decode(packed.chunks[1])))[0]["completions"][0]["text"] == "text"


def test_a_broken_report_is_told_and_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("not JSON\n")
    assert report.at_end(tmp_path) is None
    told = capsys.readouterr().err
    assert "metrics.jsonl:1: damaged: it is not JSON" in told and f"megarl report {tmp_path}" in told
    assert told.count("\n") == 1
