"""Write requirements.lock: every package that `make setup` installs beside torch, with its hashes.

uv resolves setup.py for all platforms and for Python 3.11 and newer. torch and what comes with its build (CUDA's
libraries, Triton) stay out: which build is right depends on the machine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
BUILD = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)==")
HEAD = "# Made by `make lock`. `make setup` installs exactly these, and pip checks their hashes.\n"


def main() -> None:
    """Resolve anew; the newest versions within the bounds of setup.py."""
    resolve = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
        "--generate-hashes", "--no-annotate", "--no-header", "--extra", "dev", "--upgrade", "setup.py",
    ]  # fmt: skip
    done = subprocess.run(resolve, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    entries = re.split(r"\n(?=\S)", done.stdout.strip())
    LOCK.write_text(HEAD + "\n".join(entry for entry in entries if not BUILD.match(entry)) + "\n")


if __name__ == "__main__":
    main()
