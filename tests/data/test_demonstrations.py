"""Files of demonstrations. Proves which rows are read, where the response begins and what is refused, with the
quick start's tokenizer; chat templates are those of test_prompts.py, through the same function."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megarl.config import Data
from megarl.data.demonstrations import read_demonstrations
from megarl.errors import UserError

TOKENIZER = AutoTokenizer.from_pretrained("examples/quickstart/reasoner")


def read(file: Path, longest: int = 100):  # type: ignore[no-untyped-def]
    return read_demonstrations([file], TOKENIZER, Data(train=[file]), longest)


def write(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_demonstration_is_prompt_response_and_end_of_text(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "5 2 -> 7 <think>", "response": "5 + 2 = 7 yes"},
        {"messages": [{"role": "user", "content": "5 2"}, {"role": "assistant", "content": "no"}]},
    )
    (first, second), too_long = read(file)
    assert too_long == 0
    assert TOKENIZER.decode(first.token_ids) == " 5 2 -> 7 <think> 5 + 2 = 7 yes<eos>"
    assert TOKENIZER.decode(first.token_ids[first.response_start :]) == " 5 + 2 = 7 yes<eos>"
    assert TOKENIZER.decode(second.token_ids[second.response_start :]) == " no<eos>"
    assert first.token_ids.dtype == second.token_ids.dtype == "int32"


def test_the_chat_template_renders_the_prompt(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/quickstart/reasoner")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} -> {% endfor %}<think>"
    file = write(tmp_path / "a.jsonl", {"prompt": "5 2", "response": "no"})
    ((row,), _) = read_demonstrations([file], tokenizer, Data(train=[file]), 100)
    assert tokenizer.decode(row.token_ids) == " 5 2 -> <think> no<eos>"


def test_long_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "5", "response": " 5" * n} for n in (1, 8, 9)]  # 3, 10 and 11 tokens
    kept, too_long = read(write(tmp_path / "a.jsonl", *rows), longest=10)
    assert [len(row.token_ids) for row in kept] == [3, 10]
    assert too_long == 1


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"response": "no"}, r"a.jsonl:1: prompt missing: none of prompt, problem, .* \(has: response\)"),
        ({"prompt": "5"}, r"a.jsonl:1: response missing: no text in response, completion, output"),
        ({"prompt": "5", "response": 7}, r"a.jsonl:1: response missing"),
        ({"messages": [{"role": "user", "content": "5"}]}, r"a.jsonl:1: response missing"),
        (["5", "no"], r"a.jsonl:1: is a list"),
        ({"prompt": "5", "response": "5 5"}, r"batch.tokens_per_row: 3 is below all 1 rows of .*; the shortest has 4"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read(write(tmp_path / "a.jsonl", row), longest=3)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train: .*a.jsonl has no demonstrations"):
        read(write(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match="data.train: .*b.jsonl does not exist .did you mean 'a.jsonl'"):
        read(tmp_path / "b.jsonl")


def test_a_completion_may_be_a_list_of_one_message(tmp_path: Path) -> None:
    """TRL's conversational rows."""
    prompt, completion = [{"role": "user", "content": "5 2"}], [{"role": "assistant", "content": "no"}]
    ((row,), _) = read(write(tmp_path / "a.jsonl", {"prompt": prompt, "completion": completion}))
    assert TOKENIZER.decode(row.token_ids[row.response_start :]) == " no<eos>"


def test_a_token_beyond_the_vocabulary_and_an_endless_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "5 2", "response": "no"}, {"prompt": "5", "response": "5 " * 10**7})
    kept, too_long = read(file)
    assert (len(kept), too_long) == (1, 1)
    with pytest.raises(UserError, match="a.jsonl:1: token .* is beyond the model's vocabulary of 3 "):
        read_demonstrations([file], TOKENIZER, Data(train=[file]), 100, vocab=3)
