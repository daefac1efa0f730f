"""Chat templates and tokens: variables, dates, begun responses, templates that fail, and the tokens that result."""

from __future__ import annotations

import json
import time
from datetime import date
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from megarl.config import Data
from megarl.data import rendering
from megarl.data.prompts import first_answers, first_prompt, read_prompts
from megarl.errors import UserError
from tests.support.tiny_rollout import byte_level_tokenizer

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant] "
PLAIN += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
DATED = "{%- set form = '%d %b %Y' %}{{ strftime_now(form) }}: {{ messages[0].content }}"


def tokenizer(template: object = None, begin: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; `begin`: the tokenizer writes <|begin|> before every text, as Llama's does."""
    made = byte_level_tokenizer([])
    if begin:
        made.add_special_tokens({"bos_token": "<|begin|>"})
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", made.bos_token_id)]
        )
    made.chat_template = template
    return made


def write(folder: Path, *rows: object) -> Path:
    file = folder / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path, made: PreTrainedTokenizerFast, vocab: int | None = None, **data: object):  # type: ignore[no-untyped-def]
    return read_prompts([file], made, Data(train=[], **data), vocab=vocab)[0]  # type: ignore[arg-type]


def test_variables_reach_the_template_and_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "q", "answer": "1"})
    made = tokenizer(PLAIN)
    usual, changed = read(file, made), read(file, made, chat_template_kwargs={"enable_thinking": False})
    assert usual[0].text == "[user] q[assistant] "
    assert changed[0].text == "[user] q[assistant] <think></think>"
    assert changed[0].uid == usual[0].uid and changed.fingerprint != usual.fingerprint
    for kwargs, words in [
        ({"enable_thinkin": True}, "does not use it .did you mean 'enable_thinking'"),
        ({"tokenize": True}, "megarl sets it"),
        ({"messages": []}, "megarl sets it"),
    ]:
        with pytest.raises(UserError, match=f"data.chat_template_kwargs: .*{words}"):
            read(file, made, chat_template_kwargs=kwargs)
    with pytest.raises(UserError, match="data.chat_template_kwargs: needs a chat template"):
        read(file, tokenizer(), chat_template_kwargs={"enable_thinking": True})


def test_a_date_in_the_template_is_the_runs(tmp_path: Path) -> None:
    """Not today's, if the run has one; another date is another fingerprint."""
    file = write(tmp_path, {"prompt": "q", "answer": "1"})
    made = tokenizer(DATED)
    first = read(file, made, template_date=date(2024, 7, 26))
    assert first[0].text == "26 Jul 2024: q"
    assert read(file, made)[0].text.startswith(date.today().strftime("%d %b %Y"))
    assert first.fingerprint != read(file, made, template_date=date(2024, 7, 27)).fingerprint
    plain = read(file, tokenizer(PLAIN))
    assert plain.fingerprint == read(file, tokenizer(PLAIN), template_date=date(2024, 7, 27)).fingerprint


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now(messages[0].content) }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // (messages|length - 1) }}",
        "{{ tools[0].name | tojson }}",
        "{{ raise_exception('first line\nsecond') }}",
        "{{ messages.x.y }}",
        "{% for %}",
        "{{ ''.__class__.mro() }}",
        "{{ range(999999) | list }}",
        {"tool_use": "x", "rag": "y"},
    ],
)
def test_a_template_that_raises_anything_is_one_line(tmp_path: Path, template: object) -> None:
    file = write(tmp_path, {"prompt": "q", "answer": "1"})
    with pytest.raises(UserError, match="a.jsonl:1: the tokenizer's chat template refuses this prompt: ") as caught:
        read(file, tokenizer(template))
    assert "\n" not in str(caught.value)


def test_a_template_that_loops_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "TEMPLATE_TIMEOUT", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(UserError, match="a.jsonl:1: .* took more than 0.3 s"):
        read(write(tmp_path, {"prompt": "q", "answer": "1"}), tokenizer(loops))
    assert time.monotonic() - began < 5


def test_begin_of_text_is_written_once(tmp_path: Path) -> None:
    """By the template, by the tokenizer, or by who rendered the prompts beforehand."""
    plain = write(tmp_path, {"prompt": "q", "answer": "1"}, {"prompt": "<|begin|>[user] q", "answer": "1"})
    templated = tokenizer("{{ bos_token }}[user] {{ messages[0].content }}", begin=True)
    assert list(read(plain, templated)[0].token_ids).count(templated.bos_token_id) == 1
    for prompt in read(plain, templated, chat_template="none"):
        assert list(prompt.token_ids).count(templated.bos_token_id) == 1
        assert prompt.token_ids[0] == templated.bos_token_id


def test_a_begun_response_stays_in_the_prompt(tmp_path: Path) -> None:
    """In a `prompt` column the assistant's last message begins the response; in `messages` it is the reply."""
    begun = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Let me think. "}]
    made = tokenizer(PLAIN)
    file = write(tmp_path, {"prompt": begun, "answer": "4"})
    assert read(file, made)[0].text.rstrip() == "[user] q[assistant] Let me think."
    file = write(tmp_path, {"messages": [begun[0], {"role": "assistant", "content": r"So \boxed{4}."}]})
    assert (read(file, made)[0].text, read(file, made)[0].answer) == ("[user] q[assistant] ", "4")
    for row in ({"prompt": begun}, {"messages": begun}):
        with pytest.raises(UserError, match="a.jsonl:1: prompt without answer"):
            read(write(tmp_path, row), made)


def test_messages_stored_as_json_text_are_messages(tmp_path: Path) -> None:
    made = tokenizer(PLAIN)
    chat = json.dumps([{"role": "user", "content": "q"}])
    assert read(write(tmp_path, {"prompt": chat, "answer": "4"}), made)[0].text == "[user] q[assistant] "
    for text in ('[{"role": "user"}]', '[{"role": 1', "[1, 2]"):
        assert read(write(tmp_path, {"prompt": text, "answer": "4"}), made)[0].text == f"[user] {text}[assistant] "


def test_rows_without_an_answer_are_allowed_if_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "q"}, {"prompt": "r", "answer": "1"})
    with pytest.raises(UserError, match="a.jsonl:1: prompt without answer.*data.answers: optional"):
        read(file, tokenizer())
    assert [prompt.answer for prompt in read(file, tokenizer(), answers="optional")] == ["", "1"]
    assert first_answers([file], 3, Data(train=[], answers="optional")) == ["", "1"]


def test_a_token_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    """The row, the token and the vocabulary; one embedding more is enough."""
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<new>"]})
    new = made.convert_tokens_to_ids("<new>")
    file = write(tmp_path, {"prompt": "q", "answer": "1"}, {"prompt": "q <new>", "answer": "1"})
    assert len(read(file, made, vocab=new + 1)) == 2
    with pytest.raises(UserError, match=rf"a.jsonl:2: token {new} \('<new>'\) .* vocabulary of {new} .*vocab_size"):
        read(file, made, vocab=new)


def test_a_prompt_of_20_mb_is_counted_at_once(tmp_path: Path) -> None:
    """Its characters tell that it is too long; a tokenizer would need a minute."""
    file = write(tmp_path, {"prompt": "q", "answer": "1"}, {"prompt": "x " * 10_000_000, "answer": "1"})
    began = time.monotonic()
    table, report = read_prompts([file], tokenizer(PLAIN), Data(train=[]))
    assert (len(table), report.too_long) == (1, 1)
    assert time.monotonic() - began < 20


def test_prompts_of_both_sets_are_counted(tmp_path: Path) -> None:
    """Without regard to spaces and capitals, whatever their answers."""
    made = tokenizer()
    train = read(write(tmp_path, *({"prompt": f"What is {i}?", "answer": i} for i in range(5))), made)
    held_out = read(write(tmp_path, *({"prompt": f"what  is {i}?\n", "answer": 9} for i in range(3, 8))), made)
    assert held_out.shared_with(train) == train.shared_with(held_out) == 2


def test_the_first_prompt_is_as_in_the_table(tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "q", "answer": "1"}, {"prompt": "r", "answer": "2"})
    made = tokenizer(PLAIN)
    assert first_prompt([file], made, Data(train=[])) == read(file, made)[0]
