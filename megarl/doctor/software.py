"""Checks the versions of the learner's packages, and the engines' environments."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from megarl.config import Settings
from megarl.doctor.finding import Finding, fail, ok, warn
from megarl.errors import UserError
from megarl.rollout.in_engine.megarl_guard import nccl_version
from megarl.rollout.servers import factory
from megarl.run.provenance import installed
from megarl.runtime import device

ENGINE_TIMEOUT = 60.0  # seconds for an engine's interpreter to name its versions, which may import torch
ENGINES_DIR = ".engines"
BUILD = "with torch installed: pip install --no-build-isolation --no-cache-dir -e '.[gpu]'"
"""Transformer Engine's extension must be built against the torch at hand, and not be taken from pip's cache."""


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
    if device.on_cuda():
        yield _transformer_engine(engine)
    elif engine is not None and sys.modules.get("transformer_engine", ...) is not None:  # None: hidden, learner/cpu.py
        hint = "pip uninstall transformer-engine: without CUDA it breaks `import megatron.core`"
        yield fail("transformer-engine", f"{engine} on a machine without CUDA", hint)


def _transformer_engine(found: str | None) -> Finding:
    """Whether it is there, of a declared version, and loads: it is built for one version of torch."""
    name = "transformer-engine"
    if found is None:
        return warn(name, "not installed: no FP8, slower layers", BUILD)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as e:  # whatever a library that does not fit raises
        return fail(name, f"{found} does not load: {' '.join(str(e).split())}", BUILD)
    requirements = [Requirement(line) for line in importlib.metadata.requires("megarl") or []]
    for each in requirements:
        wanted = each.name == name and each.marker and each.marker.evaluate({"extra": "gpu"})
        if wanted and not each.specifier.contains(found, prereleases=True):
            return warn(name, f"{found}, made for {each.specifier}", BUILD)
    return ok(name, found)


def precision(settings: Settings) -> Iterator[Finding]:
    """Whether this device can do the learner's precision."""
    try:
        from megarl.learner import precision as learner
    except Exception as e:  # a package that Megatron imports is broken
        yield fail("precision", f"Megatron does not load: {' '.join(str(e).split())}", "see the versions above")
        return
    try:
        learner.check(settings.precision)
    except UserError as e:
        yield fail("precision", str(e), "set precision.recipe or precision.dtype")
    else:
        yield ok("precision", learner.describe(settings.precision))


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
    ours = nccl_version() if rollout.engine == "sglang" and factory.on_cuda(rollout.servers) else None
    if ours:  # the weights travel in one NCCL group
        code += (
            ";import torch;print(*(torch.cuda.nccl.version() if hasattr(torch._C, '_nccl_version') else ()), sep='.')"
        )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=ENGINE_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        yield fail("engine", f"{python} does not run: {e}", "make engines, or set rollout.servers.python")
        return
    found, _, theirs = done.stdout.strip().partition("\n")
    if ours and theirs != (dotted := ".".join(map(str, ours))):
        hint = f"install a {rollout.engine} of the learner's torch there, or rollout.servers.weight_transport=disk"
        yield fail("engine", f"{found} at {python} has NCCL {theirs or 'unknown'}, the learner {dotted}", hint)
    elif found:
        yield ok("engine", f"{found} at {python}")
    else:
        yield fail("engine", f"{python} has no {rollout.engine}", f"install {rollout.engine} there, or `make engines`")


def _declared() -> dict[str, str]:
    """The requirements of megarl that are most often wrong: name → version specifier."""
    found = {}
    for line in importlib.metadata.requires("megarl") or []:
        requirement, _, marker = line.partition(";")
        match = re.match(r"([A-Za-z0-9_-]+)(.*)", requirement.strip())
        if not match or "extra" in marker:
            continue
        name = match[1].lower()
        if name in ("torch", "megatron-core", "transformers"):
            found[name] = match[2].strip()
    return found
