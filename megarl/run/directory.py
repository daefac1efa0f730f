"""The run directory: resolved config, metrics, TensorBoard, rollouts. Only the controller writes it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megarl import config
from megarl.errors import UserError
from megarl.run import records
from megarl.run.atomic import Appender, clear_errors, flush, write_text
from megarl.run.changes import keep_former
from megarl.run.records import EVALUATIONS, METRICS, ROLLOUTS, recorded, rollout_lines, rollouts_file, rollouts_files
from megarl.run.trackers import Trackers
from megarl.types import Completion, Probe, Prompt, ScoredCompletion, ScoredGroup, Span

SCORES = ("verdict", "score", "message", "formatted", "steps", "reward", "advantage", "weight")
"""What is recorded of a `ScoredCompletion`. Held-out responses have no advantage and no weight."""
OLDER: dict[str, Any] = {"score": math.nan, "message": ""}  # of records that do not have them


def find(place: Path, overrides: list[str] | None) -> tuple[config.Settings, bool]:
    """The settings of a run directory or of a YAML file, and whether `place` is a run, whose checkpoint is meant."""
    if place.is_dir():
        return config.load(place / "config.yaml", overrides), True
    return config.load(place, overrides), False


class RunDirectory:
    """Writes one run. Open a new one, or resume one at the step of its newest checkpoint."""

    def __init__(self, folder: Path, settings: config.Settings, resume_step: int | None) -> None:
        """`resume_step` None starts a run and refuses a folder that has one. Says in `notices` what a resumed run has
        changed or misses. RunError if the disk fails."""
        self.folder = folder
        self.notices: list[str] = []
        if resume_step is None and recorded(folder):
            raise UserError(f"run: {folder} already has a run; pass --resume to continue it, or name another folder")
        kept = self._until(resume_step) if resume_step else []
        with clear_errors(folder):
            (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            if changed := keep_former(folder, settings, resume_step):
                self.notices.append(changed)
            self._forget_after(resume_step, kept)
        write_text(folder / "config.yaml", config.dump(settings))
        self._metrics = Appender(folder / METRICS)
        threading.excepthook = _hushed(threading.excepthook)
        with clear_errors(folder / "tensorboard"):
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step and resume_step + 1)
        self._trackers = Trackers(settings, resume=resume_step is not None)
        self._tensorboard.add_text("settings", _verbatim(config.dump(settings)), resume_step or 0)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl, and send its numbers to TensorBoard and the trackers.

        `step` counts finished steps. Values are numbers or texts. RunError if the disk fails.
        """
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._metrics.append(json.dumps(line))
        scalars = {
            _tag(key): value
            for key, value in line.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        with clear_errors(self.folder / "tensorboard"):
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, step)
            self._tensorboard.flush()
        self._trackers.log(step, scalars)

    def rollouts(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write every completion of a step, one JSON object a line: all of them or none. TensorBoard gets the first
        group."""
        write_text(rollouts_file(self.folder, step), _lines(groups))
        for first in groups[:1]:
            told = [_verbatim(first.prompt.text)]
            for c in first.completions:
                told += [
                    f"{c.verdict}, reward {c.reward:.3g}, {len(c.completion)} tokens",
                    _verbatim(c.completion.text),
                ]
            with clear_errors(self.folder / "tensorboard"):
                self._tensorboard.add_text("rollout/group", "\n\n".join(told), step)

    def flush(self) -> None:
        """Have every step's metrics and rollouts on the disk itself, so that no committed step lacks them."""
        self._metrics.flush()
        with clear_errors(self.folder):
            flush(self.folder)

    def evaluation(self, step: int, groups: Sequence[ScoredGroup]) -> None:
        """Write the held-out responses after `step`, as `rollouts` does."""
        write_text(rollouts_file(self.folder, step, EVALUATIONS), _lines(groups))

    def close(self) -> None:
        self._trackers.close()
        self._metrics.close()
        with suppress(Exception):  # all steps are written; the error that ends a run must not be hidden by another
            self._tensorboard.close()

    def _until(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to a step. Notices steps that have none."""
        metrics = self.folder / METRICS
        kept = [line for line in read_metrics(self.folder) if line["step"] <= step] if metrics.exists() else []
        if lost := set(range(1, step + 1)) - {line["step"] for line in kept}:
            self.notices.append(
                f"{metrics} has no line for {len(lost)} of the {step} steps in the checkpoint, e.g. {min(lost)}"
            )
        return kept

    def _forget_after(self, step: int, kept: list[dict[str, Any]]) -> None:
        """Drop what was written after the checkpoint that the run continues from: those steps are done again.

        Step 0 means no checkpoint. The evaluation before the first step is then done again too.
        """
        write_text(self.folder / METRICS, (json.dumps(line) + "\n" for line in kept))
        for kind in (ROLLOUTS, EVALUATIONS):
            with clear_errors(self.folder / kind):
                for each, file in rollouts_files(self.folder, kind).items():
                    if each > step or not step:
                        file.unlink()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, `step` and numbers, without a last line that a crash cut short.

    Raises UserError that names the line if it has no such object.
    """
    file = folder / METRICS
    if not file.is_file():
        raise UserError(f"run: {folder} has no {METRICS}")
    return [records.metrics_of(raw, file, n) for n, raw in records.numbered_lines(file) if raw.endswith(b"\n")]


def read_rollouts(folder: Path, step: int) -> list[ScoredGroup]:
    """The groups of a step as `RunDirectory.rollouts` got them, without those that dynamic sampling replaced: tokens,
    log-probs and rewards bit by bit.

    The record lacks what training does not read: `discarded_tokens` is 0, `experts` None. Raises UserError that names a
    damaged line.
    """
    groups: dict[str, ScoredGroup] = {}
    file = rollouts_file(folder, step)
    for n, record in rollout_lines(file):
        if record.get("replaced"):
            continue
        with records.damaged(file, n):
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
    scores = OLDER | {name: record[name] for name in SCORES if record.get(name) is not None or name not in OLDER}
    return ScoredCompletion(completion, **scores)


def as_records(groups: Sequence[ScoredGroup]) -> Iterator[dict[str, Any]]:
    """Every completion of the groups as it is recorded: an object of JSON."""
    return (_record(group, c) for group in groups for c in group.completions)


def _lines(groups: Sequence[ScoredGroup]) -> Iterator[str]:
    return (json.dumps(record) + "\n" for record in as_records(groups))


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
        **{name: _number(getattr(scored, name)) for name in SCORES},
        "keep": group.keep,
        "replaced": group.replaced,
    }


def _number(value: Any) -> Any:
    """None for nan, which JSON lacks."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _hushed(hook: Any) -> Any:
    """`hook` without what TensorBoard's thread raises, which is raised again where we write, and told there."""

    def report(arguments: Any) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            hook(arguments)

    return report


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
    "reward": "reward", "accuracy": "reward", "score": "reward", "equal_groups": "reward",
    "verdict": "reward", "response": "rollout", "steps_per": "rollout",
    "early": "rollout", "probe": "rollout", "exit": "rollout", "tokens_generated": "rollout", "tokens_saved": "rollout",
    "prompts": "pruning", "completions": "pruning", "effective": "pruning", "packing": "pruning",
    "mismatch": "mismatch", "seconds": "seconds",
}  # fmt: skip
