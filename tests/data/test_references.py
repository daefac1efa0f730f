r"""A row's reference answer: what the file says, to the last sign, or one line that names file and row."""

import datetime
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megarl.data.files import records
from megarl.data.references import reference
from megarl.errors import UserError


def of(answer, column="answer", where="a.jsonl:7"):
    return reference({"prompt": "p", column: answer}, None, where)[0]


def of_json(tmp_path, text):
    """As a JSONL file gives it: numbers come through the reader of files."""
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "p", "answer": {text}}}\n')
    _, rows = records(file, ())
    number, record = next(rows)
    return reference(record, None, f"a.jsonl:{number}")[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 2.\n#### 3,000", "3000"),
        ("#### 1,234,567.50", "1234567.50"),
        ("#### -1,500", "-1500"),
        ("#### $12,000", "$12000"),
        ("#### 1, 2, 3", "1, 2, 3"),
        ("#### (1,2)", "(1,2)"),
        ("#### (1,200)", "(1,200)"),
        ("#### [0,500)", "[0,500)"),
        ("#### 1,2", "1,2"),
        ("#### 12,34", "12,34"),
        ("#### 1,000, 2,000", "1000, 2000"),
        ("work #### 5", "5"),
        ("work\n#### 5\n\n", "5"),
    ],
)
def test_the_last_line_of_gsm8k(text, answer):
    """Commas join digits only within one number, and never within brackets."""
    assert of(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 1\nHalve.\n#### Step 2\nSo $\\boxed{7}$.\n#### Remarks\nNice, isn't it?", "7"),
        ("So $\\boxed{7}$.\n#### Remarks", "7"),
        ("The roots are $x=\\boxed{2}$ and $x=\\boxed{3}$.", "2, 3"),
        ("First \\boxed{2}. The other is, after long work, \\boxed{3}", "2, 3"),
        ("\\boxed{4}, as we said: \\boxed{4}", "4"),
        ("$\\boxed{\\boxed{8}}$", "8"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("We get\n$\\boxed 7$ and done.", "7"),
    ],
)
def test_boxes_of_a_solution(text, answer):
    """Headings are not GSM8K's marker, and several boxes are several answers."""
    assert of(text, "solution") == answer


@pytest.mark.parametrize(
    "text", ["so\nit goes", "#### Step 1\nHalve.\n#### Step 2\nDone.", "work\n#### ", "\\boxed{}\nx"]
)
def test_a_solution_without_its_answer_has_none(text):
    answer, why = reference({"solution": text}, None, "a.jsonl:7")
    assert answer == ""
    assert why == r"solution has neither \boxed{…} nor #### n"


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (["3", "5"], "3, 5"),
        ([3, 5], "3, 5"),
        (["7"], "7"),
        ([7.5], "7.5"),
        ([["7"]], "7"),
        (["(1,2)", "x^2"], "(1,2), x^2"),
        (0, "0"),
        (True, "true"),
        (72.0, "72.0"),
        (decimal.Decimal("3.50"), "3.50"),
        (datetime.date(2024, 2, 3), "2024-02-03"),
        (10**400, str(10**400)),
        ({"b": 1, "a": [1, 2]}, '{"a": [1, 2], "b": 1}'),
        ([{"a": 1}, {"a": 2}], '[{"a": 1}, {"a": 2}]'),
        (" 5 ", "5"),
        ("Infinity", "Infinity"),
        ("None of these", "None of these"),
    ],
)
def test_values_are_kept(value, answer):
    assert of(value) == answer


@pytest.mark.parametrize(
    "text", ["0.10", "72.0", "1e400", "0.1000000000000000055511151231257827", "-0.0", "2E5", "9" * 300, "[0.10, 2e3]"]
)
def test_numbers_of_json_keep_their_digits(tmp_path, text):
    """A double has 17 digits and ends at 1.8e308; the text has them all."""
    assert of_json(tmp_path, text) == text.strip("[]")


@pytest.mark.parametrize(
    "text", ["NaN", "null", "[null]", "[NaN]", '"nan"', '"None"', '" NULL "', '""', '"  "', "[]", '["None"]', "{}"]
)
def test_no_answer_in_disguise(tmp_path, text):
    """It is none, so another column may have one; and where none has, that is said with what was found."""
    assert of_json(tmp_path, text) == ""
    record = {"answer": json.loads(text), "solution": "so \\boxed{3}"}
    assert reference(record, None, "a.jsonl:1") == ("3", reference(record, None, "")[1])


def test_what_was_found_instead_of_an_answer():
    assert reference({"answer": float("nan")}, None, "") == ("", "answer is nan")
    assert reference({"answer": "None", "solution": ""}, None, "") == ("", "answer is 'None'")
    assert reference({"answer": None}, None, "")[1].startswith("none of answer, ground_truth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Infinity", "answer: inf is not a finite number"),
        ("-Infinity", "answer: -inf is not a finite number"),
        ("[3, null]", "answer: has a hole: [3, None]"),
        ("7" * 5000, "answer: an integer of more than 4000 digits"),
        ('{"target": NaN}', "answer: nan is not a finite number"),
        ('{"target": [1, Infinity]}', "answer: inf is not a finite number"),
        ('{"target": 0.1000000000000000055511151231257827}', "has more digits than a double"),
        ('{"target": %s}' % ("7" * 5000), "answer: an integer of more than 4000 digits"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_row(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        of_json(tmp_path, text)
    assert str(error.value).startswith("a.jsonl:1: ") and message in str(error.value) and "\n" not in str(error.value)


def test_long_digits_in_a_column_that_nobody_reads(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "p", "answer": 1, "hash": %s}\n' % ("7" * 5000))
    _, rows = records(file, ())
    assert reference(next(rows)[1], None, "")[0] == "1"


def test_parquet_types(tmp_path):
    """What pandas makes of an integer column with a hole, and types that JSON does not have."""
    file = tmp_path / "a.parquet"
    values = {
        "floats": pa.array([72.0, float("nan"), None]),
        "decimals": pa.array([decimal.Decimal("1.50")] * 3),
        "bytes": pa.array([b"7"] * 3),
        "lists": pa.array([[1, 2], [], None]),
    }
    found = {}
    for name, column in values.items():
        pq.write_table(pa.table({"answer": column}), file)
        _, rows = records(file, ("answer",))
        if name == "bytes":
            with pytest.raises(UserError, match="row: answer: a bytes is neither text"):
                reference(next(rows)[1], None, "row")
            continue
        found[name] = [reference(record, None, "")[0] for _, record in rows]
    assert found == {"floats": ["72.0", "", ""], "decimals": ["1.50"] * 3, "lists": ["1, 2", "", ""]}


def test_an_assistants_message_is_no_answer_unless_it_marks_one():
    assert reference({}, "so\n\\boxed{9}", "") == ("9", reference({}, "x", "")[1])
    assert reference({}, "Hello there", "")[0] == ""
