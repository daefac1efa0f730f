"""Supervised fine-tuning end to end on the quick start's reasoner: the loss falls, layouts agree, the export is what
was trained. Whether the taught reasoner solves problems is the README's figure, not this test's."""

import json
import os
import shutil
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart.make_problems import write_jsonl
from examples.quickstart.search_verify import lesson_rows
from megarl.config import Settings, load
from megarl.data.demonstrations import Demonstration, read_demonstrations
from megarl.errors import UserError
from megarl.learner.learner import Learner
from megarl.runtime.spawn import spawn
from megarl.sft import Lesson, draw_order, sft
from megarl.view.progress import RunProgress

REASONER = Path("examples/quickstart/reasoner")


def settings(folder: Path, **overrides: object) -> Settings:
    lesson = folder / "lesson.jsonl"
    if not lesson.exists():
        write_jsonl(lesson, lesson_rows(400, seed=0))
    changes = {
        "run": folder / "run",
        "data.train": f"[{lesson}]",
        "steps": 10,
        "batch.prompts_per_step": 16,
        **overrides,
    }
    return load(Path("examples/quickstart/sft.yaml"), [f"{key}={value}" for key, value in changes.items()])


def metrics(given: Settings) -> list[dict[str, float]]:
    lines = map(json.loads, (given.run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("seconds")} for line in lines]


def run(given: Settings, nproc: int) -> list[float]:
    spawn(sft, nproc, (given,), timeout=240.0)
    return [line["loss"] for line in metrics(given)]


def likelihood(model: torch.nn.Module, rows: list[Demonstration]) -> tuple[float, int]:
    """By transformers: the negative log-likelihood of all responses, and how many tokens they have."""
    nll, tokens = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.token_ids).long()
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        nll -= float(logprobs.gather(1, ids[1:, None])[row.response_start - 1 :].sum())
        tokens += len(ids) - row.response_start
    return nll, tokens


@pytest.mark.slow
@pytest.mark.parallel
def test_the_command_learns_alike_at_tp_1_and_2(tmp_path: Path) -> None:
    """From random weights (loss ln 36 = 3.58) ten updates bring the loss well down, the same at both sizes."""
    quick = {"optimizer.warmup_steps": 2, "optimizer.decay": "constant"}
    two = run(settings(tmp_path, run=tmp_path / "two", **{"parallel.tp": 2}, **quick), 2)
    one = run(settings(tmp_path, run=tmp_path / "one", steps=3, **quick), 1)
    assert len(two) == 10
    assert 3.3 < two[0] < 4.2
    assert two[-1] < 0.75 * two[0]
    assert one == pytest.approx(two[:3], abs=1e-5)


@pytest.mark.parallel
@pytest.mark.slow
def test_the_export_is_the_trained_model(tmp_path: Path) -> None:
    """One update on the shipped weights at a rate too small to see: the loss in the metrics is transformers' own on
    the exported folder, and the folder has tokenizer and configuration, one file of weights, no leftovers."""
    given = settings(
        tmp_path, steps=1, **{"model.weights": "pretrained", "optimizer.lr": 1e-12, "optimizer.min_lr": 0.0}
    )
    (loss,) = run(given, 2)
    folder = given.run / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    companions = {file.name for file in REASONER.iterdir() if file.is_file() and file.suffix != ".safetensors"}
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", *companions}
    assert [path.name for path in given.run.iterdir() if path.suffix == ".partial"] == []

    rows, _ = read_demonstrations(given.data.train, AutoTokenizer.from_pretrained(folder), given.data, 2048)
    nll, tokens = likelihood(model, rows[:16])
    assert loss == pytest.approx(nll / tokens, abs=1e-5)


def asked_to_stop(given: Settings) -> bool:
    """Rank 1 alone gets SIGTERM, after the second update."""
    original = Learner.train_step

    def train_step(self: Learner, *arguments: object) -> object:
        found = original(self, *arguments)
        if self.version == 2 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    Learner.train_step = train_step
    return sft(given)


@pytest.mark.parallel
@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    """Proves that the update is finished, its checkpoint written, and that the command says that it is not done."""
    given = settings(tmp_path, **{"parallel.tp": 2})
    assert spawn(asked_to_stop, 2, (given,), timeout=240.0, saves=True) == [False, False]
    assert len((given.run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (given.run / "checkpoints" / "step_000002" / "learner").is_dir()
    assert not (given.run / "model").exists()


def test_the_order_is_the_files_or_a_new_one_each_round() -> None:
    plain, shuffled = draw_order(5, 0, shuffle=False), draw_order(5, 0, shuffle=True)
    assert [next(plain) for _ in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    rounds = [tuple(next(shuffled) for _ in range(5)) for _ in range(6)]
    assert all(sorted(r) == [0, 1, 2, 3, 4] for r in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parallel
@pytest.mark.slow
def test_a_resumed_run_repeats_the_whole_one(tmp_path: Path) -> None:
    """Cut after a checkpoint, with a held-out loss on the way: every figure and the model are equal, bit by bit.

    Other data would give rows twice or never, and is refused. A run that is done writes a lost model again.
    """
    quick = {
        "optimizer.warmup_steps": 2, "steps": 6, "checkpoint.every": 2, "checkpoint.keep": 9, "data.shuffle": True,
        "evaluation.every": 2, "evaluation.limit": 20,
    }  # fmt: skip
    whole = settings(tmp_path, run=tmp_path / "whole", **quick)
    whole.data.eval = list(whole.data.train)
    spawn(sft, 2, (whole,), timeout=240.0)
    cut = whole.model_copy(update={"run": tmp_path / "cut"})
    shutil.copytree(whole.run, cut.run)
    shutil.rmtree(cut.run / "model")
    for step in (4, 6):
        shutil.rmtree(cut.run / "checkpoints" / f"step_{step:06d}")
    spawn(sft, 2, (cut, True), timeout=240.0)
    assert metrics(cut) == metrics(whole)
    assert [line["step"] for line in metrics(whole) if "eval/loss" in line] == [0, 2, 4, 6]
    models = [(given.run / "model" / "model.safetensors").read_bytes() for given in (whole, cut)]
    assert models[0] == models[1]

    shutil.rmtree(cut.run / "model")
    spawn(sft, 1, (cut, True), timeout=240.0)
    assert (cut.run / "model" / "model.safetensors").read_bytes() == models[0]
    with pytest.raises(UserError, match="seed: differs"):
        spawn(sft, 1, (cut.model_copy(update={"seed": 9}), True), timeout=240.0)


@pytest.mark.slow
@pytest.mark.parallel
def test_the_held_out_loss_is_transformers_own(tmp_path: Path) -> None:
    """Before the first step, on the shipped weights: the mean over the response tokens of `data.eval`."""
    more = {"model.weights": "pretrained", "steps": 1, "evaluation.limit": 12, "rollout.temperature": 0.5}
    given = settings(tmp_path, **more)
    given.data.eval = list(given.data.train)
    spawn(sft, 2, (given,), timeout=240.0)
    rows, _ = read_demonstrations(given.data.eval, AutoTokenizer.from_pretrained(REASONER), given.data, 2048)
    nll, tokens = likelihood(AutoModelForCausalLM.from_pretrained(REASONER), rows[:12])
    assert metrics(given)[0] == {"step": 0, "eval/loss": pytest.approx(nll / tokens, abs=1e-5)}


def test_a_later_start_goes_on_in_the_same_order() -> None:
    """A resumed run begins in the middle of a round."""
    whole = list(islice(draw_order(5, 3, shuffle=True), 20))
    for start in range(12):
        assert list(islice(draw_order(5, 3, shuffle=True, start=start), 8)) == whole[start : start + 8]


def test_steps_take_each_demonstration_in_turn(tmp_path: Path) -> None:
    given = settings(tmp_path)
    lesson = Lesson(given, AutoTokenizer.from_pretrained(REASONER), 1, RunProgress(10, quiet=True))
    taken = [sample.token_ids.tolist() for step in (1, 2, 3) for sample in lesson.batch(step).samples]
    assert taken == [row.token_ids.tolist() for row in lesson.demonstrations[: 3 * given.batch.prompts_per_step]]
