"""The versions and the machine that a run used. Written once into the run directory, without secrets."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from megarl.run.atomic import write_text
from megarl.run.records import damaged, object_in

FILE = "provenance.json"
GIT_TIMEOUT = 10.0  # seconds
PACKAGES = (
    "megarl", "torch", "megatron-core", "transformer-engine", "transformers", "tokenizers", "numpy", "sglang", "vllm",
)  # fmt: skip
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_NNODES")


def describe(ranks: int, job: str = "train") -> dict[str, Any]:
    """One flat mapping, for a table. Of the environment variables it has only `VARIABLES`."""
    found: dict[str, Any] = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "job": job,
        "ranks": ranks,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
    }
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    found |= {package: number for package in PACKAGES if (number := installed(package))}
    return found | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def write(folder: Path, ranks: int, job: str = "train") -> None:
    write_text(folder / FILE, json.dumps(describe(ranks, job), indent=1) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote. Empty for a run without the file. Raises UserError if it is damaged."""
    file = folder / FILE
    if not file.is_file():
        return {}
    found = object_in(file)
    with damaged(file):
        if "ranks" in found and (type(found["ranks"]) is not int or found["ranks"] < 1):
            raise ValueError(f"ranks is {found['ranks']!r:.40}, not a number of ranks")
    return found


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(*, changes: bool = False) -> str | None:
    """The commit of this checkout; with `changes`, "+changes" after it if tracked files differ. None without one."""
    found = _git("rev-parse", "--short", "HEAD")
    return found + "+changes" if found and changes and _git("status", "--porcelain", "-uno") else found


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=GIT_TIMEOUT
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a file system that hangs: the run matters more
        return None
    return done.stdout.strip() or None
