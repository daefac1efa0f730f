"""The run directory: resolved config, metrics, TensorBoard, rollouts. Only the controller writes it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megarl import config
from megarl.errors import UserError
from megarl.run.atomic import write_text
from megarl.run.trackers import Trackers
from megarl.types import Completion, Probe, Prompt, ScoredCompletion, ScoredGroup, Span

SCORES = ("verdict", "formatted", "steps", "reward", "advantage", "weight")  # recorded of a `ScoredCompletion`


class RunDirectory:
    """Writes one run. Open a new one, or resume one at the step of its newest checkpoint."""

    def __init__(self, folder: Path, settings: config.Settings, resume_step: int | None) -> None:
        """`resume_step` None starts a run and refuses a folder that has one."""
        self.folder = folder
        if resume_step is None and (folder / "metrics.jsonl").exists():
            raise UserError(f"run: {folder} already has a run; pass --resume to continue it, or name another folder")
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config.dump(settings))
        if resume_step is not None and (folder / "metrics.jsonl").exists():
            self._forget_after(resume_step)
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step and resume_step + 1)
        self._trackers = Trackers(settings, resume=resume_step is not None)
        self._tensorboard.add_text("settings", _verbatim(config.dump(settings)), resume_step or 0)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl, and send its numbers to TensorBoard and the trackers.

        `step` counts finished steps.
        """
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        scalars = {
            _tag(key): value
            for key, value in line.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, step)
        self._tensorboard.flush()
        self._trackers.log(step, scalars)

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write every completion of a step, one JSON object a line: all of them or none. TensorBoard gets the first
        group."""
        file = rollouts_file(self.folder, step)
        partial = file.with_suffix(".partial")
        with partial.open("w") as out:
            for group in groups:
                for c in group.completions:
                    out.write(json.dumps(_record(group, c)) + "\n")
        partial.replace(file)
        for first in groups[:1]:
            told = [_verbatim(first.prompt.text)]
            for c in first.completions:
                told += [
                    f"{c.verdict}, reward {c.reward:.3g}, {len(c.completion)} tokens",
                    _verbatim(c.completion.text),
                ]
            self._tensorboard.add_text("rollout/group", "\n\n".join(told), step)

    def close(self) -> None:
        self._trackers.close()
        self._metrics.close()
        self._tensorboard.close()

    def _forget_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that the run continues from: those steps are done again.

        Step 0 means no checkpoint. The evaluation before the first step is then done again too.
        """
        metrics = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.folder) if step and line["step"] <= step]
        write_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        for file in (self.folder / "rollouts").glob("step_*"):
            if int(file.stem.split("_")[1]) > step:
                file.unlink()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, without a last line that a crash cut short."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"run: {folder} has no metrics.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rollouts_file(folder: Path, step: int) -> Path:
    """Where a step's completions are."""
    return folder / "rollouts" / f"step_{step:06d}.jsonl"


def read_rollouts(folder: Path, step: int) -> list[ScoredGroup]:
    """The groups of a step as `RunDirectory.rollouts` got them: tokens, log-probs and rewards bit by bit.

    The record lacks what training does not read: `score` is nan, `discarded_tokens` 0, `experts` None.
    """
    groups: dict[str, ScoredGroup] = {}
    with rollouts_file(folder, step).open() as file:
        for record in map(json.loads, file):
            uid = record["uid"]
            if uid not in groups:
                prompt = Prompt(uid, tuple(record["prompt_ids"]), record["prompt"], record["answer"], record["source"])
                groups[uid] = ScoredGroup(prompt, [], record["keep"])
            groups[uid].completions.append(_completion(record))
    return list(groups.values())


def _completion(record: dict[str, Any]) -> ScoredCompletion:
    completion = Completion(
        record["uid"],
        record["index"],
        np.array(record["response_ids"], np.int32),
        np.array(record["origin"], np.uint8),
        np.array([math.nan if x is None else x for x in record["logprobs"]], np.float32),
        record["finish"],
        spans=tuple(Span(*span) for span in record["spans"]),
        exit_reason=record["exit_reason"],
        probes=tuple(Probe(at, tuple(ids), confidence, accepted) for at, confidence, accepted, ids in record["probes"]),
        text=record["response"],
    )
    return ScoredCompletion(completion, score=math.nan, **{name: record[name] for name in SCORES})


def _record(group: ScoredGroup, scored: ScoredCompletion) -> dict[str, Any]:
    c = scored.completion
    return {
        "uid": c.prompt_uid,
        "index": c.index,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "source": group.prompt.source,
        "prompt_ids": list(group.prompt.token_ids),
        "response": c.text,
        "response_ids": c.token_ids.tolist(),
        "origin": c.origin.tolist(),
        "logprobs": [None if math.isnan(x) else float(f"{x:.9g}") for x in c.logprobs.tolist()],
        "finish": c.finish,
        "exit_reason": str(c.exit_reason),
        "probes": [[p.position, round(p.confidence, 6), p.accepted, list(p.token_ids)] for p in c.probes],
        "spans": [[s.version, s.start, s.end] for s in c.spans],
        **{name: getattr(scored, name) for name in SCORES},
        "keep": group.keep,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def _verbatim(text: str) -> str:
    """As Markdown, which TensorBoard renders."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _tag(key: str) -> str:
    """TensorBoard groups by the part before the slash."""
    if "/" in key:
        return key
    for prefix, group in _GROUPS.items():
        if key.startswith(prefix):
            return f"{group}/{key}"
    return f"train/{key}"


_GROUPS = {
    "reward": "reward", "accuracy": "reward", "verdict": "reward", "response": "rollout", "steps_per": "rollout",
    "early": "rollout", "probe": "rollout", "exit": "rollout", "tokens_generated": "rollout", "tokens_saved": "rollout",
    "prompts": "pruning", "completions": "pruning", "effective": "pruning", "packing": "pruning",
    "mismatch": "mismatch", "seconds": "seconds",
}  # fmt: skip
