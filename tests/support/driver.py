"""Executes commands one after the other in this process, in the working directory: importing Megatron takes most of the
time of a short run, so it is done once, and this process is the only rank.

    python driver.py COMMANDS.json RESULTS.json

COMMANDS holds a list of lists of words, RESULTS becomes a list of `{"code", "output", "seconds"}`.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from typer.main import get_command

from megarl import cli
from megarl.bench.common import training_runs
from megarl.bench.common.models import write_model
from megarl.errors import RunError, UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def execute(words: list[str]) -> None:
    """Run a command as its shell line would; raises SystemExit or the command's own error."""
    program, *rest = words
    sys.argv = [program, *rest]
    if program == "megarl":
        get_command(cli.app)(args=rest, prog_name="megarl", standalone_mode=False)
    elif words[:2] == ["python", "-m"]:
        sys.argv = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    elif program == "tensorboard":
        serve_tensorboard(rest)
    else:
        if program == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", *rest]
        alone = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
        done = subprocess.run(words, env=alone, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        raise SystemExit(done.returncode)


def serve_tensorboard(words: list[str]) -> None:
    """Start its server, in a thread that ends with this process, and ask it what it serves."""
    from tensorboard.program import TensorBoard

    server = TensorBoard()
    server.configure(argv=["tensorboard", *words])
    with urllib.request.urlopen(f"{server.launch()}data/environment", timeout=60) as answer:
        print(answer.read().decode())


def become_the_only_rank() -> None:
    """As a launcher of one process would have it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= dict(zip(LAUNCHER, ("0", "1", "127.0.0.1", str(port)), strict=True))


def make_wide() -> None:
    """A random model that splits into tp 8 and pp 4, with the quick start's tokenizer."""
    write_model(Path("wide"), vocab_size=64, num_key_value_heads=8)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("examples/quickstart/reasoner") / file, "wide")


def here(run, ranks, arguments, *_, **__):
    """Stands for `spawn` where a study starts its runs: this process is the one rank that they have."""
    assert ranks == 1, f"{ranks} ranks"
    return [run(*arguments)]


def main(commands: Path, results: Path) -> None:
    sys.path.insert(0, ".")
    training_runs.spawn = here
    make_wide()
    done = []
    for words in json.loads(commands.read_text()):
        if "--dry-run" in words:  # of a layout that this process could not be a rank of
            for name in LAUNCHER:
                os.environ.pop(name, None)
        else:
            become_the_only_rank()
        told, code, began = io.StringIO(), 0, time.monotonic()
        with redirect_stdout(told), redirect_stderr(told):
            try:
                execute(words)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except (UserError, RunError) as e:
                code = 2
                print(e)
            except Exception:
                code = 1
                traceback.print_exc(file=told)
        seconds = round(time.monotonic() - began, 2)
        done.append({"code": code, "output": told.getvalue(), "seconds": seconds})
        print(seconds, code, " ".join(words), file=sys.stderr, flush=True)
    results.write_text(json.dumps(done))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
