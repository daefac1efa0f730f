"""Reading prompts: the hub's layouts, templates, counts, and one-line errors that say where."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl.config import Data
from megarl.data.prompts import read_prompts
from megarl.errors import UserError

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; every word is known by its length alone."""
    core = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def settings(**changes) -> Data:
    return Data(train=[], **changes)


def write(path: Path, records: list) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 2 + 2 ?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"index": "9a9b6eb4"},
}
LAYOUTS = [  # (as the hub has it, prompt, answer)
    (DAPO, "What is 2 + 2 ?", "4"),
    ({"question": "How many ?", "answer": "She has 1,000 * 2 = <<2>>.\n#### 2,000"}, "How many ?", "2000"),
    (
        {"problem": "Solve it", "level": "5", "solution": r"Long.\nSo \boxed{1} or\n$\boxed{\frac{\{1\}}{2}}$."},
        "Solve it",
        r"1, \frac{\{1\}}{2}",
    ),
    ({"problem": "Old style", "solution": "We get\n$\\boxed 7$ and done."}, "Old style", "7"),
    ({"problem": "p", "solution": "work\n\\boxed{6}", "answer": "5"}, "p", "5"),
    ({"prompt": "int", "answer": 0}, "int", "0"),
    ({"prompt": None, "problem": "olympiad", "final_answer": ["3"]}, "olympiad", "3"),
    ({"prompt": "countdown", "ground_truth": {"target": 7, "numbers": [1, 2]}}, "countdown", None),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so\n\\boxed{9}"}]},
        "hi",
        "9",
    ),
    ({"prompt": "custom", "answer": "5 2 9 -> 11"}, "custom", "5 2 9 -> 11"),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_layouts(tmp_path, tokenizer, kind, layout):
    """Every layout of the hub, in every kind of file, gives the same prompt and answer."""
    record, prompt, answer = LAYOUTS[layout]
    table, report = read_prompts([write(tmp_path / f"a.{kind}", [record])], tokenizer, settings())
    assert len(table) == report.kept == 1
    assert table[0].text == prompt
    assert table[0].token_ids == (0,) * len(prompt.split())
    if answer is None:
        assert json.loads(table[0].answer) == {"target": 7, "numbers": [1, 2]}
    else:
        assert table[0].answer == answer


def test_table_gives_back_what_was_read(tmp_path, tokenizer):
    """Rows of several files and lengths, text beyond ASCII: nothing leaks from one row of the columns into the next."""
    a = write(tmp_path / "a.jsonl", [{"prompt": f"é {'x ' * i}", "answer": f"{i}°"} for i in range(5)])
    b = write(tmp_path / "b.parquet", [{"prompt": f"b {i}", "answer": i} for i in range(5)])
    table, _ = read_prompts([a, b], tokenizer, settings())
    assert [p.text.split()[0] for p in table] == ["é"] * 5 + ["b"] * 5
    assert [len(p.token_ids) for p in table] == [1, 2, 3, 4, 5] + [2] * 5
    assert [p.answer for p in table] == [f"{i}°" for i in range(5)] + [str(i) for i in range(5)]
    assert [p.source for p in table] == [f"{a}:{i + 1}" for i in range(5)] + [f"{b}#{i}" for i in range(5)]
    assert [table.uid(i) for i in range(10)] == [p.uid for p in table]
    assert table[-1] == table[9]


def test_json_file_of_lines(tmp_path, tokenizer):
    """A `.json` that holds one object a line, as on the hub, is read as such."""
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a", "answer": 1}\n\n{"prompt": "b", "answer": 2}\n')
    table, _ = read_prompts([path], tokenizer, settings())
    assert [p.source for p in table] == [f"{path}:1", f"{path}:3"]


def test_uid_is_of_prompt_and_answer(tmp_path, chat):
    """The uid ignores file, place, layout and chat template; it tells prompts and answers apart."""
    plain, _ = read_prompts(
        [write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}])], chat, settings(chat_template="none")
    )
    messages = [{"role": "user", "content": "a"}]
    moved = [{"question": "z", "answer": "1"}, {"prompt": "a", "answer": "2"}, {"messages": messages, "answer": 1}]
    templated, _ = read_prompts([write(tmp_path / "b.parquet", moved[2:])], chat, settings())
    others, _ = read_prompts([write(tmp_path / "c.jsonl", moved[:2])], chat, settings())
    assert plain[0].text != templated[0].text
    assert plain[0].uid == templated[0].uid
    assert len({plain[0].uid, others[0].uid, others[1].uid}) == 3


def test_duplicates_and_length_filter_are_counted(tmp_path, tokenizer):
    """read = kept + duplicates + too long, across batches and files; the first of the duplicates is the one kept."""
    rows = [{"prompt": "w " * (1 + i % 7), "answer": i % 7} for i in range(1500)]
    a, b = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    table, report = read_prompts([a, b], tokenizer, settings(max_prompt_tokens=5))
    assert (report.read, report.kept, report.duplicates, report.too_long) == (3000, 5, 2993, 2)
    assert report.longest == 5
    assert [p.source for p in table] == [f"{a}:{i}" for i in range(1, 6)]


def test_chat_template(tmp_path, chat):
    """A template is applied, generation prompt included; `system_prompt` replaces the own one; `none` switches off."""
    rows = [
        {"prompt": "q", "answer": "1"},
        {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "r"}], "answer": "1"},
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def texts(**changes) -> list[str]:
        return [p.text for p in read_prompts([path], chat, settings(**changes))[0]]

    assert texts() == ["<user> q <assistant>", "<system> S <user> r <assistant>"]
    assert texts(system_prompt="T") == ["<system> T <user> q <assistant>", "<system> T <user> r <assistant>"]
    with pytest.raises(UserError, match=r"a.jsonl:2: has 2 chat messages, but data.chat_template is none"):
        texts(chat_template="none")


def test_fingerprint(tmp_path, tokenizer):
    """The fingerprint changes with the prompts and with their order."""
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]

    def fingerprint(records: list) -> str:
        return read_prompts([write(tmp_path / "a.jsonl", records)], tokenizer, settings())[0].fingerprint

    assert fingerprint(rows) == fingerprint(rows)
    assert len({fingerprint(rows), fingerprint(rows[::-1]), fingerprint(rows[:1])}) == 3


BAD = [
    (b'{"prompt": "a", "answer": 1}\n{"prompt": "b", \n', "a.jsonl:2: malformed JSONL line: "),
    (b'{"prompt": "\xff"}\n', "a.jsonl:1: malformed JSONL line: byte 13 is not UTF-8"),
    (b"[" * 100_000 + b"\n", "a.jsonl:1: malformed JSONL line: nested too deeply"),
    (b'{"prompt": "a \\ud800", "answer": 1}\n', "a.jsonl:1: has half of a surrogate pair"),
    (b"[1, 2]\n", "a.jsonl:1: is a list, not an object"),
    (b'{"prompt": "a"}\n', "a.jsonl:1: prompt without answer: none of answer, "),
    (b'{"prompt": "a", "answer": ""}\n', "a.jsonl:1: prompt without answer: none of answer, "),
    (b'{"prompt": "a", "answer": "work\\n#### "}\n', "a.jsonl:1: prompt without answer: answer has neither"),
    (b'{"prompt": "a", "solution": "so\\nit goes"}\n', "a.jsonl:1: prompt without answer: solution has neither"),
    (b'{"text": "a", "answer": 1}\n', r"a.jsonl:1: prompt missing: none of .* \(has: text, answer\)"),
    (b'{"prompt": [{"content": "a"}], "answer": 1}\n', "a.jsonl:1: prompt is neither text nor a list"),
    (b'{"prompt": 7, "answer": 1}\n', "a.jsonl:1: prompt is neither text nor a list"),
    (b'{"prompt": " ", "answer": 1}\n', "a.jsonl:1: prompt ' ' has no tokens"),
    (b"\n", "data.train: .*a.jsonl has no prompts"),
    (
        b'{"prompt": "a b c d e f", "answer": 1}\n{"prompt": "a b c d e", "answer": 1}\n',
        "data.max_prompt_tokens: 4 is below all 2 prompts of .*a.jsonl; the shortest has 5 tokens",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_file(tmp_path, tokenizer, content, message):
    """Each mistake in a file is one line that names the file, the line and what is wrong."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts([path], tokenizer, settings(max_prompt_tokens=4))
    assert "\n" not in str(error.value)


def test_bad_setting(tmp_path, tokenizer, chat):
    """Mistakes in the settings name the setting and the nearest thing that would do."""
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "train.csv").write_text("")
    (tmp_path / "x.parquet").write_text("PAR1")
    with pytest.raises(UserError, match=r"data.eval: .*tarin.jsonl does not exist \(did you mean 'train.jsonl'\?\)"):
        read_prompts([tmp_path / "tarin.jsonl"], tokenizer, settings(), setting="data.eval")
    with pytest.raises(UserError, match=r"train.csv: unknown kind of file; known: .jsonl, .json, .parquet"):
        read_prompts([tmp_path / "train.csv"], tokenizer, settings())
    with pytest.raises(UserError, match=r"x.parquet: not a readable Parquet file"):
        read_prompts([tmp_path / "x.parquet"], tokenizer, settings())
    with pytest.raises(UserError, match=r"data.system_prompt: needs a chat template, and data.chat_template is none"):
        read_prompts([], chat, settings(chat_template="none", system_prompt="S"))
    chat.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"a.jsonl:1: the tokenizer's chat template refuses .* no system role"):
        read_prompts([write(tmp_path / "a.jsonl", [DAPO])], chat, settings())
