"""`python -m examples.quickstart [key=value …]`: what `make quickstart` runs once everything is installed.

The same as `megarl train examples/quickstart/train.yaml`, in a run folder that is still free.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from megarl import cli, config

SETTINGS = Path(__file__).with_name("train.yaml")


def free_run(run: Path) -> Path:
    """`run`, or the first of run-2, run-3 … that holds no run yet."""
    names = (run if n == 1 else run.with_name(f"{run.name}-{n}") for n in count(1))
    return next(folder for folder in names if not (folder / "metrics.jsonl").exists())


def main(overrides: list[str]) -> None:
    """Train, in front of whoever typed `make quickstart`."""
    run = free_run(config.load(SETTINGS, overrides).run)
    sys.argv[1:] = ["train", str(SETTINGS), *overrides, f"run={run}"]
    cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
