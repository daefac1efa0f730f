r"""Files → prompts: the hub's layouts, the length filter, one-line errors that name file and line.

The prompt is the first of the columns `PROMPTS` that a row has, as text or as a list of chat messages. references.py
reads the answer. The assistant's last message is the reply in a `messages` column; in the others it begins the response
and stays in the prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.data.files import columns_of, expand, records
from megarl.data.references import ANSWERS, reference
from megarl.data.rendering import Message, Renderer
from megarl.data.table import PromptTable
from megarl.errors import UserError
from megarl.types import Prompt

PROMPTS = ("prompt", "problem", "question", "messages")


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

    @property
    def texts(self) -> list[str]:
        return [message["content"] for message in self.conversation]


def read_prompts(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    data: config.Data,
    setting: str = "data.train",
    vocab: int | None = None,
) -> tuple[PromptTable, PromptReport]:
    """Read, de-duplicate, template, tokenise and filter prompts, in the files' order.

    `setting`: the name of `files` in errors. `vocab`: the model's vocabulary, which must have every token. The uid is a
    hash of the prompt as the file has it and of its answer: another chat template does not change it.
    Raises UserError for a missing or malformed file, a row without prompt or answer, and when no prompt is left.
    """
    render = Renderer(tokenizer, data)
    table = PromptTable(render.identity)
    seen: set[bytes] = set()
    read = too_long = longest = 0
    shortest: int | None = None
    needed = data.answers == "required"
    rows = (row for file in expand(files, setting) for row in _rows(file, needed))
    while batch := list(islice(rows, 1024)):
        fresh: dict[bytes, _Row] = {}
        for row in batch:
            fresh.setdefault(row.uid, row)
        fresh = {uid: row for uid, row in fresh.items() if uid not in seen}
        seen.update(fresh)
        read += len(batch)
        beyond = {uid for uid, row in fresh.items() if render.is_beyond(row.texts, data.max_prompt_tokens)}
        too_long += len(beyond)
        fresh = {uid: row for uid, row in fresh.items() if uid not in beyond}
        texts = [render(row.conversation, row.where) for row in fresh.values()]
        for (uid, row), text, token_ids in zip(fresh.items(), texts, render.tokenise(texts), strict=True):
            if not token_ids:
                raise UserError(f"{row.where}: prompt {text!r} has no tokens")
            shortest = min(len(token_ids), shortest or len(token_ids))
            if len(token_ids) > data.max_prompt_tokens:
                too_long += 1
                continue
            check_vocabulary(token_ids, vocab, tokenizer, row.where)
            longest = max(longest, len(token_ids))
            table.append(uid, token_ids, text, row.answer, row.file, row.number)
    names = ", ".join(map(str, files))
    if not read:
        raise UserError(f"{setting}: {names or '[]'} has no prompts")
    if not table:
        raise UserError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} is below all {too_long} prompts of {names}"
            + (f"; the shortest has {shortest} tokens" if shortest else "")
        )
    return table, PromptReport(read, len(table), read - len(seen), too_long, longest)


def first_prompt(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, data: config.Data) -> Prompt:
    """The first problem as the model gets it, unless it is absurdly long; nothing else is read. Raises UserError."""
    render = Renderer(tokenizer, data)
    for row in (row for file in files for row in _rows(file, data.answers == "required")):
        if render.is_beyond(row.texts, data.max_prompt_tokens):
            continue
        text = render(row.conversation, row.where)
        return Prompt(row.uid.hex(), tuple(render.tokenise([text])[0]), text, row.answer, row.where)
    raise UserError(f"data.train: {', '.join(map(str, files))} has no prompts")


def first_answers(files: Sequence[Path], count: int, data: config.Data) -> list[str]:
    """The reference answers of the first `count` problems; nothing else is read. Raises UserError for a bad row."""
    rows = (row for file in expand(files, "data.train") for row in _rows(file, data.answers == "required"))
    return [row.answer for row in islice(rows, count)]


def check_vocabulary(
    token_ids: Sequence[int], vocab: int | None, tokenizer: PreTrainedTokenizerBase, where: str
) -> None:
    """Raise UserError for a token that a model with `vocab` embeddings does not have."""
    if vocab is not None and (highest := max(token_ids)) >= vocab:
        text = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"{where}: token {highest} ({text!r}) is beyond the model's vocabulary of {vocab} (config.json: "
            "vocab_size): the tokenizer is another model's, or the embedding was not resized for added tokens"
        )


def _rows(file: Path, needed: bool) -> Iterator[_Row]:
    mark, numbered = records(file, columns={name.split(".")[0] for name in (*PROMPTS, *ANSWERS)})
    for number, record in numbered:
        yield _row(record, f"{file}{mark}", number, needed)


# One row


def _row(record: Any, file: str, number: int, needed: bool) -> _Row:
    """`needed`: whether a row must have an answer."""
    where = f"{file}{number}"
    messages, reply = conversation(record, where, "answer")
    answer, why_none = reference(record, reply, where)
    if needed and not answer:
        raise UserError(
            f"{where}: prompt without answer: {why_none} (has: {columns_of(record)}); if the reward function needs "
            "none, set data.answers: optional"
        )
    key = json.dumps([*([m["role"], m["content"]] for m in messages), answer], ensure_ascii=False)
    try:
        uid = hashlib.blake2b(key.encode(), digest_size=16).digest()
    except UnicodeEncodeError:
        raise UserError(f"{where}: has half of a surrogate pair, which is not text") from None
    return _Row(uid, messages, answer, file, number)


def conversation(record: Any, where: str, beside: str) -> tuple[list[Message], str | None]:
    """A row's messages up to the model's turn, and the assistant's reply if the row has one.

    `beside`: what errors say that a row has beside its prompt.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}, not an object with a prompt and its {beside}")
    column = next((name for name in PROMPTS if record.get(name)), None)
    if column is None:
        raise UserError(f"{where}: prompt missing: none of {', '.join(PROMPTS)} (has: {columns_of(record)})")
    prompt = record[column]
    if isinstance(prompt, str):
        prompt = _messages_in(prompt) or [{"role": "user", "content": prompt}]
    try:
        messages = [{"role": str(m["role"]), "content": m["content"]} for m in prompt]
    except (TypeError, KeyError):
        messages = []
    if not messages or not all(isinstance(m["content"], str) for m in messages):
        raise UserError(f"{where}: prompt is neither text nor a list of {{role, content}} messages with text content")
    is_reply = column == "messages" and len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages, messages.pop()["content"] if is_reply else None


def _messages_in(text: str) -> list[Any] | None:
    """Chat messages that a table stores as JSON text; None for any other text."""
    if not re.match(r'\s*\[\s*\{\s*"(role|content)"', text):
        return None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
        return found if all(isinstance(m, dict) and m.keys() >= {"role", "content"} for m in found) else None
    return None
