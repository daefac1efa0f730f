"""`megarl bench grading`: its rows, its summary, and what it says of a bad file."""

import json

import pytest

from megarl.bench.grading import SHIPPED, main, read_cases, summary
from megarl.errors import UserError

CASES = [
    {"kind": "thousands", "response": r"4\,321", "reference": "4321", "verdict": "right"},
    {"kind": "thousands", "response": r"4\,321", "reference": "325", "verdict": "wrong"},
    {"response": r"<think>\boxed{7}", "reference": "7", "verdict": "wrong"},
    {"response": "7", "reference": "3 +", "verdict": "error"},
]


def test_rows_of_own_cases(tmp_path):
    """Each row has what was asked, both verdicts and the time; math-verify alone adds 4 and 321."""
    file, out = tmp_path / "cases.jsonl", tmp_path / "out.json"
    file.write_text("\n".join(json.dumps(case) for case in CASES) + "\n\n")
    main(json=out, cases=file, timeout=60.0, workers=1)
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [list(row) for row in rows] == [["kind", "response", "reference", "expected", "verdict", "plain", "ms"]] * 4
    assert [row["verdict"] for row in rows] == ["right", "wrong", "wrong", "error"]
    assert [row["plain"] for row in rows[:2]] == ["wrong", "right"]
    assert result["summary"][-1]["wrong rewarded"] == result["summary"][-1]["right refused"] == 0
    assert result["summary"][-1]["plain wrong rewarded"] >= 1


def test_summary_counts_by_kind():
    row = {"kind": "a", "expected": "wrong", "verdict": "right", "plain": "wrong", "ms": 2.0}
    rows = [
        row,
        row | {"expected": "right", "verdict": "wrong", "plain": "right"},
        row | {"kind": "", "verdict": "error"},
    ]
    a, unnamed, everything = summary(rows)
    assert (a["wrong rewarded"], a["right refused"], a["other"], a["cases"]) == (1, 1, 0, 2)
    assert (unnamed["kind"], unnamed["other"]) == ("(no kind)", 1)
    assert (everything["cases"], everything["wrong rewarded"], everything["plain right refused"]) == (3, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cases.jsonl:1: malformed JSONL line"),
        ('{"response": "1", "reference": 1, "verdict": "right"}', "cases.jsonl:1: needs the texts response, reference"),
        ('{"response": "1", "reference": "1", "verdict": "ok"}', "cases.jsonl:1: verdict 'ok' is none of right, wrong"),
        ("[1]", "cases.jsonl:1: needs the texts"),
        ("\n", "has no cases"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "cases.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_cases(tmp_path / "cases.jsonl")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist|No such file"):
        read_cases(tmp_path / "absent.jsonl")


def test_the_shipped_set_is_large_and_has_no_twins():
    cases = read_cases(SHIPPED)
    assert len(cases) >= 300
    assert len({(c["response"], c["reference"]) for c in cases}) == len(cases)
    assert len({c["kind"] for c in cases}) >= 15
