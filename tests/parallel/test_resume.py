"""A checkpoint saved under one layout continues under another as if nothing had happened."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.bench.common.learners import TIMEOUT, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.errors import RunError, UserError
from megarl.learner import checkpoint
from megarl.runtime.spawn import spawn

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

BEFORE, AFTER = 2, 3  # updates before the checkpoint and after it
FAST = {"lr": 1e-2, "clip_grad": 0.5, "warmup_steps": 4, "decay": "cosine"}


def _learner(model: Path, parallel: dict[str, Any]) -> Any:
    from megarl.learner.learner import Learner
    from megarl.learner.parallel import start

    chosen = settings(model, parallel, optimizer=FAST)
    world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
    return Learner(chosen, world, total_updates=BEFORE + AFTER)


def _train(learner: Any, updates: range) -> list[float]:
    from megarl.learner.learner import sft_objective

    losses = []
    for update in updates:
        batch = split(samples(seed=update), learner.world.dp_size, 2) if learner.world.is_controller else None
        losses.append(learner.train_step(batch, sft_objective)["loss"])
    return losses


def save_and_go_on(model: Path, parallel: dict[str, Any], folder: Path) -> list[float]:
    """On every rank: the losses of an uninterrupted run that saves on its way."""
    learner = _learner(model, parallel)
    losses = _train(learner, range(BEFORE))
    checkpoint.save(learner, folder)
    losses += _train(learner, range(BEFORE, BEFORE + AFTER))
    learner.world.release()
    return losses


def resume(model: Path, parallel: dict[str, Any], folder: Path) -> tuple[list[float], list[float], bool]:
    """On every rank: the losses after the checkpoint; Adam's step counts, and whether each parameter has its own."""
    learner = _learner(model, parallel)
    with torch.no_grad():
        for chunk in learner.models:
            for parameter in chunk.parameters():
                parameter.fill_(0.123)  # so that a load that does nothing does not look right
    checkpoint.load(learner, folder)
    assert learner.version == BEFORE
    states = [state for o in learner.optimizer.chained_optimizers for state in o.optimizer.state.values()]
    steps = [state["step"] for state in states]
    own = len({step.data_ptr() for step in steps}) == len(steps)
    counts = sorted({float(step) for step in steps})
    losses = _train(learner, range(BEFORE, BEFORE + AFTER))
    learner.world.release()
    return losses, counts, own


def _four_ranks(model: Path, folder: Path) -> list[float]:
    return save_and_go_on(model, {"tp": 2, "pp": 2}, folder)


def _two_ranks(model: Path, saved: Path, overlapped: Path, plain: Path) -> dict[str, Any]:
    return {
        "dp2": resume(model, {}, saved),
        "tp2, overlap": resume(model, {"tp": 2, "overlap_grad_reduce": True}, saved),
        "overlapped": save_and_go_on(model, {"overlap_grad_reduce": True}, overlapped),
        "plain": save_and_go_on(model, {"tp": 2, "distributed_optimizer": False}, plain),
    }


def _one_rank(model: Path, saved: Path, overlapped: Path, plain: Path) -> dict[str, Any]:
    return {
        "tp1": resume(model, {}, saved),
        "overlapped": resume(model, {}, overlapped),
        "plain": resume(model, {"distributed_optimizer": False}, plain),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The losses of every run of this module, and the folder of a checkpoint."""
    root = tmp_path_factory.mktemp("resume")
    model, saved, overlapped, plain = (root / name for name in ("model", "saved", "overlapped", "plain"))
    write_model(model, tied=True)
    for folder in (saved, overlapped, plain):
        folder.mkdir()
    whole = spawn(_four_ranks, 4, (model, saved), TIMEOUT)[0]
    two = spawn(_two_ranks, 2, (model, saved, overlapped, plain), TIMEOUT)[0]
    one = spawn(_one_rank, 1, (model, saved, overlapped, plain), TIMEOUT)[0]
    return {"model": model, "saved": saved, "whole": whole, "two": two, "one": one}


@pytest.mark.parametrize(("ranks", "layout"), [("one", "tp1"), ("two", "dp2"), ("two", "tp2, overlap")])
def test_resumes_under_another_layout(runs: dict[str, Any], ranks: str, layout: str) -> None:
    """Saved at tp2·pp2, the next three losses equal the uninterrupted run's; Adam's counts are right and unshared.

    The rates are high enough that wrong moments or a wrong bias correction would move the losses by far more.
    """
    losses, counts, own = runs[ranks][layout]
    assert losses == pytest.approx(runs["whole"][BEFORE:], abs=1e-5)
    assert counts == [BEFORE]
    assert own


def test_losses_move_between_updates(runs: dict[str, Any]) -> None:
    """The comparison above means something: each update changes the loss by much more than its tolerance."""
    whole = runs["whole"]
    assert min(abs(a - b) for a, b in zip(whole, whole[1:], strict=False)) > 1e-3


def test_a_checkpoint_saved_under_overlap_holds_the_updated_weights(runs: dict[str, Any]) -> None:
    """With overlapped gathering, the last update has not reached every rank's parameters when saving starts."""
    assert runs["two"]["overlapped"][:BEFORE] == pytest.approx(runs["whole"][:BEFORE], abs=1e-5)
    assert runs["one"]["overlapped"][0] == pytest.approx(runs["whole"][BEFORE:], abs=1e-5)


def test_the_plain_optimizer_resumes_under_another_layout(runs: dict[str, Any]) -> None:
    """Without the distributed optimizer, tp2 → tp1."""
    losses, counts, own = runs["one"]["plain"]
    assert losses == pytest.approx(runs["whole"][BEFORE:], abs=1e-5)
    assert (counts, own) == ([BEFORE], True)


def _expert_checkpoints(model: Path, one: Path, two: Path) -> dict[str, Any]:
    return {
        "ep1 to ep2": resume(model, {"ep": 2}, one),
        "ep1 to tp2, etp1": resume(model, {"tp": 2, "etp": 1}, one),
        "ep2": save_and_go_on(model, {"ep": 2}, two),
    }


def test_a_mixture_of_experts_resumes_under_another_expert_layout(tmp_path: Path) -> None:
    """Between ep 1 and ep 2, both ways, and where experts are not split as the dense layers are."""
    model, one, two = (tmp_path / name for name in ("model", "one", "two"))
    write_model(model, "qwen3_moe")
    one.mkdir()
    two.mkdir()
    whole = spawn(save_and_go_on, 1, (model, {}, one), TIMEOUT)[0]
    wide = spawn(_expert_checkpoints, 2, (model, one, two), TIMEOUT)[0]
    back = spawn(resume, 1, (model, {}, two), TIMEOUT)[0]
    for losses, counts, own in (wide["ep1 to ep2"], wide["ep1 to tp2, etp1"], back):
        assert losses == pytest.approx(whole[BEFORE:], abs=1e-5)
        assert (counts, own) == ([BEFORE], True)


REFUSED = (
    "missing",
    "cut",
    "lost",
    "torn",
    "common",
    "code in a pickle",
    "code by a dotted name",
    "code in the common part",
)


class _Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _refusals(model: Path, other: Path, folders: dict[str, Path]) -> dict[str, str]:
    messages = {}

    def attempt(name: str, act: Any, folder: Path) -> None:
        try:
            act(folder)
        except (UserError, RunError) as e:
            kinds.add((name, type(e)))
            messages[name] = str(e)

    kinds: set[tuple[str, type[Exception]]] = set()
    learner = _learner(model, {})
    for name in REFUSED:
        attempt(name, partial(checkpoint.load, learner), folders[name])
    learner.world.release()
    learner = _learner(other, {})
    attempt("other model", partial(checkpoint.load, learner), folders["whole"])
    learner.world.release()
    learner = _learner(model, {"distributed_optimizer": False})
    attempt("other optimizer", partial(checkpoint.load, learner), folders["whole"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
    attempt("disk full", partial(checkpoint.save, learner), folders["full"])
    assert {name for name, kind in kinds if kind is RunError} == {"disk full"}  # nobody's mistake: exit code 1
    return messages


def test_refuses_what_is_not_a_whole_fitting_checkpoint(runs: dict[str, Any], tmp_path: Path) -> None:
    """Another architecture, missing or truncated files, a full disk: one line each, naming the place and the cause.

    The full disk is played by a limit on file sizes. Code in either pickle of a checkpoint is not run.
    """
    saved = runs["saved"]
    other = tmp_path / "other"
    write_model(other, tied=True, hidden_size=128)
    folders = {name: tmp_path / name for name in (*REFUSED, "full")}
    folders["full"].mkdir()
    for name in REFUSED[1:]:
        shutil.copytree(saved, folders[name])
    data = max(folders["cut"].glob("*.distcp"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1000])
    max(folders["lost"].glob("*.distcp"), key=lambda file: file.stat().st_size).unlink()
    (folders["torn"] / "learner.json").write_text((saved / "learner.json").read_text()[:40])
    (folders["common"] / "common.pt").write_bytes((saved / "common.pt").read_bytes()[:100])
    code = _Code(f"touch {tmp_path / 'code_ran'}")
    (folders["code in a pickle"] / ".metadata").write_bytes(pickle.dumps(code))
    (folders["code by a dotted name"] / ".metadata").write_bytes(
        b"\x80\x04\x8c'torch.distributed.checkpoint.filesystem\x8c\tos.system\x93"
        + b"("
        + b"\x8c"
        + bytes([len(code.command)])
        + code.command.encode()
        + b"tR."
    )
    torch.save({"optimizer": code}, folders["code in the common part"] / "common.pt")
    messages = spawn(_refusals, 1, (runs["model"], other, {**folders, "whole": saved}), TIMEOUT)[0]
    assert messages.keys() == {*REFUSED, "other model", "other optimizer", "disk full"}
    assert not (tmp_path / "code_ran").exists()
    assert "posix.system" in messages["code in a pickle"]
    assert "filesystem.os.system" in messages["code by a dotted name"]
    assert "posix.system" in messages["code in the common part"]
    assert not [message for message in messages.values() if "\n" in message]
    assert re.search(r"its hidden is 64, that of .* is 128", messages["other model"])
    assert "distributed_optimizer" in messages["other optimizer"]
    assert "the disk is full" in messages["disk full"]
    for name in REFUSED:
        assert str(folders[name]) in messages[name]
