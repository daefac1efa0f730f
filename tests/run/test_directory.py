"""The run directory: what a resumed run forgets, and what a new one refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megarl import config
from megarl.errors import RunError, UserError
from megarl.run import atomic, changes
from megarl.run.directory import RunDirectory, read_metrics, read_rollouts
from megarl.run.records import EVALUATIONS, rollouts_file
from megarl.types import Completion, Probe, Prompt, ScoredCompletion, ScoredGroup, Span
from tests.support.disks import limited_files


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


def test_a_run_that_recorded_nothing_is_none(tmp_path: Path) -> None:
    """It failed at its start. The same command, mended, needs no --resume."""
    write(tmp_path, range(0), None)
    assert (tmp_path / "config.yaml").exists()
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
        ScoredCompletion(
            c, "error", 7.5, True, 3 + c.index, generator.random(), generator.random(), weight=1 / 3, message="why"
        )
        for c in completions
    ]
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    replaced = ScoredGroup(dataclasses.replace(prompt, uid="other"), scored, replaced=True)
    run.rollouts(1, [replaced, ScoredGroup(prompt, scored, keep=1 / 3)])
    run.close()
    (group,) = read_rollouts(tmp_path, 1)
    assert (group.prompt, group.keep) == (prompt, 1 / 3)
    for ours, theirs in zip(group.completions, scored, strict=True):
        for kind, one, other in (
            (ScoredCompletion, ours, theirs),
            (Completion, ours.completion, theirs.completion),
        ):
            for name in kind.__dataclass_fields__.keys() - {"completion", "discarded_tokens"}:
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
                assert type(getattr(one, name)) is type(getattr(other, name))
        assert ours.completion.logprobs.dtype == np.float32


def test_held_out_responses_are_recorded_with_their_messages(tmp_path: Path) -> None:
    """As strict JSON: they have no advantage and no weight. A resumed run forgets those after its checkpoint."""
    empty = (np.zeros(1, np.int32), np.zeros(1, np.uint8), np.zeros(1, np.float32), "stop")
    completion = ScoredCompletion(Completion("uid", 0, *empty, text="so"), "error", 0.0, False, 1, 0.0, message="why")
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    for step in (0, 2, 4):
        run.evaluation(step, [ScoredGroup(Prompt("uid", (1,), "what?", "2", "file:1"), [completion])])
        run.metrics(step, {})
    run.close()

    def no_number(text: str) -> None:
        raise AssertionError(text)

    record = json.loads(rollouts_file(tmp_path, 2, EVALUATIONS).read_text(), parse_constant=no_number)
    assert (record["prompt"], record["response"], record["message"]) == ("what?", "so", "why")
    assert (record["verdict"], record["score"], record["advantage"], record["weight"]) == ("error", 0.0, None, None)
    RunDirectory(tmp_path, settings(tmp_path), 2).close()
    assert [rollouts_file(tmp_path, step, EVALUATIONS).exists() for step in (0, 2, 4)] == [True, True, False]
    RunDirectory(tmp_path, settings(tmp_path), 0).close()
    assert not rollouts_file(tmp_path, 0, EVALUATIONS).exists()


def test_rollouts_of_older_runs_are_read(tmp_path: Path) -> None:
    """Their records have no score, message or mark of dynamic sampling."""
    test_rollouts_come_back_bit_by_bit(tmp_path)
    file = rollouts_file(tmp_path, 1)
    records = [json.loads(line) for line in file.read_text().splitlines() if '"replaced": false' in line]
    new = ("score", "message", "replaced")
    older = [{key: value for key, value in record.items() if key not in new} for record in records]
    file.write_text("".join(json.dumps(record) + "\n" for record in older))
    (group,) = read_rollouts(tmp_path, 1)
    assert [(math.isnan(c.score), c.message, c.verdict) for c in group.completions] == [(True, "", "error")] * 2


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


def test_copies_beside_the_rollouts_are_left_alone(tmp_path: Path) -> None:
    """A resumed run deletes the rollouts that it does again, and nothing that only looks like them."""
    write(tmp_path, range(1, 4), None)
    names = ("step_best.jsonl", "step_000003 (copy).jsonl", "step_3.jsonl", "step_000003.jsonl.bak", ".DS_Store")
    for name in names:
        (tmp_path / "rollouts" / name).write_text("mine")
    write(tmp_path, range(2, 3), 1)
    there = {path.name for path in (tmp_path / "rollouts").iterdir()}
    assert there == {*names, "step_000001.jsonl", "step_000002.jsonl"}


def test_a_committed_step_without_its_line_is_told(tmp_path: Path) -> None:
    """After a power loss, say, of a disk that lies about flushing."""
    write(tmp_path, range(1, 5), None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([lines[0], lines[2]]))
    run = RunDirectory(tmp_path, settings(tmp_path), 4)
    run.close()
    assert run.notices == [f"{tmp_path / 'metrics.jsonl'} has no line for 2 of the 4 steps in the checkpoint, e.g. 2"]


def test_metrics_and_rollouts_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flush` comes before a commit (loop/controller.py), so that a committed step has its line and its rollouts."""
    flushed: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    run.rollouts(1, [])
    assert flushed[-2:] == [str(tmp_path / "rollouts" / "step_000001.jsonl.partial"), str(tmp_path / "rollouts")]
    run.metrics(1, {"reward": 0.5})
    flushed.clear()
    run.flush()
    run.close()
    assert flushed == [str(tmp_path / "metrics.jsonl"), str(tmp_path)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    """In the middle of metrics and of rollouts: a RunError each, and closing adds none."""
    group = ScoredGroup(Prompt("uid", (1,), "what?", "2", "file:1"), [])
    made = (np.zeros(900, np.int32), np.zeros(900, np.uint8), np.zeros(900, np.float32), "stop")
    group.completions.append(ScoredCompletion(Completion("uid", 0, *made), "wrong", 0.0, False, steps=1, reward=0.25))
    run = RunDirectory(tmp_path, settings(tmp_path), None)
    with limited_files(5):
        with pytest.raises(RunError, match=r"cannot save to .*metrics\.jsonl: File too large"):
            run.metrics(1, {"reward": 0.5})
        with pytest.raises(RunError, match=r"cannot save to .*step_000001\.jsonl.*: File too large"):
            run.rollouts(1, [group])
        run.close()
    assert list((tmp_path / "rollouts").iterdir()) == [] and (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_folder_deleted_amid_a_run_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = RunDirectory(folder, settings(folder), None)
    shutil.rmtree(folder)
    with pytest.raises(RunError, match=f"cannot save to {folder}: No such file"):
        run.flush()
    run.close()


def test_changed_settings_are_said_and_both_are_kept(tmp_path: Path) -> None:
    """Another learning rate from step 2 on, and a third one, which is tried twice."""
    write(tmp_path, range(1, 5), None)
    first = (tmp_path / "config.yaml").read_text()
    for rate, notices in (("2e-6", 1), ("2e-6", 0), ("3e-6", 1)):
        changed = settings(tmp_path)
        changed.optimizer.lr = float(rate)
        run = RunDirectory(tmp_path, changed, 2)
        run.metrics(3, {"reward": 0.5})
        run.close()
        assert len(run.notices) == notices, run.notices
        assert all("after step 2: optimizer.lr" in said for said in run.notices)
        assert (tmp_path / "config_until_step_000002.yaml").read_text() == first
        assert config.tree(tmp_path / "config.yaml")["optimizer"]["lr"] == float(rate)
    write(tmp_path, range(3, 4), 2)
    assert (tmp_path / "config.yaml").read_text() == first


@pytest.mark.parametrize(
    ("name", "value", "refused", "allowed"),
    [
        ("seed", 1, "prompts would be repeated", False),
        ("data.shuffle", False, "prompts would be repeated", False),
        ("batch.completions_per_prompt", 4, "--allow-changes", True),
        ("data.system_prompt", "Think.", "--allow-changes", True),
        ("reward.function", "mine:grade", "--allow-changes", True),
        ("reward.alpha", 1.0, "--allow-changes", True),
        ("optimizer.lr", 2e-6, None, True),
        ("steps", 500, None, True),
        ("reward.timeout", 3.0, None, True),
        ("data.train", ["moved/t"], None, True),
        ("parallel.tp", 2, None, True),
    ],
)
def test_what_a_resumed_run_may_change(
    tmp_path: Path, name: str, value: object, refused: str | None, allowed: bool
) -> None:
    """What says which prompts were drawn: never. Groups and rewards: when asked for. All else: freely."""
    write(tmp_path, range(1, 2), None)
    tree = yaml.safe_load(config.dump(settings(tmp_path)))
    *sections, leaf = name.split(".")
    (tree[sections[0]] if sections else tree)[leaf] = value
    wanted = config.parse(tree)
    changes.check(wanted, allowed=False)  # no checkpoint: everything is done again
    atomic.prepare(tmp_path / "checkpoints", 1)
    atomic.commit(tmp_path / "checkpoints", 1, keep=1, warn=pytest.fail)
    for allow, message in ((False, refused), (True, None if allowed else refused)):
        if message is None:
            changes.check(wanted, allowed=allow)
        else:
            with pytest.raises(UserError, match=f"^{name}: .*{message}"):
                changes.check(wanted, allowed=allow)
