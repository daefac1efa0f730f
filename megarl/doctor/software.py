"""Checks the versions of the learner's packages, and the engines' environments."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

from megarl.config import Settings
from megarl.doctor.finding import Finding, fail, ok, warn
from megarl.run.provenance import installed
from megarl.runtime import device

ENGINE_TIMEOUT = 30.0  # seconds for an engine's interpreter to name its version
ENGINES_DIR = ".engines"


def versions() -> Iterator[Finding]:
    """Installed versions against those that megarl declares, and Transformer Engine on a CPU."""
    yield ok("python", platform.python_version())
    for name, wanted in _declared().items():
        found = installed(name)
        if found is None:
            yield fail(name, "not installed", f"pip install '{name}{wanted}'")
        elif wanted.startswith("==") and found.partition("+")[0] != wanted[2:]:
            yield warn(name, f"{found}, made for {wanted}", f"pip install '{name}{wanted}'")
        else:
            yield ok(name, found)
    engine = installed("transformer-engine")
    if device.on_cuda() and engine is None:
        yield warn("transformer-engine", "not installed: no FP8, slower layers", "pip install -e '.[gpu]'")
    elif not device.on_cuda() and engine is not None:
        hint = "pip uninstall transformer-engine: without CUDA it breaks `import megatron.core`"
        yield fail("transformer-engine", f"{engine} on a machine without CUDA", hint)


def engines(settings: Settings) -> Iterator[Finding]:
    """The interpreter that runs the engine's servers."""
    rollout = settings.rollout
    if rollout.engine == "local":
        yield ok("engine", "local: inside the learner's ranks" if rollout.embedded else "local: megarl serves it")
        return
    python = rollout.servers.python or f"{ENGINES_DIR}/{rollout.engine}/bin/python"
    names = [rollout.engine, f"{rollout.engine}-cpu"]
    code = (
        "import importlib.metadata as m;"
        f"print(next((f'{{n}} {{m.version(n)}}' for n in {names} if any(m.distributions(name=n))), ''))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=ENGINE_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        yield fail("engine", f"{python} does not run: {e}", "make engines, or set rollout.servers.python")
        return
    found = done.stdout.strip()
    if found:
        yield ok("engine", f"{found} at {python}")
    else:
        yield fail("engine", f"{python} has no {rollout.engine}", f"install {rollout.engine} there, or `make engines`")


def _declared() -> dict[str, str]:
    """The requirements of megarl that are most often wrong: name → version specifier."""
    found = {}
    for line in importlib.metadata.requires("megarl") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"([A-Za-z0-9_-]+)(.*)", requirement.strip())
        older = 'python_version < "3.12"' in marker
        if not match or "extra" in marker or ("python_version" in marker and older != (sys.version_info < (3, 12))):
            continue
        name = match[1].lower()
        if name in ("torch", "megatron-core", "transformers"):
            found[name] = match[2].strip()
    return found
