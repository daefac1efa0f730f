"""Settings of the data: files, the three sizes of a step, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Positive, Section


class Data(Section):
    """The problems. Columns are found by name, e.g. `problem` or `prompt`, and `answer`."""

    train: list[Path]
    """JSONL, JSON or Parquet files of problems. `hf://datasets/OWNER/NAME/FILE` is read from the Hugging Face Hub; FILE
    may contain `*`."""
    eval: list[Path] = []
    """Held-out problems, in the same formats. Default: no evaluation."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` applies the tokenizer's chat template if it has one. `none` tokenizes the prompt as it is."""
    system_prompt: str | None = None
    """System message before every prompt. It needs a chat template. Default: the data's own, if any."""
    max_prompt_tokens: Positive = 2048
    """Prompts with more tokens are skipped and counted."""
    shuffle: bool = True
    """Shuffle every epoch, from the seed. With false, prompts come in the files' order."""


class Batch(Section):
    """The three sizes of a step and the size of a row. Everything else follows from them and is printed at start."""

    prompts_per_step: Positive = 512
    """Prompts rolled out per step."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt, the group size G."""
    prompts_per_update: Positive | None = None
    """Prompts per optimizer update; it must divide `prompts_per_step`. Default: all of them, which is exactly
    on-policy."""
    tokens_per_row: Positive = 16384
    """Tokens in one packed row, and so in one micro-batch. Lower it when training runs out of memory."""

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // (self.prompts_per_update or self.prompts_per_step)


class Packing(Section):
    """How sequences are packed into rows."""

    strategy: Literal["dense", "none", "sorted", "first_fit"] = "dense"
    """`dense` is DPPO's packing. `none` puts one sequence in a row. `sorted` and `first_fit` go by decreasing
    length."""
    window: Positive = 256
    """Sequences that dense packing chooses from. Larger windows fill rows better."""
