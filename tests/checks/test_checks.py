"""What is refused before anything is started: exact numbers, the setting to change, every mistake at once, no file."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from megarl import cli, config, launch
from megarl.checks import data, folder, reward
from megarl.checks import settings as checks
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.models.shape import ModelShape
from megarl.run import room
from megarl.run.directory import RunDirectory
from megarl.run.records import recorded
from megarl.runtime import device

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
REASONER = QUICKSTART / "reasoner"
LONGEST = 9  # tokens of the longest training prompt


def settings(run: Path, *overrides: str) -> config.Settings:
    base = [f"run={run}", f"model.path={REASONER}", "data.eval=[]", f"data.train=[{QUICKSTART}/problems/train.jsonl]"]
    return config.load(QUICKSTART / "train.yaml", [*base, *overrides])


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["megarl", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_every_mistake_is_told_at_once_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row too small, too few positions, a misspelled reward, a missing tracker, an impossible folder: a line each,
    code 2, in a dry run and in a real one; no process and no file."""
    (tmp_path / "file").touch()
    file = tmp_path / "c.yaml"
    wanted = settings(
        tmp_path / "file" / "run", "batch.tokens_per_row=100", "rollout.max_response_tokens=600",
        "reward.function=examples.quickstart.search_verify:grad", "parallel.tp=3",
    )  # fmt: skip
    file.write_text(config.dump(wanted))
    monkeypatch.setattr(launch, "spawn", lambda *_: pytest.fail("ranks were started"))
    for words in (["train", str(file), "--dry-run"], ["train", str(file)]):
        assert command(monkeypatch, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        for setting in ("parallel.tp: 3", "batch.tokens_per_row: 100", "rollout.max_response_tokens: 600", "'grade'"):
            assert len([line for line in lines if setting in line and line.startswith("megarl: ")]) == 1, setting
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.yaml", "file"]


def test_a_dry_run_shows_a_prompt_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text as the model gets it, and its tokens; all of it, and no folder."""
    assert launch.train(settings(tmp_path / "run"), dry_run=True) == []
    shown = " ".join(capsys.readouterr().err.split())
    table = AutoTokenizer.from_pretrained(REASONER)
    assert "first prompt" in shown and "<think>" in shown and "its tokens" in shown
    assert f"{table(' <think>')['input_ids'][-1]} ' <think>'" in shown
    assert "GiB for checkpoints" in shown and "right for a made-up" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_row_takes_the_longest_prompt_and_a_full_response(tmp_path: Path) -> None:
    """Equality passes, since a sequence's last token is no input; one token less is refused with both remedies."""
    shape = read_shape(REASONER)
    fits = LONGEST + 160 - 1
    assert (
        f"up to {LONGEST} tokens"
        in data.prompts(settings(tmp_path, f"batch.tokens_per_row={fits}"), shape)["data.train"]
    )
    with pytest.raises(UserError) as caught:
        data.prompts(settings(tmp_path, f"batch.tokens_per_row={fits - 1}"), shape)
    for word in (f"batch.tokens_per_row: {fits - 1}", f"at least {fits}", "max_response_tokens to at most 159"):
        assert word in str(caught.value)


def test_the_defaults_fit_each_other() -> None:
    """The longest prompt that is read, with a full response, fits a row."""
    prompt = config.Data(train=[]).max_prompt_tokens
    assert prompt + config.Rollout().max_response_tokens - 1 <= config.Batch().tokens_per_row


def test_positions_are_enough_for_training_and_evaluation(tmp_path: Path) -> None:
    """The reasoner has 512."""
    shape = read_shape(REASONER)
    held_out = f"data.eval=[{QUICKSTART}/problems/heldout.jsonl]"
    data.prompts(settings(tmp_path, f"rollout.max_response_tokens={512 - LONGEST}"), shape)
    with pytest.raises(
        UserError, match=f"rollout.max_response_tokens: 504 .* 512 positions .* at most {512 - LONGEST}"
    ):
        data.prompts(settings(tmp_path, "rollout.max_response_tokens=504"), shape)
    with pytest.raises(UserError, match="evaluation.max_response_tokens: 600 .*data.eval.* 512 positions"):
        data.prompts(settings(tmp_path, held_out, "evaluation.max_response_tokens=600"), shape)


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    found = data.prompts(
        settings(tmp_path, f"data.eval=[{QUICKSTART}/problems/train.jsonl]"), read_shape(REASONER)
    )["data.eval"]  # fmt: skip
    kept = found.split()[0]
    assert found.endswith(f"; {kept} of them are also training prompts")


def test_a_token_added_to_the_tokenizer_alone_is_refused(tmp_path: Path) -> None:
    """By the data's check, for training and for demonstrations."""
    model = tmp_path / "m"
    shutil.copytree(REASONER, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.save_pretrained(model)
    rows = tmp_path / "a.jsonl"
    rows.write_text(json.dumps({"prompt": "9 10 -> 4", "answer": "4", "response": "<new> 9"}) + "\n")
    wanted, shape = settings(tmp_path, f"model.path={model}", f"data.train=[{rows}]"), read_shape(REASONER)
    data.prompts(wanted, shape)
    with pytest.raises(UserError, match="a.jsonl:1: token 36 .*vocabulary of 36"):
        data.demonstrations(wanted, shape)
    rows.write_text(json.dumps({"prompt": "<new> 9 10 -> 4", "answer": "4"}) + "\n")
    with pytest.raises(UserError, match="a.jsonl:1: token 36 .*vocabulary of 36"):
        data.prompts(wanted, shape)


def test_demonstrations_are_read_in_the_dry_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.jsonl:1: response missing"):
        launch.sft(settings(tmp_path / "run"), None, resume=False, dry_run=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_such_module:grade", "cannot import no_such_module"),
        ("math:grade", "math has no function 'grade'"),
        ("os:getcwd", "must take"),
        ("tests.support.graders:hang", "fails on a made-up response: no verdict within 0.5 s"),
    ],
)
def test_the_reward_is_called_in_its_own_process(tmp_path: Path, function: str, words: str) -> None:
    """A function that is not there, has another signature, or hangs."""
    wanted = settings(tmp_path, f"reward.function={function}", "reward.timeout=0.5")
    with pytest.raises(UserError, match=f"reward.function: .*{words}"):
        reward.tried(wanted, wanted.data.train)


def test_servers_are_checked_before_they_are_started(tmp_path: Path) -> None:
    for overrides, words in [
        (["rollout.engine=vllm", "rollout.servers.python=/no/python"], "rollout.servers.python: /no/python"),
        (["rollout.servers.addresses=['http://a:1']", "rollout.servers.api_key_env=NO_SUCH"], "NO_SUCH is not set"),
        (["rollout.servers.addresses=['http://a:1']", "rollout.servers.attempt_timeout=9999"], "attempt_timeout: 9999"),
    ]:
        with pytest.raises(UserError, match=words):
            launch.preflight(settings(tmp_path / "run", *overrides), 2, resume=False)


def test_the_folder_must_be_free_writable_and_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in any of them."""
    shape = read_shape(REASONER)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for run, words in [
        (tmp_path / "file", "cannot be made: .*file is not a folder"),
        (tmp_path / "file" / "run", "cannot be made: .*file is not a folder"),
        (tmp_path / "link" / "run", "cannot be made: .*link is not a folder"),
        (Path("/proc/run"), "/proc/run cannot be written"),
    ]:
        with pytest.raises(UserError, match=f"run: .*{words}"):
            folder.check(settings(run), shape, resume=False)
    assert "GiB" in folder.check(settings(tmp_path / "a" / "b"), shape, resume=False)
    needed = room.needed(settings(tmp_path), shape.parameters())
    for free, fits in [(needed, True), (needed - 1, False)]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if fits:
            folder.check(settings(tmp_path), shape, resume=False)
        else:
            with pytest.raises(UserError, match="run: .* need .* GiB, .*checkpoint.keep"):
                folder.check(settings(tmp_path), shape, resume=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_the_room_is_that_of_the_checkpoints_to_come(tmp_path: Path) -> None:
    """keep + 1, but never more than the run saves, and less what a resumed run has."""
    wanted = settings(tmp_path, "steps=10", "checkpoint.every=2", "checkpoint.keep=2")
    assert room.needed(wanted, 100) == 3 * 100 * 16
    assert room.needed(settings(tmp_path, "steps=10", "checkpoint.every=0"), 100) == 100 * 16
    assert room.needed(settings(tmp_path, "checkpoint.every=0", "checkpoint.optimizer=false"), 100) == 100 * 4
    assert room.needed(settings(tmp_path, "checkpoint.every=0", "precision.dtype=bf16"), 100) == 100 * 14
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert room.needed(wanted, 100, resume=True) == 100 * 16


def test_a_run_that_failed_before_its_first_step_may_start_anew(tmp_path: Path) -> None:
    """Its folder has settings and an empty table of metrics; without --resume it is no run yet."""
    wanted = settings(tmp_path / "run")
    RunDirectory(wanted.run, wanted, None).close()
    assert (wanted.run / "metrics.jsonl").is_file() and not recorded(wanted.run)
    folder.check(wanted, read_shape(REASONER), resume=False)
    opened = RunDirectory(wanted.run, wanted, None)
    opened.metrics(0, {"reward": 1.0})
    opened.close()
    with pytest.raises(UserError, match="already has a run; add --resume"):
        folder.check(wanted, read_shape(REASONER), resume=False)
    folder.check(wanted, read_shape(REASONER), resume=True)


def test_what_is_seldom_meant_is_noted(tmp_path: Path) -> None:
    """A warm-up longer than the run, and a decay that a resume stretches, with the rates that follow."""
    assert checks.notes(settings(tmp_path), resume=False) == []
    [note] = checks.notes(settings(tmp_path, "steps=10", "optimizer.warmup_steps=40", "optimizer.lr=1e-4"), False)
    assert "optimizer.warmup_steps: 40" in note and "10 updates" in note and "2.5e-05" in note
    (tmp_path / "checkpoints" / "step_000010").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(config.dump(settings(tmp_path, "steps=20", "optimizer.decay=cosine")))
    resumed = settings(tmp_path, "steps=40", "optimizer.decay=cosine", "optimizer.lr=1e-4")
    [note] = checks.notes(resumed, resume=True)
    assert "steps: 40" in note and "started with 20" in note and "8.54e-05 instead of 5e-05" in note
    assert checks.notes(settings(tmp_path, "steps=40"), resume=True) == []


@pytest.mark.parametrize(("size", "noted"), [(1.7e9, False), (4e9, True)])
def test_a_large_model_in_the_embedded_engine_on_cuda_is_noted(
    size: float, noted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never on a CPU, where nothing is faster, and not for servers."""
    monkeypatch.setattr(ModelShape, "parameters", lambda _: size)
    assert checks.notes(settings(tmp_path), resume=False) == []
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    found = checks.notes(settings(tmp_path), resume=False)
    assert len(found) == noted and all("rollout.engine: local, for a model of 4.0B" in note for note in found)
    assert checks.notes(settings(tmp_path, "rollout.engine=sglang"), resume=False) == []


def test_the_date_of_a_template_is_frozen_in_the_runs_settings(tmp_path: Path) -> None:
    """A resumed run takes the recorded one; a template without a date needs none."""
    model = tmp_path / "m"
    shutil.copytree(REASONER, model)
    run = tmp_path / "run"
    plain = settings(run, f"model.path={model}")
    checks.freeze_date(plain, resume=False)
    assert plain.data.template_date is None
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }} {{ messages[0].content }}")
    started = settings(run, f"model.path={model}")
    checks.freeze_date(started, resume=False)
    assert started.data.template_date == date.today()
    run.mkdir()
    recorded = yaml.safe_load(config.dump(started))
    recorded["data"]["template_date"] = "2024-07-26"
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    resumed = settings(run, f"model.path={model}")
    checks.freeze_date(resumed, resume=True)
    assert resumed.data.template_date == date(2024, 7, 26)
