"""Settings of the data: files, the three sizes of a step, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Positive, Section


class Data(Section):
    train: list[Path]
    """JSONL, JSON or Parquet files of problems, in the hub's layouts."""
    eval: list[Path] = []
    """Held-out problems."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` applies the tokenizer's chat template when it has one; `none` tokenises the prompt as it is."""
    system_prompt: str | None = None
    """Prepended as a system message when the chat template is used."""
    max_prompt_tokens: Positive = 2048
    """Longer prompts are left out, and counted."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""


class Batch(Section):
    """The three sizes. Everything else is derived from them and printed at start."""

    prompts_per_step: Positive = 512
    """Prompts rolled out per step."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size G."""
    prompts_per_update: Positive | None = None
    """Prompts per optimizer update; default: all of the step (exactly on-policy)."""
    tokens_per_row: Positive = 16384
    """Capacity of one packed row, and so of one micro-batch, in tokens."""

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // (self.prompts_per_update or self.prompts_per_step)


class Packing(Section):
    strategy: Literal["dense", "none", "sorted", "first_fit"] = "dense"
    """`dense`: Dense Prompt Packing; `none`: one sequence a row; `sorted` and `first_fit`: decreasing length."""
    window: Positive = 256
    """Pending items that dense packing looks at."""
