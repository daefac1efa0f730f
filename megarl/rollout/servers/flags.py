"""Checks the flags of the servers that a run would start, with the engine's own parser, before anything is started."""

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

TIMEOUT = 180.0  # seconds; an engine takes 5 to 15 to import what its parser needs


def checked(settings: Settings) -> str:
    """Check `rollout.servers.flags` and describe the result in a few words.

    Also with `addresses`, because `megarl serve` uses the flags then. Raises UserError if the engine refuses a flag or
    its interpreter cannot run it, and DeadlineExceeded.
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


def refusal(name: str, line: Sequence[str], environment: Mapping[str, str], timeout: float = TIMEOUT) -> str | None:
    """Why the server `name` refuses the command line `[interpreter, program, flags …]`, with the nearest flag. None if
    it accepts the line.

    Raises RunError with the program's last line if it exits before it reads its flags, and DeadlineExceeded after
    `timeout` seconds. Leaves no process behind.
    """
    reader, writer = os.pipe()
    with (
        os.fdopen(reader) as stdin,
        subprocess.Popen(
            [sys.executable, reaper.__file__, line[0], megarl_flags.__file__, *line[1:]],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**inherited(), **environment},
        ) as process,
        os.fdopen(writer, "wb"),  # closes when we leave, however that happens: the reaper then ends the program
    ):
        try:
            answer, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(f"{name} to read its flags", timeout) from None
    if not answer:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2].strip()
        raise RunError(f"the server ended before it read its flags: {last or f'exit code {process.returncode}'}")
    found = json.loads(answer)
    if "refused" not in found:
        return None
    message = " ".join(found["refused"].split())
    return message + (hint(message, found["options"]) if message.startswith("unrecognized arguments") else "")


def hint(message: str, options: Iterable[str]) -> str:
    """Suggests the known flag nearest to the first flag in the message, if one is near."""
    name = next((word.partition("=")[0] for word in message.split() if word.startswith("-")), "")
    bare = {option.strip("-"): option for option in options}
    close = get_close_matches(name.strip("-"), bare, n=1)
    return f" (did you mean '{bare[close[0]]}'?)" if close else ""
