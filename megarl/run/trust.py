"""Run directories of others: a run's config.yaml names code, which is imported only if the run is yours.

A run is yours if its folder and its config.yaml belong to your user, and not everybody may write to them. A folder that
you have downloaded or unpacked belongs to you: the file system does not know who made it.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from megarl.config import Settings
from megarl.errors import UserError

CODE = (
    "reward.function",
    "rollout.servers.python",
    "rollout.servers.flags",
    "rollout.servers.addresses",
    "rollout.servers.api_key_env",
)
"""The settings that name code, or where secrets and prompts are sent."""
OURS = "megarl.rewards."
CONFIG = "config.yaml"


def check(place: Path, settings: Settings, overrides: list[str] | None, trusted: bool) -> None:
    """Raise UserError if `place`, a run directory or a file, is a run of somebody else whose settings name code.

    `settings`: as loaded from there. What `overrides` set is the user's own.
    """
    folder = place if place.is_dir() else place.parent
    named = list(_code(settings, overrides or []))
    if trusted or not named or not (place.is_dir() or _is_run(place)):
        return
    for path in (folder, folder / CONFIG):
        status = path.stat()
        if status.st_uid != os.geteuid():
            whose = f"belongs to {_name(status.st_uid)}"
        elif status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            whose = "can be written by everybody"
        else:
            continue
        raise UserError(
            f"run: {path} {whose}, and {CONFIG} names code: {', '.join(named)}; read it, then add --trust-run, or "
            f"set {named[0].partition('=')[0]} yourself"
        )


def _code(settings: Settings, overrides: list[str]) -> Iterator[str]:
    own = {text.partition("=")[0] for text in overrides}
    for key in CODE:
        value = attrgetter(key)(settings)
        if value and key not in own and not (key == "reward.function" and value.startswith(OURS)):
            yield f"{key}={value}"


def _is_run(file: Path) -> bool:
    """Whether a YAML file is the resolved configuration of a run."""
    beside = ("metrics.jsonl", "checkpoints", "rollouts", "provenance.json")
    return file.name == CONFIG and any((file.parent / name).exists() for name in beside)


def _name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
