"""`include` and `recipe`: what wins over what, and that mistakes name the file. Every shipped recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megarl import config
from megarl.config import docs, reading
from megarl.errors import UserError

LEAST = {"run": "r", "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}
RECIPES = sorted(file.stem for file in reading.RECIPES.glob("*.yaml"))


def written(file: Path, **tree: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(tree))
    return file


def test_a_file_wins_over_its_includes_and_later_ones_over_earlier(tmp_path: Path) -> None:
    """Sections merge, lists are replaced; includes are relative to the file that has them, at every depth."""
    written(tmp_path / "deep/leaf.yaml", seed=1, steps=1, optimizer={"lr": 1e-3, "min_lr": 1e-4})
    written(tmp_path / "deep/a.yaml", include=["leaf.yaml"], steps=2, data={"train": ["a", "b"]})
    written(tmp_path / "b.yaml", steps=3, optimizer={"lr": 2e-3})
    main = written(tmp_path / "main.yaml", **LEAST, include=["deep/a.yaml", "b.yaml"])
    settings = config.load(main)
    assert (settings.seed, settings.steps) == (1, 3)
    assert (settings.optimizer.lr, settings.optimizer.min_lr) == (2e-3, 1e-4)
    assert settings.data.train == [Path("t.jsonl")]
    assert config.load(main, ["steps=9"]).steps == 9


def test_a_recipe_comes_first_and_the_resolved_file_needs_none(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", pruning={"prompts": 0.1})
    main = written(tmp_path / "main.yaml", **LEAST, recipe="step_grpo + dppo", include=[base.name])
    settings = config.load(main)
    assert settings.rollout.early_exit.enabled and settings.reward.shaping == "step_aware"
    assert (settings.pruning.prompts, settings.pruning.completions) == (0.1, 0.5)
    plain = config.load(main, ["recipe=grpo"])
    assert not plain.rollout.early_exit.enabled and plain.pruning.completions == 0
    (tmp_path / "elsewhere").mkdir()
    resolved = tmp_path / "elsewhere/config.yaml"
    resolved.write_text(config.dump(settings))
    assert not {"recipe", "include"} & yaml.safe_load(resolved.read_text()).keys()
    assert config.load(resolved) == settings
    assert config.parse({**LEAST, "recipe": "dppo"}).pruning.prompts == 0.5


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"include": ["mian.yaml"]}, ["main.yaml: include: ", "mian.yaml does not exist", "'main.yaml'"]),
        ({"include": ["main.yaml"]}, ["main.yaml includes ", "circle"]),
        ({"include": ["back.yaml"]}, ["main.yaml includes ", "back.yaml includes ", "circle"]),
        ({"include": "back.yaml"}, ["include: 'back.yaml'", "include: [base.yaml]"]),
        ({"include": ["list.yaml"]}, ["list.yaml is a list"]),
        ({"recipe": "step_grp"}, ["recipe: ", "'step_grp'", "'step_grpo'"]),
        ({"recipe": "grpo+dpo"}, ["'dpo'", "'dppo'"]),
        ({"recipe": ["grpo"]}, ["recipe: ['grpo']", "step_grpo+dppo"]),
        ({"recipe": "dppo", "pruning": 0.5}, ["pruning: 0.5: "]),
    ],
)
def test_mistakes_name_the_file(tmp_path: Path, tree: dict[str, object], words: list[str]) -> None:
    written(tmp_path / "back.yaml", include=["main.yaml"])
    (tmp_path / "list.yaml").write_text("[1]\n")
    with pytest.raises(UserError) as caught:
        config.load(written(tmp_path / "main.yaml", **LEAST, **tree))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_and_printed_as_it_is(name: str) -> None:
    """The print is YAML with a comment on each setting, and equal to the recipe."""
    config.parse({**LEAST, "recipe": name})
    printed = docs.recipe(name)
    assert yaml.safe_load(printed) == reading.recipe(name)
    for line in printed.splitlines():
        assert line.endswith(":") or "# " in line, line


def test_the_promised_recipes_are_shipped() -> None:
    assert {"grpo", "dr_grpo", "dapo", "gspo", "step_grpo", "dppo"} <= set(RECIPES)
