r"""Files → prompts: the hub's layouts, chat templates, the length filter, one-line errors that name file and line.

The prompt is the first of the columns `PROMPTS` that a row has, as text or as a list of chat messages. The answer is
the first of `ANSWERS`; from a worked solution only `#### n` (GSM8K) or `\boxed{…}` (MATH) is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.boxed import last_boxed
from megarl.data.files import check_exists, records
from megarl.data.table import PromptTable
from megarl.errors import UserError

PROMPTS = ("prompt", "problem", "question", "messages")
ANSWERS = ("answer", "ground_truth", "reward_model.ground_truth", "expected_answer", "final_answer", "solution")
WORKED = ("solution", "the assistant's message")  # may be a derivation rather than an answer

Message = dict[str, str]  # {"role": …, "content": …}


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What became of the rows: `read == kept + duplicates + too_long`."""

    read: int
    kept: int
    duplicates: int
    too_long: int
    longest: int  # tokens of the longest prompt kept

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.read} prompts kept, up to {self.longest} tokens "
            f"({self.duplicates} duplicates, {self.too_long} too long)"
        )


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a file, before tokenisation."""

    uid: bytes
    conversation: list[Message]
    answer: str
    file: str  # ends in the mark before the row: "a.jsonl:" or "a.parquet#"
    number: int

    @property
    def where(self) -> str:
        return f"{self.file}{self.number}"


def read_prompts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    data: config.Data,
    setting: str = "data.train",
) -> tuple[PromptTable, PromptReport]:
    """Read, de-duplicate, template, tokenise and filter prompts, in the files' order.

    `setting`: the name of `files` in errors. The uid is a hash of the prompt as the file has it and of its answer:
    another chat template does not change it.
    Raises UserError for a missing or malformed file, a row without prompt or answer, and when no prompt is left.
    """
    render = renderer(tokenizer, data)
    for file in files:
        check_exists(file, setting)
    table = PromptTable()
    seen: set[bytes] = set()
    read = too_long = longest = 0
    shortest: int | None = None
    rows = (row for file in files for row in _rows(file))
    while batch := list(islice(rows, 1024)):
        fresh: dict[bytes, _Row] = {}
        for row in batch:
            fresh.setdefault(row.uid, row)
        fresh = {uid: row for uid, row in fresh.items() if uid not in seen}
        seen.update(fresh)
        texts = [render(row.conversation, row.where) for row in fresh.values()]
        for (uid, row), text, token_ids in zip(fresh.items(), texts, tokenise(tokenizer, data, texts), strict=True):
            if not token_ids:
                raise UserError(f"{row.where}: prompt {text!r} has no tokens")
            shortest = min(len(token_ids), shortest or len(token_ids))
            if len(token_ids) > data.max_prompt_tokens:
                too_long += 1
                continue
            longest = max(longest, len(token_ids))
            table.append(uid, token_ids, text, row.answer, row.file, row.number)
        read += len(batch)
    names = ", ".join(map(str, files))
    if not read:
        raise UserError(f"{setting}: {names or '[]'} has no prompts")
    if not table:
        raise UserError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} is below all {too_long} prompts of {names}; "
            f"the shortest has {shortest} tokens"
        )
    return table, PromptReport(read, len(table), read - len(seen), too_long, longest)


def first_answers(files: Sequence[Path], count: int) -> list[str]:
    """The reference answers of the first `count` problems; nothing else is read. Raises UserError for a bad row."""
    return [row.answer for row in islice((row for file in files for row in _rows(file)), count)]


# Rendering and tokenising


def _uses_template(tokenizer: PreTrainedTokenizerBase, data: config.Data) -> bool:
    return data.chat_template == "auto" and bool(tokenizer.chat_template)


def renderer(tokenizer: PreTrainedTokenizerBase, data: config.Data) -> Callable[[list[Message], str], str]:
    """A function from a conversation, and where it was read, to the text to tokenise."""

    def templated(conversation: list[Message], where: str) -> str:
        if data.system_prompt is not None:
            own = [m for m in conversation if m["role"] != "system"]
            conversation = [{"role": "system", "content": data.system_prompt}, *own]
        try:
            return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except TemplateError as e:
            raise UserError(f"{where}: the tokenizer's chat template refuses this prompt: {e}") from None

    def plain(conversation: list[Message], where: str) -> str:
        if len(conversation) > 1:
            raise UserError(
                f"{where}: has {len(conversation)} chat messages, but "
                + ("data.chat_template is none" if tokenizer.chat_template else "the tokenizer has no chat template")
            )
        return conversation[0]["content"]

    if _uses_template(tokenizer, data):
        return templated
    if data.system_prompt is not None:
        why = "data.chat_template is none; set it to auto" if tokenizer.chat_template else "the tokenizer has none"
        raise UserError(f"data.system_prompt: needs a chat template, and {why}")
    return plain


def tokenise(tokenizer: PreTrainedTokenizerBase, data: config.Data, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # A chat template writes its own special tokens. To plain text the tokenizer adds the model's (Llama's first).
    special = not _uses_template(tokenizer, data)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    return ids


def _rows(file: Path) -> Iterator[_Row]:
    mark, numbered = records(file, columns={name.split(".")[0] for name in (*PROMPTS, *ANSWERS)})
    for number, record in numbered:
        yield _row(record, f"{file}{mark}", number)


# One row


def _row(record: Any, file: str, number: int) -> _Row:
    where = f"{file}{number}"
    messages, reply = conversation(record, where, "answer")
    candidates = {name: _field(record, name) for name in ANSWERS} | {WORKED[1]: reply}
    column = next((name for name, value in candidates.items() if value not in (None, "", [], {})), None)
    if column is None:
        raise UserError(f"{where}: prompt without answer: none of {', '.join(ANSWERS)} (has: {', '.join(record)})")
    answer = _answer(candidates[column], column)
    if not answer:
        raise UserError(f"{where}: prompt without answer: {column} has neither \\boxed{{…}} nor #### n")
    key = json.dumps([*([m["role"], m["content"]] for m in messages), answer], ensure_ascii=False)
    try:
        uid = hashlib.blake2b(key.encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        raise UserError(f"{where}: has half of a surrogate pair, which is not text") from None
    return _Row(uid, messages, answer, file, number)


def _field(record: dict[str, Any], name: str) -> Any:
    """`record[a][b]` for the name `a.b`; None where there is no such field."""
    value: Any = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def conversation(record: Any, where: str, beside: str) -> tuple[list[Message], str | None]:
    """A row's messages up to the model's turn, and the assistant's reply if the row has one.

    `beside`: what errors say that a row has beside its prompt.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}, not an object with a prompt and its {beside}")
    prompt = next((record[name] for name in PROMPTS if record.get(name)), None)
    if prompt is None:
        raise UserError(
            f"{where}: prompt missing: none of {', '.join(PROMPTS)} (has: {', '.join(record) or 'nothing'})"
        )
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], None
    try:
        messages = [{"role": str(m["role"]), "content": m["content"]} for m in prompt]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(m["content"], str) for m in messages):
        raise UserError(f"{where}: prompt is neither text nor a list of {{role, content}} messages with text content")
    reply = messages.pop()["content"] if len(messages) > 1 and messages[-1]["role"] == "assistant" else None
    return messages, reply


def _answer(value: Any, column: str) -> str | None:
    """The reference answer as the grader gets it: text as it is, numbers in decimals, anything else as JSON.

    None for a worked solution of several lines that does not mark its answer.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    if "####" in value:
        return value.rpartition("####")[2].strip().replace(",", "")  # GSM8K writes thousands as 1,000
    if (boxed := last_boxed(value)) is not None:
        return boxed
    if bare := re.findall(r"\\boxed\s+([^$\n]+)", value):
        return str(bare[-1]).strip()
    return None if column in WORKED and "\n" in value.strip() else value.strip()
