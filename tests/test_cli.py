"""The command line: every mistake is one line on stderr that names the setting, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from megarl import cli
from megarl.runtime import device

ROOT = Path(__file__).parents[1]
CONFIG = "examples/quickstart/train.yaml"


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `megarl …`, run in this process from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["megarl", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


ENGINE = ["rollout.engine=sglang", f"rollout.servers.python={sys.executable}"]
MISTAKES = {
    "unknown key": (["optimizer.lrr=1"], ["optimizer.lrr", "'lr'"]),
    "tp over the key/value groups": (["parallel.tp=4"], ["parallel.tp", "4", "2"]),
    "tp that divides nothing": (["parallel.tp=3"], ["parallel.tp", "3"]),
    "pp over the layers": (["parallel.pp=2"], ["parallel.pp", "3 layers"]),
    "vpp over the layers": (["parallel={pp: 3, vpp: 2}"], ["vpp", "2", "1"]),
    "ranks": (["--nproc", "3"], ["3 ranks", "2"]),
    "model folder": (["model.path=nowhere"], ["model.path", "nowhere"]),
    "data file": (["data.train=[examples/quickstart/problems/trian.jsonl]"], ["data.train", "train.jsonl"]),
    "unknown precision": (["precision.dtype=fp4"], ["precision.dtype", "fp4"]),
    "marker": (["rollout.early_exit.markers=[]"], ["markers", "Wait"]),
    "idle switch": (["algorithm.loss_divisor=5"], ["algorithm.loss_divisor"]),
    "engine flags": (
        [*ENGINE, "rollout.servers.flags=[--tp-size=3]", "rollout.early_exit.enabled=false"],
        ["rollout.servers.flags", "size 3", "valid value: 2"],
    ),
    "engine flag and value in one": (
        [*ENGINE, "rollout.servers.flags=['--tp-size 2']", "rollout.early_exit.enabled=false"],
        ["rollout.servers.flags", "two texts"],
    ),
    "prompt limit": (["data.max_prompt_tokens=2"], ["data.max_prompt_tokens", "2", "shortest"]),
    "negative rate": (["pruning.prompts=-1"], ["pruning.prompts", "-1"]),
    "reward module": (["reward.function=no_such:grade"], ["reward.function", "no_such", "ModuleNotFoundError"]),
    "reward arguments": (
        ["reward.function=tests.support.bad_graders:one_argument"],
        ["reward.function", "one_argument", "(response, answer)"],
    ),
    "reward value": (
        ["reward.function=tests.support.bad_graders:no_verdict"],
        ["reward.function", "no_verdict", "returned None", "bool, number or verdict"],
    ),
    "reward coroutine": (["reward.function=tests.support.bad_graders:later"], ["reward.function", "coroutine"]),
    "reward that always fails": (
        ["reward.function=tests.support.bad_graders:broken"],
        ["reward.function", "broken", "made-up response", "NameError"],
    ),
    "reward that hangs": (
        ["reward.function=tests.support.graders:hang", "reward.timeout=0.2"],
        ["reward.function", "hang", "no verdict within 0.2 s"],
    ),
    "hub model": (["model.path=Owner/Model-1B"], ["model.path", "Owner/Model-1B", "hf download Owner/Model-1B"]),
    "name of another trainer": (["num_generations=8"], ["num_generations", "batch.completions_per_prompt"]),
    "option of another trainer": (["--n-samples-per-prompt", "8"], ["batch.completions_per_prompt"]),
    "recipe": (["recipe=step-grpo"], ["recipe", "'step_grpo'"]),
    "config file": (["none.yaml"], ["none.yaml", "does not exist"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_code_2_and_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found before any rank is started or weight is read (`--dry-run` reads the data too). Nothing is downloaded."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    arguments, words = MISTAKES[name]
    run = tmp_path / "run"
    config = [] if arguments[0].endswith(".yaml") else [CONFIG, f"run={run}"]
    assert invoke(monkeypatch, "train", *config, *arguments, "--dry-run") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("megarl: ")
    for word in words:
        assert word in lines[0]
    assert not run.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "1 2 -> 3 <think>", "answer": "1"', ["problems.jsonl:2", "JSON"]),
        ('{"prompt": "1 2 -> 3 <think>"}', ["problems.jsonl:2", "answer"]),
        ('{"answer": "3"}', ["problems.jsonl:2", "prompt"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    line: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = '{"prompt": "1 2 -> 3 <think>", "answer": "1 2 -> 3"}'
    (tmp_path / "problems.jsonl").write_text(f"{good}\n{line}\n")
    arguments = [CONFIG, f"run={tmp_path / 'run'}", f"data.train=[{tmp_path / 'problems.jsonl'}]", "--dry-run"]
    assert invoke(monkeypatch, "train", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()


def test_fp8_without_transformer_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU, which is pretended here: Megatron would accept the setting and ignore it. A CPU emulates FP8."""
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(device, "transformer_engine", lambda: False)
    run = tmp_path / "run"
    assert invoke(monkeypatch, "train", CONFIG, f"run={run}", "precision.dtype=fp8") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for word in ("precision.dtype", "fp8", "Transformer Engine", "bf16"):
        assert word in lines[0]
    assert not run.exists()


def test_a_bad_reward_is_refused_by_a_real_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before ranks start: nothing is written."""
    run = tmp_path / "run"
    for command in (["train"], ["eval", "--temperature", "1"]):
        bad = [CONFIG, f"run={run}", "reward.function=tests.support.bad_graders:broken"]
        assert invoke(monkeypatch, *command, *bad) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "reward.function" in lines[0], lines
    assert not run.exists()


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_a_rope_that_cannot_be_trained_is_refused_before_loading(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """YaRN trains (tests/learner/test_rope.py) and passes. Dynamic scaling does not, and no engine setting helps."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples/quickstart/reasoner", model)
    config = json.loads((model / "config.json").read_text()) | {"rope_parameters": None}
    rope = {"rope_type": kind, "factor": 4.0}
    (model / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    code = invoke(monkeypatch, "train", CONFIG, f"run={tmp_path / 'run'}", f"model.path={model}", "--dry-run")
    lines = capsys.readouterr().err.splitlines()
    if kind == "yarn":
        assert code == 0, lines
    else:
        assert (code, len(lines)) == (2, 1), lines
        assert "config.json: rope_scaling: 'dynamic' is not supported; only default, linear, llama3, yarn" in lines[0]


def test_dry_run_prints_the_derived_sizes_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["megarl", "train", CONFIG, f"run={tmp_path / 'run'}", "--dry-run"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    shown = capsys.readouterr().err
    for word in (
        "tp 2",
        "16 prompts",
        "1024 of 1024 prompts",
        "rule in the map",
        "fits a100-40gb",
        "search_verify:grade: wrong",
    ):
        assert word in shown
    assert not (tmp_path / "run").exists()


def test_recipes_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["megarl", "settings", "--recipe", "step_grpo+dppo"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert "    enabled: true  # " in capsys.readouterr().out
    assert invoke(monkeypatch, "settings", "--recipe", "step_grp") == 2
    assert "'step_grpo'" in capsys.readouterr().err


def test_benchmarks_are_listed_and_misspelled_ones_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(monkeypatch, "bench", "parityy") == 2
    assert "'parity'" in capsys.readouterr().err
