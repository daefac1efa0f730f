"""Starts Python on torch's CUDA build and the library that stands for NVIDIA's, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.cuda.build import libraries
from tools import cuda_wheels

ROOT = Path(__file__).parents[3]


def python(words: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start `python WORDS` with standard output and standard error in pipes."""
    torch = cuda_wheels.unpacked(cuda_wheels.TORCH)
    paths = [str(torch), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LD_LIBRARY_PATH": str(libraries(torch))}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}
    env |= {"TORCH_NCCL_ENABLE_MONITORING": "0", **variables}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
