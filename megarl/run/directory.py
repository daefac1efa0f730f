"""The run directory: resolved config, metrics, TensorBoard, rollouts, checkpoints. Written by the controller alone."""

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
from megarl.run.trackers import Trackers
from megarl.types import Completion, Group, Probe, Prompt, Span


class RunDirectory:
    """Writes one run. Open a new one, or resume one at the step of its newest checkpoint."""

    def __init__(self, folder: Path, settings: config.Settings, resume_step: int | None) -> None:
        """`resume_step` None starts a run, and refuses a folder that holds one."""
        self.folder = folder
        if resume_step is None and (folder / "metrics.jsonl").exists():
            raise UserError(
                f"run: {folder} already holds a run; pass --resume to go on with it, or name another folder"
            )
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config.dump(settings))
        if resume_step is not None and (folder / "metrics.jsonl").exists():
            self._forget_after(resume_step)
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step and resume_step + 1)
        self._trackers = Trackers(settings, resume=resume_step is not None)
        self._tensorboard.add_text("settings", _verbatim(config.dump(settings)), resume_step or 0)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl and its numbers to TensorBoard and the trackers. `step` counts finished
        steps."""
        line = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        scalars: dict[str, float] = {}
        for key, value in line.items():
            if isinstance(value, list) and value and key.endswith("_histogram"):
                self._histogram(key, value, step)
            elif isinstance(value, int | float) and key != "step" and math.isfinite(value):
                scalars[_tag(key)] = value
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, step)
        self._tensorboard.flush()
        self._trackers.log(step, scalars)

    def rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """Write every completion of a step, one JSON object a line, complete or not at all; TensorBoard has the first
        group's."""
        file = rollouts_file(self.folder, step)
        partial = file.with_suffix(".partial")
        with partial.open("w") as out:
            for group in groups:
                for completion in group.completions:
                    out.write(json.dumps(_record(group, completion)) + "\n")
        partial.replace(file)
        for first in groups[:1]:
            told = [_verbatim(first.prompt.text)]
            for c in first.completions:
                told += [f"{c.verdict}, reward {c.reward:.3g}, {len(c)} tokens", _verbatim(c.text)]
            self._tensorboard.add_text("rollout/group", "\n\n".join(told), step)

    def close(self) -> None:
        self._trackers.close()
        self._metrics.close()
        self._tensorboard.close()

    def _histogram(self, key: str, counts: list[int], step: int) -> None:
        """`counts` are those of equal bins over [0, 1]."""
        edges = np.linspace(0.0, 1.0, len(counts) + 1)
        total, middles = float(sum(counts)), (edges[:-1] + edges[1:]) / 2
        if total:
            self._tensorboard.add_histogram_raw(
                _tag(key), min=0.0, max=1.0, num=total, sum=float(middles @ counts),
                sum_squares=float(middles**2 @ counts), bucket_limits=edges[1:].tolist(), bucket_counts=counts,
                global_step=step,
            )  # fmt: skip

    def _forget_after(self, step: int) -> None:
        """Drop what was written after the checkpoint that the run goes on from: those steps are done again.

        At 0 there was none, and the evaluation before the first step is done again too.
        """
        metrics = self.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.folder) if step and line["step"] <= step]
        partial = metrics.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(metrics)
        for file in (self.folder / "rollouts").glob("step_*"):
            if int(file.stem.split("_")[1]) > step:
                file.unlink()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a last line cut short by a crash is left out."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"run: {folder} holds no metrics.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rollouts_file(folder: Path, step: int) -> Path:
    """Where a step's completions are."""
    return folder / "rollouts" / f"step_{step:06d}.jsonl"


def read_rollouts(folder: Path, step: int) -> list[Group]:
    """The groups of a step as `RunDirectory.rollouts` was given them: tokens, log-probs and rewards bit by bit.

    What training does not read (`score`, `discarded_tokens`) is not recorded.
    """
    groups: dict[str, Group] = {}
    with rollouts_file(folder, step).open() as file:
        for record in map(json.loads, file):
            uid = record["uid"]
            if uid not in groups:
                prompt = Prompt(uid, tuple(record["prompt_ids"]), record["prompt"], record["answer"], record["source"])
                groups[uid] = Group(prompt, [], record["keep"])
            groups[uid].completions.append(_completion(record))
    return list(groups.values())


def _completion(record: dict[str, Any]) -> Completion:
    return Completion(
        record["uid"],
        record["index"],
        np.array(record["response_ids"], np.int32),
        np.array(record["origin"], np.uint8),
        np.array([math.nan if x is None else x for x in record["logprobs"]], np.float32),
        record["finish"],
        spans=[Span(*span) for span in record["spans"]],
        exit_reason=record["exit_reason"],
        probes=[Probe(at, tuple(ids), confidence, accepted) for at, confidence, accepted, ids in record["probes"]],
        text=record["response"],
        verdict=record["verdict"],
        formatted=record["formatted"],
        steps=record["steps"],
        reward=record["reward"],
        advantage=record["advantage"],
        weight=record["weight"],
    )


def _record(group: Group, c: Completion) -> dict[str, Any]:
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
        "verdict": c.verdict,
        "formatted": c.formatted,
        "steps": c.steps,
        "reward": c.reward,
        "advantage": c.advantage,
        "keep": group.keep,
        "weight": c.weight,
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
