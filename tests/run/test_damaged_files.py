"""Damaged files of a run directory: every reader says which file, in one line, whatever is wrong with it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megarl import config, report
from megarl import replay as recorded
from megarl.bench.common import synthetic
from megarl.errors import RunError, UserError
from megarl.run import atomic, changes, provenance
from megarl.run.directory import RunDirectory, read_metrics, read_rollouts
from megarl.run.directory import find as evaluated
from megarl.run.lock import only_job
from megarl.run.records import rollouts_files
from megarl.run.timeline import PhaseLog
from megarl.view import trace
from megarl.view.live import LiveView
from megarl.view.tail import Follower, newest, tail
from tests.support import runs

REASONER = runs.QUICKSTART / "reasoner"
FILES = {
    "metrics": "metrics.jsonl",
    "rollouts": "rollouts/step_000002.jsonl",
    "evaluations": "evaluations/step_000002.jsonl",
    "phases": "phases/rank_00000.jsonl",
    "config": "config.yaml",
    "provenance": "provenance.json",
    "manifest": "checkpoints/step_000002/manifest.json",
    "ledger": "checkpoints/step_000002/ledger.jsonl",
    "lock": ".lock",
}
WRONG: list[Any] = [
    None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), 1e308, "text", "\x1b[2J", [], [[]], [None], {},
    {"a": 1}, [1] * 4, ["B", [], 1, 2.0], "2026-01-01", 2**31, "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with everything that a run leaves."""
    folder = synthetic.write(tmp_path_factory.mktemp("whole") / "run", REASONER, steps=2, groups=2, per_group=2)
    held_out = read_rollouts(folder, 2)
    for completion in (c for group in held_out for c in group.completions):
        completion.advantage = completion.weight = math.nan
    directory = RunDirectory(folder, synthetic.settings(folder, REASONER, 2), 2)
    directory.evaluation(2, held_out)
    directory.close()
    phases = PhaseLog(folder, 0)
    for step in (1, 2):
        for phase in ("rollout", "train"):
            with phases.span(phase, step):
                pass
    phases.close()
    with only_job(folder, pytest.fail):
        pass
    return folder


def resume(run: Path) -> None:
    """What `megarl train --resume` reads of a run directory."""
    settings = config.load(run / "config.yaml", [f"run={run}"])
    with only_job(run, lambda _: None, remote_timeout=0):
        changes.check(settings, allowed=False)
        step = atomic.newest_good(run / "checkpoints", lambda _: None)
        directory = RunDirectory(run, synthetic.settings(run, REASONER, 2), step or 0)
        directory.close()


def watch(run: Path) -> None:
    """`megarl tail RUN --rollouts 9 --once`, and the live view's parts."""
    tail(run, rollouts=9, once=True)
    newest(run, 9)
    view = LiveView(Follower(run).total())
    for line in Follower(run).new():
        view.step(line["step"], line)
        view.__rich__()


def replay(run: Path) -> None:
    """What `megarl replay RUN --step N` reads of a run directory. A step in the record is read back."""
    config.load(run / "config.yaml")
    provenance.read(run)
    with suppress(StopIteration):
        step = next(line["step"] for line in read_metrics(run) if line["step"] in rollouts_files(run))
        recorded.find(run, step)
        read_rollouts(run, step)
    read_rollouts(run, 2)


READERS: dict[str, Callable[[Path], Any]] = {
    "report": lambda run: report.write([run]),
    "tail": watch,
    "trace": trace.write,
    "replay": replay,
    "resume": resume,
    "eval": lambda run: evaluated(run, None),
}


READ_BY = {
    "metrics": ("report", "tail", "trace", "replay", "resume"),
    "rollouts": ("report", "tail", "replay"),
    "evaluations": ("report",),
    "phases": ("trace",),
    "config": ("report", "tail", "replay", "resume", "eval"),
    "provenance": ("report", "replay"),
    "manifest": ("resume",),
    "ledger": ("report",),
    "lock": ("resume",),
}


def read(reader: str, run: Path) -> str:
    """The one line that a reader says about a run; empty when it reads it. Any other exception goes through."""
    try:
        READERS[reader](run)
    except (UserError, RunError) as e:
        return str(e)
    return ""


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "garbled": lambda content: content[:40] + b"}{\x07" + content[43:],
    "latin-1": lambda content: content[:40] + "é".encode("latin-1") + content[40:],
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "cut": lambda content: content[: len(content) // 2],
    "list": lambda content: b"[1, 2]\n",
    "deep": lambda content: b"[" * 5000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("reader", "kind"),
    [(reader, kind) for kind in list(READ_BY)[:6] for reader in READ_BY[kind]],
)
def test_a_damaged_file_is_named(whole: Path, tmp_path: Path, reader: str, kind: str, damage: str) -> None:
    """One line with the file's name. A cut that leaves whole lines is no damage to metrics and phases."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / FILES[kind]
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    said = read(reader, run)
    if damage == "cut" and kind in ("metrics", "phases", "config"):
        assert FILES[kind] in said or not said or reader in ("replay", "resume", "eval")
        return
    if damage == "deep" and kind in ("metrics", "phases"):  # a line without its end is one that a crash cut off
        return
    assert FILES[kind] in said and "\n" not in said, said


def test_the_line_is_named(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / FILES["metrics"]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1].replace('"reward": ', '"reward": [') + lines[2])
    assert f"{file}:2: damaged: it is not JSON" in read("report", run)
    file.write_text(lines[0] + lines[1] + '{"step": "2"}\n')
    assert f"{file}:3: damaged: step is '2', not a step's number" == read("tail", run)
    rollouts = run / FILES["rollouts"]
    file.write_text("".join(lines))
    rollouts.write_text(rollouts.read_text().replace('"logprobs": [', '"logprobs": [0.5, ', 1))
    assert f"{rollouts}:1: damaged: response_ids, origin and logprobs differ in length" == read("report", run)


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """Bytes flipped, cut or inserted, lines exchanged, or a value somewhere in the JSON replaced by another type's."""
    kind = int(generator.integers(6))
    at = int(generator.integers(len(content)))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ (1 << int(generator.integers(8)))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + generator.bytes(int(generator.integers(1, 9))) + content[at:]
    if kind == 3:
        end = at + int(generator.integers(1, 40))
        return content[:at] + content[end:]
    lines = content.splitlines(keepends=True)
    i = int(generator.integers(len(lines)))
    if kind == 4:
        lines[i] = lines[int(generator.integers(len(lines)))]
        return b"".join(lines)
    wrong = WRONG[int(generator.integers(len(WRONG)))]
    for whole in (lines[i], content):
        with suppress(ValueError):
            tree = json.loads(whole)
            places = list(_places(tree))
            parent, key = places[int(generator.integers(len(places)))]
            parent[key] = wrong
            text = json.dumps(tree).encode() + b"\n"
            return content.replace(whole, text, 1)
    key = re.findall(rb"^ *\w+:", content, re.M)  # YAML
    if key:
        return content.replace(key[i % len(key)], key[i % len(key)] + b" " + json.dumps(wrong).encode() + b" #", 1)
    return content[::-1]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from _places(tree[key])


def fuzz(whole: Path, scratch: Path, inputs: int, seed: int) -> None:
    """Damage one file at a time and let every reader of it at it. The report looks for no tokenizer, which is slow."""
    run = scratch / "run"
    shutil.copytree(whole, run)
    (run / FILES["config"]).write_text((run / FILES["config"]).read_text().replace(str(REASONER), "gone"))
    generator = np.random.default_rng(seed)
    originals = {kind: (run / name).read_bytes() for kind, name in FILES.items()}
    for n in range(inputs):
        kind = list(FILES)[n % len(FILES)]
        content = originals[kind]
        for _ in range(int(generator.integers(1, 3))):
            content = mutated(content or b"\0", generator)
        for reader in READ_BY[kind]:
            (run / FILES[kind]).write_bytes(content)
            try:
                said = read(reader, run)
            except Exception as e:
                raise AssertionError(f"{reader} of {kind}, input {n}: {content[:2000]!r}") from e
            assert "\n" not in said or kind == "config", said  # one line a setting
            for other, original in originals.items():  # a reader that resumes writes
                if other != kind:
                    (run / FILES[other]).write_bytes(original)
            for left in run.glob("config_until_*"):
                left.unlink()


def test_no_damage_is_a_traceback(whole: Path, tmp_path: Path) -> None:
    fuzz(whole, tmp_path, inputs=len(FILES) * 4, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_damage_of_many_is_a_traceback(whole: Path, tmp_path: Path) -> None:
    fuzz(whole, tmp_path, inputs=2500, seed=1)
