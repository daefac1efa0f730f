"""Settings of the data: files, the three sizes of a step, packing."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field

from megarl.config.section import Place, Positive, Section


class Data(Section):
    """The problems. Columns are found by name, e.g. `problem` or `prompt`, and `answer`."""

    train: list[Place]
    """JSONL, JSON or Parquet files of problems, also compressed as .jsonl.gz or .json.gz. A folder means its Parquet
    and JSONL files, and a name with `*` every file that matches. `hf://datasets/OWNER/NAME/FILE` is read from the
    Hugging Face Hub."""
    eval: list[Place] = []
    """Held-out problems, in the same formats. Default: no evaluation."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` applies the tokenizer's chat template if it has one. `none` tokenizes the prompt as it is."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables for the chat template, e.g. `{enable_thinking: false}` for Qwen3. The template must use each of
    them."""
    template_date: date | None = None
    """The date for chat templates that write today's. Default: the day on which the run starts, also after a
    resume."""
    system_prompt: str | None = None
    """System message before every prompt. It needs a chat template. Default: the data's own, if any."""
    answers: Literal["required", "optional"] = "required"
    """Whether every row needs an answer. With `optional`, the reward function gets an empty text for a row without
    one."""
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
    tokens_per_row: Positive = 18432
    """Tokens in one packed row, and so in one micro-batch. It must fit the longest prompt with a full response. Lower
    it when training runs out of memory."""

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
