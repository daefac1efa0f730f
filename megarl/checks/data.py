"""The data as the run would read them, against the model's vocabulary and positions and the capacity of a row."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megarl.checks import Mistakes
from megarl.config import Settings
from megarl.data.demonstrations import read_demonstrations
from megarl.data.prompts import PromptReport, read_prompts
from megarl.data.table import PromptTable
from megarl.errors import UserError
from megarl.models.shape import ModelShape
from megarl.models.tokenizer import load_tokenizer
from megarl.view.prompt import text_of, tokens_of


def prompts(settings: Settings, shape: ModelShape, names: Sequence[str] = ("train", "eval")) -> dict[str, str]:
    """Read all prompts and describe them in words, with the first as the model gets it.

    `names`: the settings of `data` to read. Raises UserError for the first malformed row, a token that the model does
    not have, and a length that fits neither the model nor a row.
    """
    tokenizer, found, tables = load_tokenizer(settings.model.path), dict[str, str](), dict[str, PromptTable]()
    mistakes = Mistakes()
    for name in names:
        files = getattr(settings.data, name)
        if not files and name == "eval":
            continue
        tables[name], report = read_prompts(files, tokenizer, settings.data, f"data.{name}", shape.vocab)
        found[f"data.{name}"] = str(report)
        with mistakes:
            _check_positions(settings, shape, name, report)
        if name == "train":
            with mistakes:
                _check_row(settings, report)
    mistakes.answer()
    if len(tables) == 2 and (shared := tables["eval"].shared_with(tables["train"])):
        found["data.eval"] += f"; {shared} of them are also training prompts"
    for table in list(tables.values())[:1]:
        found |= _example(table[0].text, table[0].token_ids, tokenizer)
    return found


def demonstrations(settings: Settings, shape: ModelShape) -> dict[str, str]:
    """As `prompts`, for supervised fine-tuning."""
    tokenizer = load_tokenizer(settings.model.path)
    longest = settings.batch.tokens_per_row + 1  # a sequence's last token is no input
    kept, too_long = read_demonstrations(settings.data.train, tokenizer, settings.data, longest, shape.vocab)
    most = max(len(each.token_ids) for each in kept)
    if most - 1 > shape.max_positions:
        raise UserError(
            f"data.train: a demonstration has {most} tokens, and the model {shape.max_positions} positions "
            f"(config.json: max_position_embeddings); set batch.tokens_per_row: {shape.max_positions} to leave it out"
        )
    counted = f"{len(kept)} demonstrations, up to {most} tokens ({too_long} too long)"
    ids = kept[0].token_ids.tolist()
    return {"data.train": counted} | _example(str(tokenizer.decode(ids)), ids, tokenizer)


def _check_row(settings: Settings, report: PromptReport) -> None:
    """A row must take the longest prompt with a full response: a sequence's last token is no input."""
    row, budget = settings.batch.tokens_per_row, settings.rollout.max_response_tokens
    if report.longest + budget - 1 > row:
        shorter = row + 1 - report.longest
        other = f", or rollout.max_response_tokens to at most {shorter}" if shorter > 0 else ""
        raise UserError(
            f"batch.tokens_per_row: {row} cannot take the longest prompt of {report.longest} tokens with a full "
            f"response of {budget}; set it to at least {report.longest + budget - 1}{other}"
        )


def _check_positions(settings: Settings, shape: ModelShape, name: str, report: PromptReport) -> None:
    setting, budget = "rollout.max_response_tokens", settings.rollout.max_response_tokens
    if name == "eval" and settings.evaluation.max_response_tokens:
        setting, budget = "evaluation.max_response_tokens", settings.evaluation.max_response_tokens
    if report.longest + budget > shape.max_positions:
        raise UserError(
            f"{setting}: {budget} after the longest prompt of {report.longest} tokens in data.{name} exceeds the "
            f"model's {shape.max_positions} positions (config.json: max_position_embeddings); "
            + (
                f"set at most {shape.max_positions - report.longest}"
                if report.longest < shape.max_positions
                else f"set data.max_prompt_tokens below {shape.max_positions}"
            )
        )


def _example(text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    found = {"first prompt": text_of(text), "its tokens": tokens_of(token_ids, tokenizer)}
    begin = tokenizer.bos_token_id
    if begin is not None and list(token_ids[:2]) == [begin, begin]:
        found["WARNING"] = f"the prompt begins twice with {tokenizer.bos_token}; look at the chat template"
    return found
