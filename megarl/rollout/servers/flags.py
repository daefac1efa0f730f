"""The flags of servers that a run would start, read by the engine's own parser before anything is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from megarl.config import Settings
from megarl.errors import DeadlineExceeded, RunError, UserError
from megarl.rollout.in_engine import megarl_flags
from megarl.rollout.servers import factory, reaper
from megarl.rollout.servers.process import free_port, inherited

DEADLINE = 180.0  # seconds; an engine takes 5 to 15 to import what its parser needs


def checked(settings: Settings) -> str:
    """What became of `rollout.servers.flags`, in a few words. With `addresses` too, for `megarl serve` uses them then.

    Raises UserError for flags that the engine refuses, or when its interpreter cannot run it; DeadlineExceeded.
    """
    rollout, servers = settings.rollout, settings.rollout.servers
    if not servers.flags:
        return "none"
    if rollout.embedded:
        return "not used: the engine is embedded"
    factory.check_flags(servers.flags)
    python = factory.python_of(rollout)
    if not python.is_file():
        return f"not checked: {python} does not exist"
    line, environment = factory.command_of(settings)(free_port()), factory.environment_of(rollout, api_key=None)
    try:
        refused = refusal(rollout.engine, line, environment)
    except DeadlineExceeded:
        raise
    except RunError as e:
        raise UserError(f"rollout.servers.python: {python}: {e}") from None
    if refused:
        raise UserError(f"rollout.servers.flags: {rollout.engine}: {refused}")
    return f"{' '.join(servers.flags)}: read by {rollout.engine}'s own parser"


def refusal(name: str, line: Sequence[str], environment: Mapping[str, str], deadline: float = DEADLINE) -> str | None:
    """Why the parser of the server `name` refuses the command line `[interpreter, program, flags …]`, with the nearest
    flag; None when it takes it.

    Raises RunError with the program's last line when it ends before it reads flags, DeadlineExceeded after `deadline`
    seconds. No process is left.
    """
    ours, held = os.pipe()
    with (
        os.fdopen(ours) as asked,
        subprocess.Popen(
            [sys.executable, reaper.__file__, line[0], megarl_flags.__file__, *line[1:]],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**inherited(), **environment},
        ) as process,
        os.fdopen(held, "wb"),  # closed however we end: the keeper's signal
    ):
        try:
            answer, told = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{name} to read its flags", deadline) from None
    if not answer:
        last = told.decode("utf-8", "replace").strip().rpartition("\n")[2].strip()
        raise RunError(f"the server ended before it read its flags: {last or f'exit code {process.returncode}'}")
    found = json.loads(answer)
    if "refused" not in found:
        return None
    message = " ".join(found["refused"].split())
    return message + (hint(message, found["options"]) if message.startswith("unrecognized arguments") else "")


def hint(message: str, options: Iterable[str]) -> str:
    """The known flag nearest to the first that the message names, where one is near."""
    name = next((word.partition("=")[0] for word in message.split() if word.startswith("-")), "")
    bare = {option.strip("-"): option for option in options}
    close = get_close_matches(name.strip("-"), bare, n=1)
    return f" (did you mean '{bare[close[0]]}'?)" if close else ""
