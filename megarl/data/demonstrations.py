"""Files → demonstrations for supervised fine-tuning: a prompt and the response to imitate, tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.data.files import columns_of, expand, records
from megarl.data.prompts import PROMPTS, check_vocabulary, conversation
from megarl.data.rendering import Renderer
from megarl.errors import UserError

RESPONSES = ("response", "completion", "output")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One sequence to imitate: `token_ids[response_start:]`, the end-of-text token included."""

    token_ids: np.ndarray  # int32 [prompt + response]
    response_start: int


def read_demonstrations(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    data: config.Data,
    longest: int,
    vocab: int | None = None,
) -> tuple[list[Demonstration], int]:
    """The demonstrations of `files` in their order, and how many were dropped for having over `longest` tokens.

    A row has a prompt (text, or chat messages for the tokenizer's template) and its response: a column of `RESPONSES`,
    or the last of its `messages` if it is the assistant's. The response gets the end-of-text token. `vocab`: the
    model's vocabulary, which must have every token.
    Raises UserError for a missing or malformed file, a row without prompt or response, and when nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no end-of-text token to teach")
    render = Renderer(tokenizer, data)
    kept: list[Demonstration] = []
    too_long = 0
    shortest: int | None = None
    for file in expand(files, "data.train"):
        mark, numbered = records(file, (*PROMPTS, *RESPONSES))
        while batch := list(islice(numbered, 1024)):
            rows = [_row(record, f"{file}{mark}{number}") for number, record in batch]
            short = [row for row in rows if not render.is_beyond([m["content"] for m in row[0]] + [row[1]], longest)]
            too_long += len(rows) - len(short)
            if not short:
                continue
            prompts = render.tokenise([render(messages, where) for messages, _, where in short])
            responses = tokenizer([reply for _, reply, _ in short], add_special_tokens=False)["input_ids"]
            for (_, _, where), prompt, response in zip(short, prompts, responses, strict=True):
                token_ids = np.array([*prompt, *response, tokenizer.eos_token_id], np.int32)
                check_vocabulary(token_ids.tolist(), vocab, tokenizer, where)
                shortest = min(len(token_ids), shortest or len(token_ids))
                if len(token_ids) <= longest:
                    kept.append(Demonstration(token_ids, len(prompt)))
                else:
                    too_long += 1
    if kept:
        return kept, too_long
    names = ", ".join(map(str, files))
    if too_long:
        raise UserError(
            f"batch.tokens_per_row: {longest} is below all {too_long} rows of {names}"
            + (f"; the shortest has {shortest}" if shortest else "")
        )
    raise UserError(f"data.train: {names or '[]'} has no demonstrations")


def _row(record: Any, where: str) -> tuple[list[dict[str, str]], str, str]:
    """The conversation up to the response, the response, and where they were read."""
    messages, reply = conversation(record, where, "response")
    response = next((record[name] for name in RESPONSES if record.get(name)), reply)
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):  # [{role, content}]
        response = response[0].get("content")
    if not isinstance(response, str):
        raise UserError(
            f"{where}: response missing: no text in {', '.join(RESPONSES)}, and the last message is no assistant's "
            f"(has: {columns_of(record)})"
        )
    return messages, response, where
