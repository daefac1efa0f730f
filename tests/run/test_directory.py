"""The run directory: what a resumed run forgets, and what a new one refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megarl import config
from megarl.errors import UserError
from megarl.run.directory import RunDirectory, read_metrics, read_rollouts
from megarl.types import Completion, Probe, Prompt, ScoredCompletion, ScoredGroup, Span


def settings(folder: Path) -> config.Settings:
    return config.parse({"run": folder, "model": {"path": "m"}, "data": {"train": ["t"]}})


def write(folder: Path, steps: range, resume_step: int | None) -> None:
    run = RunDirectory(folder, settings(folder), resume_step)
    for step in steps:
        run.rollouts(step, [])
        run.metrics(step, {"reward": step / 2})
    run.close()


def test_steps_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    """They are done again: metrics and rollouts hold each step once."""
    write(tmp_path, range(1, 6), None)
    write(tmp_path, range(4, 7), 3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert len(list((tmp_path / "rollouts").glob("*.jsonl"))) == 6


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    write(tmp_path, range(3, 4), 2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_new_run_refuses_the_folder_of_another(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2), None)
    with pytest.raises(UserError, match="--resume"):
        write(tmp_path, range(1, 2), None)


def test_resuming_where_nothing_is_starts_anew(tmp_path: Path) -> None:
    """`make quickstart` always passes --resume."""
    write(tmp_path / "new", range(1, 2), 0)
    assert len(read_metrics(tmp_path / "new")) == 1


def test_rollouts_come_back_bit_by_bit(tmp_path: Path) -> None:
    """Tokens, log-probs (inserted tokens have none), rewards and probabilities: what a replay trains on."""
    generator = np.random.default_rng(0)
    logprobs = -np.exp(generator.normal(size=50) * 4).astype(np.float32)
    logprobs[7] = math.nan
    prompt = Prompt("uid", (1, 2), "text", "answer", "file:1")
    completions = [
        Completion(
            "uid", i, generator.integers(0, 9, 50).astype(np.int32), (np.arange(50) == 7).astype(np.uint8), logprobs,
            "stop", (Span(3, 0, 50),), probes=(Probe(5, (1,), 0.25, True),), text=f"text {i}",
        )
        for i in range(2)
    ]  # fmt: skip
    scored = [
        ScoredCompletion(c, "right", 1.0, True, 3 + c.index, generator.random(), generator.random(), weight=1 / 3)
        for c in completions
    ]
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    run.rollouts(1, [ScoredGroup(prompt, scored, keep=1 / 3)])
    run.close()
    (group,) = read_rollouts(tmp_path, 1)
    assert (group.prompt, group.keep) == (prompt, 1 / 3)
    for ours, theirs in zip(group.completions, scored, strict=True):
        assert math.isnan(ours.score)  # it is not recorded
        for kind, one, other in (
            (ScoredCompletion, ours, theirs),
            (Completion, ours.completion, theirs.completion),
        ):
            for name in kind.__dataclass_fields__.keys() - {"completion", "score", "discarded_tokens"}:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
                assert type(getattr(one, name)) is type(getattr(other, name))
        assert ours.completion.logprobs.dtype == np.float32


def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 4), None)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/reward")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_tensorboard_has_the_settings_and_a_group_of_each_step_as_text(tmp_path: Path) -> None:
    """Verbatim: a response's Markdown is not rendered."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    group = ScoredGroup(Prompt("uid", (1,), "what?", "2", "file:1"), [])
    for i, text in enumerate(("# one", "two\nlines")):
        made = (np.zeros(3, np.int32), np.zeros(3, np.uint8), np.zeros(3, np.float32), "stop")
        completion = Completion("uid", i, *made, text=text)
        group.completions.append(ScoredCompletion(completion, "wrong", 0.0, False, steps=1, reward=0.25))
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    run.rollouts(7, [group, group])
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    [told] = events.Tensors("rollout/group/text_summary")
    parts = [
        "    what?",
        "wrong, reward 0.25, 3 tokens",
        "    # one",
        "wrong, reward 0.25, 3 tokens",
        "    two\n    lines",
    ]
    assert (told.step, told.tensor_proto.string_val[0].decode()) == (7, "\n\n".join(parts))
    [chosen] = events.Tensors("settings/text_summary")
    assert b"    steps: 100" in chosen.tensor_proto.string_val[0]


def test_resuming_before_the_first_checkpoint_forgets_everything(tmp_path: Path) -> None:
    """The evaluation before the first step is done again too, and appears once."""
    write(tmp_path, range(3), None)
    write(tmp_path, range(2), 0)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1]
