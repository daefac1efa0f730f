"""Builds the rollout engines' environments: `python tools/engines/build.py sglang vllm`.

Each engine gets a virtual environment at `.engines/<engine>`, because its pins differ from the trainer's. A stamp of
the pins makes a second run free, and a changed pin rebuilds. `--device cuda` installs the released packages unchanged.
The tests use the CPU environments.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUBS = {"sglang": HERE / "sglang_cpu"}  # packages added on a CPU
RELEASES = {"sglang": "sglang==0.5.21", "vllm": "vllm==0.32.0"}  # what `--device cuda` installs
IMPORTS = {"sglang": "import sglang.srt.server_args", "vllm": "import vllm"}  # shows that the environment works


def stamp(engine: str, device: str) -> str:
    """A digest of everything that determines the environment."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {device}".encode())
    if device == "cuda":
        digest.update(RELEASES[engine].encode())
        return digest.hexdigest()
    files = [HERE / f"{engine}.txt", *sorted(STUBS.get(engine, HERE / "none").rglob("*.py"))]
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def build(engine: str, device: str, folder: Path) -> None:
    """Build one environment, unless its stamp shows that it matches the pins."""
    target, wanted = folder / engine, stamp(engine, device)
    mark = target / "megarl-pins"
    if mark.is_file() and mark.read_text() == wanted:
        print(f"{engine}: {target} is up to date")
        return
    print(f"{engine}: building {target} (minutes)", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", target], check=True)
    python = str(target / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if device == "cuda":
        subprocess.run([*pip, RELEASES[engine]], check=True)
    else:
        subprocess.run([*pip, "--no-deps", "-r", HERE / f"{engine}.txt"], check=True)
        if engine in STUBS:
            site_packages = sysconfig.get_path("purelib", vars={"base": str(target)})
            shutil.copytree(STUBS[engine], site_packages, dirs_exist_ok=True)
    subprocess.run([python, "-c", IMPORTS[engine]], check=True, stdout=subprocess.DEVNULL)
    mark.write_text(wanted)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", choices=sorted(RELEASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(".engines"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would delete each other's folders
        for engine in options.engines:
            try:
                build(engine, options.device, options.folder.resolve())
            except subprocess.CalledProcessError as e:
                print(f"{engine}: the environment cannot be built: {e}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
