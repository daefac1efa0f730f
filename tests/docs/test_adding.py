"""The pages on adding things, followed to the letter in a copy of the source, end in training steps that use what was
added. Not proven: that these steps learn (tests/e2e/test_learns.py), nor anything of SGLang's or vLLM's side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import pages

pytestmark = pytest.mark.slow

DOCS, QUICKSTART = pages.ROOT / "docs", pages.ROOT / "examples" / "quickstart"
PAGES = [DOCS / f"add_{name}.md" for name in ("reward", "algorithm", "engine", "model_family")]
SMALL = (
    "steps=1", "parallel.tp=1", "data.eval=[]", "checkpoint.every=0", "rollout.max_response_tokens=24",
    "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}", "rollout.early_exit.enabled=false",
    "reward.shaping=none", "collective_timeout=240", "rollout.timeout=240", "pruning.drop_zero_variance=false",
)  # fmt: skip
RUNS = {
    "reward_and_algorithm": ["reward.function=my_rewards:last_number", "algorithm.preset=sign"],
    "engine": ["rollout.engine=scripted", "rollout.canary_limit=1000", "rollout.mismatch_limit=1000"],
    "family": ["model.path=mistral"],
}
DRIVER = '''
"""Everything in one process, for importing Megatron takes most of the time: this process is the only rank."""
import json, os, socket, sys
import torch
from transformers import MistralConfig, MistralForCausalLM
from checkpoints_conv.cli import app as convert
from megarl.cli import app

sizes, vocabulary, runs = json.loads(sys.argv[1])
torch.manual_seed(0)
MistralForCausalLM(MistralConfig(vocab_size=vocabulary, sliding_window=None, dtype="float32", **sizes)).save_pretrained("mistral")
for command in (["hf-to-megatron", "mistral", "out", "tp=2"], ["megatron-to-hf", "out", "back", "--config", "mistral"],
                ["verify", "mistral", "back"]):
    convert(command, standalone_mode=False)
for run in runs:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    app(["train", "examples/quickstart/train.yaml", *run], standalone_mode=False)
'''  # noqa: E501
TIMEOUT = 280.0
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source in which all pages were followed, and one step was trained with what each of them adds."""
    tree = tmp_path_factory.mktemp("added")
    for folder in ("megarl", "checkpoints_conv", "examples"):
        shutil.copytree(pages.ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    [(_, family)] = pages.python(pages.ROOT / "checkpoints_conv" / "README.md")
    (tree / "megarl" / "models" / "families" / "mistral.py").write_text(family)
    for page in PAGES:
        for name, code in pages.python(page):
            if name:
                (tree / name).write_text(code)
        for edit in pages.edits(page):
            edit.apply(tree)
    (tree / "mistral").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / "reasoner" / file, tree / "mistral")
    vocabulary = json.loads((QUICKSTART / "reasoner" / "config.json").read_text())["vocab_size"]
    runs = [[f"run={name}", *SMALL, *overrides] for name, overrides in RUNS.items()]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", DRIVER, json.dumps([TINY, vocabulary, runs])], cwd=tree,
                          env=environment, capture_output=True, text=True, timeout=TIMEOUT)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return tree


def rollouts(tree: Path, run: str) -> list[dict[str, Any]]:
    return [json.loads(t) for t in (tree / run / "rollouts" / "step_000001.jsonl").read_text().splitlines()]


def figures(tree: Path, run: str) -> dict[str, Any]:
    return json.loads((tree / run / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_runs_are_the_pages_commands() -> None:
    """The last `megarl train CONFIG …` of each page; a model of its own stands for MODEL."""
    given = {word for overrides in RUNS.values() for word in (*SMALL, *overrides)}
    for page in PAGES:
        *_, words = (words for words in pages.commands(page) if words[0] == "train")
        assert {word.replace("=MODEL", "=mistral") for word in words[2:]} <= given, page.name


def test_the_reward_gives_the_verdicts(tree: Path) -> None:
    """Each is what the page's function says of the response; the page's own trial of it passes."""
    [(_, code), (_, trial)] = pages.python(DOCS / "add_reward.md")
    space: dict[str, Any] = {}
    exec(code, space)
    for rollout in rollouts(tree, "reward_and_algorithm"):
        right = space["last_number"](rollout["response"], rollout["answer"])
        assert rollout["verdict"] == ("right" if right else "wrong")
    environment = os.environ | {"PYTHONPATH": f"{tree}:{pages.ROOT}"}
    assert subprocess.run([sys.executable, "-c", trial], cwd=tree, env=environment, timeout=TIMEOUT).returncode == 0


def test_the_algorithm_gives_the_advantages(tree: Path) -> None:
    made = rollouts(tree, "reward_and_algorithm")
    for rollout in made:
        group = [other["reward"] for other in made if other["uid"] == rollout["uid"]]
        centred = rollout["reward"] - sum(group) / len(group)
        assert rollout["advantage"] == pytest.approx((centred > 1e-9) - (centred < -1e-9))


def test_the_engine_writes_the_completions(tree: Path) -> None:
    """Every one is its script, sampled under the weights of the first sync."""
    made = rollouts(tree, "engine")
    assert len(made) == 16
    assert {rollout["response"].split("<eos>")[0].strip() for rollout in made} == {"no"}
    assert {tuple(map(tuple, r["spans"])) for r in made} == {((0, 0, len(made[0]["response_ids"])),)}


def test_the_family_trains_as_it_was_meant(tree: Path) -> None:
    """transformers' own Mistral, there and back bit by bit (the driver's `verify`); learner and engine agree on it."""
    assert 0 < figures(tree, "family")["canary_difference"] < 1e-3
    assert figures(tree, "family")["mismatch_mean"] < 1e-4
