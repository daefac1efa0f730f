"""Every script of slurm/ asks for the nodes that its configuration needs. Needs no Slurm: part of `make test`.

The models' published config.json stand in for the models, a byte-level tokenizer for theirs, two problems for the data.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarl import config, launch
from megarl.models.config_json import read_shape
from megarl.planner.hardware import gpu
from megarl.planner.job import plan

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TRAINING = [script for script in SCRIPTS if script.stem.startswith("train_")]
PUBLISHED = json.loads((ROOT / "tests/checkpoints_conv/published_configs.json").read_text())
RESOLVED = json.loads((Path(__file__).parent / "resolved.json").read_text())
GPUS = 8  # of a node


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, and a tokenizer to copy beside each model's configuration."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "problems.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "2?", "answer": "2"}\n')
    alphabet = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["</think>"]})
    fast.save_pretrained(folder)
    return folder


def settings_of(script: Path, files: Path) -> config.Settings:
    """What the script trains, with stand-ins for what is not in the repository."""
    name = re.search(r"launch\.sh train (\S+)", script.read_text())
    assert name, script
    path = ROOT / name[1]
    model = config.load(path).model.path.name
    (files / "config.json").write_text(json.dumps(PUBLISHED[model]))
    problems = f"[{files / 'problems.jsonl'}]"
    servers = f"rollout.servers.addresses=[{', '.join(['http://node:1'] * engine_servers(script))}]"
    place = [
        servers,
        f"model.path={files}",
        "model.weights=random",
        f"data.train={problems}",
        f"data.eval={problems}",
        f"run={files / 'run'}",
    ]
    return config.load(path, place)


def engine_servers(script: Path) -> int:
    """Nodes of the engines, times the servers of each."""
    nodes, each = (
        int(re.search(rf"{name}:-(\d+)", script.read_text())[1]) for name in ("ENGINE_NODES", "ENGINES_PER_NODE")
    )  # type: ignore[index]
    return nodes * each


def learner_ranks(script: Path) -> int:
    """Nodes of the script, less those of its engines, times the GPUs of a node."""
    text = script.read_text()
    nodes = int(re.search(r"^#SBATCH --nodes=(\d+)$", text, re.M)[1])  # type: ignore[index]
    engines = int(re.search(r"ENGINE_NODES:-(\d+)", text)[1])  # type: ignore[index]
    assert f"#SBATCH --gpus-per-node={GPUS}" in text
    return (nodes - engines) * GPUS


def test_the_promised_scripts_are_there() -> None:
    models_ = ["4b", "8b", "32b", "30b_a3b", "235b_a22b"]
    assert {s.name for s in TRAINING} == {f"train_qwen3_{m}.sh" for m in models_}
    assert {s.name for s in SCRIPTS} >= {"launch.sh", "environment.sh", "convert.sh", "eval.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_scripts_are_bash(script: Path) -> None:
    """Syntax alone; tests/slurm/test_jobs.py runs them."""
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", [name for name in RESOLVED if name != "all"])
def test_the_configurations_come_to_what_they_are_known_to_be(name: str) -> None:
    """Recipe, base and file resolved: every setting that is not a default. A change of a recipe, of the base or of a
    default that reaches the clusters must be meant, and made in resolved.json too."""
    settings = config.load(ROOT / "slurm" / "configs" / f"{name}.yaml")
    defaults = config.parse({"run": "r", "model": {"path": "m"}, "data": {"train": ["t"]}})
    plain = dict(flat(defaults.model_dump(mode="json")))
    chosen = {key: value for key, value in flat(settings.model_dump(mode="json")) if value != plain[key]}
    assert chosen == RESOLVED["all"] | RESOLVED[name]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.stem)
def test_dry_run_passes_on_the_scripts_ranks(
    script: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`megarl train --dry-run` with as many ranks as the script's learner nodes have GPUs: layout, batch, markers and
    data are accepted. Not that the run learns: nothing of it has been run."""
    for name in ("SLURM_STEP_NUM_TASKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    free = shutil.disk_usage("/")._replace(free=10**15)  # a cluster's file system
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    ranks = learner_ranks(script)
    launch.train(settings_of(script, files), ranks, resume=False, dry_run=True)
    assert f"{ranks} ranks" in capsys.readouterr().err


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.stem)
def test_plan_says_that_it_fits(script: Path, files: Path) -> None:
    """As `megarl plan` on H100s, by its formulas alone (the command also counts the real model's parameters)."""
    settings = settings_of(script, files)
    assert plan(settings, read_shape(settings.model.path), gpu("h100"), learner_ranks(script), None).fits


@pytest.mark.parametrize("script", TRAINING, ids=lambda s: s.stem)
def test_engines_have_whole_devices(script: Path, files: Path) -> None:
    """The servers of a node, times the devices that each one's flags ask for, are the node's."""
    flags = settings_of(script, files).rollout.servers.flags
    each = int(flags[flags.index("--tp-size") + 1])
    per_node = int(re.search(r"ENGINES_PER_NODE:-(\d+)", script.read_text())[1])  # type: ignore[index]
    assert each * per_node == GPUS
