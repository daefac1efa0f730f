"""The process of one part: imports what it needs, waits for its turn, runs the part and reports to the runner.

It imports neither megarl's learner nor Megatron at its top: a part without Transformer Engine hides that package first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megarl.bench.gpu.part import Part, Scale, Unsupported
from megarl.errors import RunError, UserError
from megarl.runtime.rank import die_with_reader
from megarl.runtime.tether import die_with_parent


def main(pipe: Connection, environment: dict[str, str], log: str, part: Part, scale: Scale) -> None:
    """The target of the process. Sends "ready", waits for a word, then sends the outcome as JSON."""
    die_with_parent(os.getppid())
    die_with_reader(pipe)
    os.setpgid(0, 0)  # the runner ends the whole group
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the runner
    os.environ.clear()
    os.environ.update(environment)
    _write_to(log)
    faulthandler.enable(all_threads=True)  # also of the SIGABRT that the runner sends when the time is over
    outcome = _caught(_prepare, part)
    pipe.send_bytes(b"ready")
    pipe.recv_bytes()
    with tempfile.TemporaryDirectory(dir=Path(log).parent) as folder:
        outcome = outcome or _caught(_run, part, scale, Path(folder))
    pipe.send_bytes(json.dumps(outcome).encode())
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # nothing at exit, such as NCCL's threads, can spoil a result that was sent


def _write_to(log: str) -> None:
    """Send this process's output, also that of C libraries, to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]


def _caught(function: Any, *arguments: Any) -> dict[str, Any] | None:
    """What a function returns; an outcome too if it raises."""
    try:
        return function(*arguments)
    except Unsupported as e:
        return {"outcome": "skipped", "error": str(e)}
    except (UserError, RunError) as e:
        return {"outcome": "failed", "error": "\n".join([str(e), *getattr(e, "__notes__", [])])}
    except BaseException:
        return {"outcome": "failed", "error": traceback.format_exc()}


def _prepare(part: Part) -> None:
    if part.layers == "local":
        assert sys.modules.get("transformer_engine") is None, "Transformer Engine was imported too early to be hidden"
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # Megatron then takes its own layers
    import_module("megarl.learner.learner")
    import_module(part.function.partition(":")[0])


def _run(part: Part, scale: Scale, folder: Path) -> dict[str, Any]:
    module, _, function = part.function.partition(":")
    metrics = getattr(import_module(module), function)(scale, folder, **part.arguments)
    return {"outcome": "measured", "metrics": json.loads(json.dumps(_plain(metrics), default=str))}


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN, which are worth reporting."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
