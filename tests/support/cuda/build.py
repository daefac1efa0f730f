"""Compiles the library that stands for NVIDIA's, for the torch that is unpacked in a folder."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

from tools import cuda_wheels

HERE = Path(__file__).parent
SOURCES = ("driver.c", "nccl.c")
OURS = re.compile(
    r"(__)?(cuda|cublas|cusolver|cusparse|cudnn|cupti|nccl|nvshmem|nvrtc|nvtx|cufft|cuFile|curand|cu[A-Z])"
)
NVIDIA = re.compile(r"lib(cu\w+|nccl|nvrtc|nvshmem_host|nvJitLink)\.so\.\d+")


def libraries(torch: Path) -> Path:
    """A folder of libraries under the names of NVIDIA's that `torch`, an unpacked wheel, is linked with.

    It lies beside the wheel, is named after the sources, and is made by gcc when it is not there.
    """
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in (*SOURCES, "build.py")))
    folder = torch.parent / f"{torch.name}-no-gpu-{digest.hexdigest()[:8]}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=torch.parent) as place:
        made = Path(place) / "made"
        made.mkdir()
        _compile(torch, made)
        cuda_wheels.put(made, folder)
    return folder


def _compile(torch: Path, folder: Path) -> None:
    parts = sorted((torch / "torch" / "lib").glob("*.so*"))
    answered = {
        name
        for source in SOURCES
        for name in re.findall(r"\b((?:__)?cu\w+|nccl\w+)\s*\(|DONE\((\w+)\)", (HERE / source).read_text())
        for name in name
        if name
    }
    missing = sorted(name for name in _undefined(parts) if OURS.match(name) and name not in answered)
    rest = folder / "rest.c"
    lines = ["#include <stdio.h>", "#include <stdlib.h>", "#define NO(name) \\"]
    lines += [' int name() { fprintf(stderr, #name " has no stand-in\\n"); abort(); }']
    rest.write_text("\n".join([*lines, *(f"NO({name})" for name in missing)]) + "\n")
    library = folder / "libnogpu.so"
    words = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", "-o", library, rest]
    subprocess.run([*words, *(HERE / source for source in SOURCES)], check=True)
    for name in {*_needed(parts), "libcuda.so.1"}:
        (folder / name).symlink_to(library.name)


def _undefined(parts: list[Path]) -> set[str]:
    """Symbols that `parts` take from other libraries, without their versions."""
    found, defined = set(), set()
    for part in parts:
        text = subprocess.run(["nm", "-D", part], check=True, capture_output=True, text=True).stdout
        for words in map(str.split, text.splitlines()):
            (found if words[-2] in "Uw" else defined).add(words[-1].split("@")[0])
    return found - defined


def _needed(parts: list[Path]) -> set[str]:
    text = subprocess.run(["readelf", "-d", *parts], check=True, capture_output=True, text=True).stdout
    return {name for name in re.findall(r"NEEDED.*\[(.+)\]", text) if NVIDIA.fullmatch(name)}
