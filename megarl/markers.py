"""`megarl markers`: which step markers, thought and recipe of Step-GRPO fit a model, and the lines for its settings."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from megarl import config
from megarl.algorithms.steps import count_steps
from megarl.config.reading import recipe
from megarl.data.files import expand, records
from megarl.data.prompts import read_prompts
from megarl.data.rendering import Renderer
from megarl.errors import UserError
from megarl.models import hub
from megarl.models.files.hf import HfWeights
from megarl.models.files.tensor_io import loaded
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout.detokenize import Vocabulary, vocabulary_of
from megarl.rollout.engine import Generation, Sampling
from megarl.rollout.local.engine import LocalEngine
from megarl.runtime import device
from megarl.types import Prompt
from megarl.view.table import show_rows

REFLECTIONS = ("Wait", "But wait", "Alternatively", "Hmm", "Actually", "However", "Hold on", "Let me check")
"""They look back at what was found, so a probe before them may have an answer."""
CONNECTIVES = ("But", "So", "Let me", "Now", "Then", "First", "Next", "Step", "Okay", "Maybe", "Therefore")
"""They begin steps too, but seldom follow an answer."""
COMMON = 0.1  # share of the responses that must use a marker
CLOSED = 0.5  # share of the finished responses that must close their thought
COLUMNS = ("response", "completion", "output", "text", "messages")  # where a row may have its response


class Response(NamedTuple):
    """`finished`: the model ended it. A response that was cut short might have closed its thought later."""

    text: str
    finished: bool = True


class Template:
    """What a chat template makes of a thought. `prompt` is a problem as the model gets it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
        template, self.prompt = str(tokenizer.chat_template or ""), prompt
        tag = re.search(r"</[\w:]*think\w*>|\[/THINK\]", template)
        self.think_end = tag[0] if tag else config.EarlyExit().think_end
        opening = self.think_end.replace("/", "")
        self.recipe, self.notes = "step_grpo_r1_distill" if "｜Assistant｜" in prompt else "step_grpo", list[str]()
        if prompt.rstrip().endswith(opening):
            self.thinking = "the prompt opens the thought"
        elif prompt.rstrip().endswith(self.think_end):
            self.thinking = "switched off: the prompt closes the thought"
            self.notes = ["the chat template switches thinking off: take one that does not"]
        elif tag:
            self.thinking = "the model opens the thought"
        else:
            self.thinking = "the template has no thought"
            self.notes = [f"no chat template: let the prompts ask for a thought and end with {opening}"]
            if template:
                self.recipe, self.notes = "step_grpo_llama", ["the recipe's data.system_prompt asks for a thought"]


def markers(model: str, prompts: Path | None, given: Path | None, samples: int, tokens: int, file: Path | None) -> None:
    """Print what fits `model`, a folder or a Hub id, and write it to `file` as JSON. Raises UserError.

    `given` is a file of responses or a run directory. Without it the embedded engine answers the first `samples` of
    `prompts` under the recipe's system prompt, in at most `tokens` tokens each.
    """
    folder = hub.model(Path(model), weights=bool(prompts and not given))
    tokenizer = load_tokenizer(folder)
    vocabulary = vocabulary_of(tokenizer, folder)
    data = config.Data(train=[prompts] if prompts else [])
    example = Renderer(tokenizer, data)([{"role": "user", "content": "What is 1 + 1?"}], "the example")
    data = data.model_copy(update=recipe(Template(tokenizer, example).recipe).get("data", {}))
    table = read_prompts(data.train, tokenizer, data, setting="--prompts")[0] if prompts else []
    asked = [table[i] for i in range(min(samples, len(table)))]
    template = Template(tokenizer, asked[0].text if asked and not tokenizer.chat_template else example)
    responses = list(_read(given)) if given else _sample(folder, vocabulary, asked, tokens) if asked else []
    words = words_of(responses, vocabulary)
    settings, notes = advise(template, vocabulary, responses, words)
    facts = {"prompts end with": repr(template.prompt[-40:]), "thinking": template.thinking}
    facts[template.think_end] = _cell(pieces(template.think_end, vocabulary))
    if responses:
        steps = sum(count_steps(response.text, settings["markers"]) for response in responses)
        size = sum(len(vocabulary.encode(response.text)) for response in responses)
        closed = sum(template.think_end in response.text for response in responses)
        facts["responses"] = f"{len(responses)}, {closed} close a thought, steps of {size / steps:.0f} tokens"
    yaml = [f"recipe: {template.recipe}", "rollout:", "  early_exit:"]
    yaml += [f"    {name}: {_quoted(value)}" for name, value in settings.items()]
    print("\n".join(f"{name:18}{value}" for name, value in facts.items()))
    show_rows("words that begin steps", [{name: _cell(value) for name, value in row.items()} for row in words])
    print("\n".join([*(f"# {note}" for note in notes), *yaml]))
    if file:
        found = {"model": model, "facts": facts, "words": words, "notes": notes, "yaml": "\n".join(yaml)}
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def pieces(text: str, vocabulary: Vocabulary) -> list[str]:
    """The tokens of `text`, decoded one by one; [] where the tokenizer cannot write it."""
    parts = [vocabulary.bytes_of([i]) for i in vocabulary.encode(text)]
    written = b"".join(parts).decode(errors="replace")
    return [p.decode(errors="replace") for p in parts] if written.strip(" ") == text.strip(" ") else []


def words_of(responses: Sequence[Response], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """One row a word: uses (stand-alone), how many begin a line or a sentence, share of the responses, tokens.

    Words that occur, the most used first. Without responses: the reflections that the tokenizer can write.
    """
    rows: list[dict[str, Any]] = []
    for word in (*REFLECTIONS, *CONNECTIVES):
        uses = [count_steps(response.text, [word]) - 1 for response in responses]
        start = re.compile(rf"(?:^|[\n.!?:>])[\s*#\"]*{re.escape(word)}(?![A-Za-z])")
        begins = sum(len(start.findall(response.text)) for response in responses)
        share = sum(map(bool, uses)) / max(len(uses), 1)
        row = {"word": word, "uses": sum(uses), "begin a step": begins, "share": share}
        row |= {"after a blank": pieces(f" {word}", vocabulary), "after a line end": pieces(f"\n{word}", vocabulary)}
        if sum(uses) or not responses and word in REFLECTIONS and row["after a blank"]:
            rows.append(row)
    return sorted(rows, key=lambda row: -row["uses"])


def advise(
    template: Template, vocabulary: Vocabulary, responses: Sequence[Response], words: Sequence[dict[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Settings of `rollout.early_exit`, where the recipe's do not fit; and notes, what to know before using them.

    The markers are the reflections in common use, else a connective that begins steps, else the default.
    """
    default, end, notes = config.EarlyExit(), template.think_end, list(template.notes)
    common = [row for row in words if row["share"] >= COMMON]
    looking_back = [row["word"] for row in common if row["word"] in REFLECTIONS]
    beginning = [row["word"] for row in common if row["begin a step"] > row["uses"] / 2][:1]
    settings: dict[str, Any] = {"markers": looking_back or beginning or default.markers}
    inducer = default.trial_inducer
    for name, used, fits in (
        ("think_end", default.think_end, (end,)),
        ("inducer", inducer, (inducer, " " + " ".join(inducer.split()))),
        ("closing", default.closing, (f"\n{end}\n\n", f" {end}")),
    ):
        best = next((text for text in fits if pieces(text, vocabulary)), None)
        if best is None:
            notes.append(f"the tokenizer can write none of {fits}; choose another rollout.early_exit.{name}")
        elif best != used:
            settings[name] = best
    finished = [response.text for response in responses if response.finished]
    closed = sum(end in text for text in finished)
    if closed < CLOSED * len(finished):
        notes.append(
            f"{closed} of {len(finished)} finished responses have {end}; early exit would write it into the others and "
            "train on it: teach it first (megarl sft), or train without early exit (recipe: grpo)"
        )
    if responses and not looking_back:
        found = f"{beginning[0]} begins their steps" if beginning else "none of these words begins their steps"
        notes.append(f"the responses seldom look back, and {found}: early exit may find nothing to cut")
    return settings, notes


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} token{'s' if len(value) > 1 else ''}: {_quoted(value)}" if value else "–"
    return f"{value:.0%}" if isinstance(value, float) else str(value)


def _quoted(value: Any) -> str:
    """JSON, which is YAML too."""
    return json.dumps(value, ensure_ascii=False)


def _read(place: Path) -> Iterator[Response]:
    """The responses in a file, or of a run's newest step; of chat messages the last one."""
    if place.is_dir():
        place = max((place / "rollouts").glob("step_*.jsonl"), default=place / "rollouts" / "step_000001.jsonl")
    [place] = expand([place], "--responses")
    mark, rows = records(place, COLUMNS)
    number = None
    for number, row in rows:
        row = row if isinstance(row, dict) else {"text": row}
        text = next((row[name] for name in COLUMNS if row.get(name)), None)
        if isinstance(text, list) and isinstance(text[-1], dict):
            text = text[-1].get("content")
        if not isinstance(text, str):
            raise UserError(
                f"{place}{mark}{number}: no response in any of {', '.join(COLUMNS)} (has: {', '.join(row)})"
            )
        yield Response(text, row.get("finish", "stop") == "stop")
    if number is None:
        raise UserError(f"--responses: {place} has no rows")


def _sample(folder: Path, vocabulary: Vocabulary, prompts: Sequence[Prompt], tokens: int) -> list[Response]:
    """One response a prompt, at temperature 1, from the embedded engine."""
    weights = HfWeights(folder)
    longest = max(len(prompt.token_ids) for prompt in prompts) + tokens
    where, dtype = ("cuda", torch.bfloat16) if device.on_cuda() else ("cpu", torch.float32)
    engine = LocalEngine(folder, vocabulary, where, dtype, batch_slots=len(prompts), max_length=longest)

    async def run(progress: Progress) -> list[Generation]:
        await engine.update_weights(0, ((name, loaded(weights.tensor(name))) for name in weights.names))
        task = progress.add_task("responses", total=len(prompts))

        async def answer(i: int, prompt: Prompt) -> Generation:
            sampling = Sampling(tokens, seed=i, stop_token_ids=vocabulary.end_ids)
            made = await engine.generate(prompt.token_ids, sampling, str(i))
            progress.advance(task)
            return made

        return await asyncio.gather(*(answer(i, prompt) for i, prompt in enumerate(prompts)))

    with Progress(console=Console(stderr=True)) as progress:
        made = asyncio.run(run(progress))
    return [Response(vocabulary.text(each.token_ids), each.finish == "stop") for each in made]
