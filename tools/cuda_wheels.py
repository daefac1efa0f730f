"""Wheels that the proofs without a GPU read: taken by pip into `.cache/wheels`, unpacked there, never installed.

    python tools/cuda_wheels.py            take all of them, and print where they are

What is there is used again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache" / "wheels"
# torch: `===` excludes builds with a local version, such as +cpu. This one is the CUDA build, and for one Python only.
TORCH = "torch===2.13.0"
HASHES = {
    TORCH: "60fcdcb2f3876e21146cb4524ef06397d727ca9ad5f020818547e25075fe3cb7",
    "transformer-engine==2.10.0": "a14ccf4e887409be062c0bd8c4a341df55a77baad6aea6aabfe39c24e38252e5",
    "transformer-engine==2.11.0": "7ee1eae8fa6b0cb471c6066aa3555304fda8537174e5019929dc0c8655071df3",
    "sglang==0.5.21": "96c029f75dec99baa33a5db3d41b1bebefdd6bcfba3a2f7c807fe1cf49a87c20",
    "megatron-core==0.16.1": "3fb26cb407aa3c4b609c08664022c08146f1648b3d6f2ef2bbe9d3b1294ace61",
}
"""Pinned requirement → sha256 of its wheel."""
RUN_BY = {TORCH: "3.11", "sglang==0.5.21": "3.11"}
"""The Python of a wheel that is made for one. The others are taken for 3.12, or are the same for every Python."""


THIS = sys.version_info[:2] == (3, 11)
"""Whether this Python can run the wheels. Newer ones take a newer Megatron and Transformer Engine: see setup.py."""


def unpacked(requirement: str) -> Path:
    """The folder with the contents of a requirement's wheel, downloaded and unpacked if it is not there.

    Raises subprocess.CalledProcessError if pip cannot have the wheel, or its hash is another.
    """
    digest = HASHES[requirement]
    folder = CACHE / f"{re.sub('=+', '-', requirement)}-{digest[:8]}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as place:
        pinned = Path(place) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        version = RUN_BY.get(requirement, "3.12")
        target = ["--python-version", version, "--implementation", "cp"]
        target += [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (34, 28)]
        words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", *target, "--dest", place]
        subprocess.run([sys.executable, "-m", "pip", *words, "--requirement", str(pinned)], check=True)
        whole = Path(place) / "unpacked"
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(whole)
        put(whole, folder)
    return folder


def put(made: Path, folder: Path) -> None:
    """Move a finished folder into its place, unless somebody else was quicker."""
    try:
        os.rename(made, folder)
    except OSError:
        if not folder.exists():
            raise


def transformer_engine(version: str) -> Path:
    """The Python part of Transformer Engine."""
    return unpacked(f"transformer-engine=={version}")


def main() -> None:
    for requirement in HASHES:
        print(requirement, unpacked(requirement))


if __name__ == "__main__":
    main()
