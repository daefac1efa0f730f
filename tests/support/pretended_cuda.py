"""CUDA devices that torch only pretends to see, in a process and all that it starts. Using one fails."""

from __future__ import annotations

import os
from pathlib import Path

SITE = """
import importlib.abc, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.is_available = lambda: True
            module.device_count = lambda: int(os.environ["PRETENDED_DEVICES"])

        spec.loader.exec_module = exec_module
        return spec

import importlib.util
sys.meta_path.insert(0, Finder())
"""


def environment(folder: Path, devices: int, **more: str) -> dict[str, str]:
    """Variables of a process that sees this many devices; without MEGARL_DEVICE unless given. Writes into `folder`."""
    (folder / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name != "MEGARL_DEVICE"}
    return {**kept, "PYTHONPATH": path, "PRETENDED_DEVICES": str(devices), **more}
