"""What a resumed run's settings change: it is said, the former settings are kept, and what would break is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megarl import config
from megarl.errors import UserError
from megarl.run.atomic import steps, write_text

CONFIG = "config.yaml"
LEDGER = ("seed", "data.shuffle")
"""Settings that say which prompts have been drawn: another value would repeat some and leave out others."""
GROUPS = ("batch.completions_per_prompt", "data", "reward")
"""Settings, and sections of them, that say what a group and its rewards are: the history of pruning and the curves
would mix two tasks."""
FREE = ("data.train", "data.eval", "reward.workers", "reward.timeout")
"""Of these sections, what only says where something is and how fast it is done. The data's text is compared too."""


def check(settings: config.Settings, allowed: bool) -> None:
    """Compare with the settings of the run to resume. Raises UserError for what it cannot continue under.

    `allowed`: let the groups and their rewards change.
    """
    if not steps(settings.run / "checkpoints"):
        return  # nothing is kept: the run starts from its beginning
    changes = changed(settings.run, settings)
    for key, (before, now) in changes.items():
        if key in LEDGER:
            raise UserError(f"{key}: {now}, but the run to resume has {before}; prompts would be repeated")
        if not allowed and key not in FREE and any(f"{key}.".startswith(f"{part}.") for part in GROUPS):
            raise UserError(
                f"{key}: {_short(now)}, but the run to resume has {_short(before)}; give it its former value, name "
                "another run folder, or add --allow-changes to let the task change in the middle of the run"
            )


def changed(folder: Path, settings: config.Settings) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from those in the folder's config.yaml: (before, now) by name. The run's own place, and
    settings that only one of the two knows, are left out."""
    file = folder / CONFIG
    if not file.is_file():
        return {}
    before, now = dict(flat(config.tree(file))), dict(flat(yaml.safe_load(config.dump(settings))))
    return {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key] and key != "run"}


def keep_former(folder: Path, settings: config.Settings, step: int) -> str | None:
    """Keep the config.yaml that was in force until `step` under another name, if it differs. What to say about it."""
    changes = changed(folder, settings)
    if not changes:
        return None
    former = folder / f"config_until_step_{step:06d}.yaml"
    said = ", ".join(f"{key} {_short(before)} → {_short(now)}" for key, (before, now) in changes.items())
    if not step:
        return f"settings changed before the first checkpoint: {said}"
    if not former.exists():  # else this step was resumed from before: what was in force until it is kept already
        write_text(former, (folder / CONFIG).read_text(encoding="utf-8"))
    return f"settings changed after step {step}: {said}; the former ones are in {former.name}"


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a tree as its dotted key and its value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
