"""Build the rollout engines' own environments: `python tools/engines/build.py sglang vllm`.

Each engine gets a virtual environment at `.engines/<engine>` (its pins differ from the trainer's). A stamp of the pins
makes a second run free; a changed pin rebuilds. With `--device cuda` the released packages are installed as upstream
means them; the CPU environments are what the tests run on.
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
STUBS = {"sglang": HERE / "sglang_cpu"}  # packages put beside the installed ones on a CPU
RELEASES = {"sglang": "sglang==0.5.23", "vllm": "vllm==0.32.0"}  # what `--device cuda` installs
PROBES = {"sglang": "import sglang.srt.server_args", "vllm": "import vllm"}  # proves that the environment loads


def stamp(engine: str, device: str) -> str:
    """A digest of everything that the environment is made from."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {device}".encode())
    if device == "cuda":
        digest.update(RELEASES[engine].encode())
        return digest.hexdigest()
    files = [HERE / f"{engine}.txt", *sorted(STUBS.get(engine, HERE / "none").rglob("*.py"))]
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def build(engine: str, device: str, folder: Path) -> None:
    """Build one environment unless its stamp says that it is already what the pins ask for."""
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
            shutil.copytree(STUBS[engine], _site_packages(target), dirs_exist_ok=True)
    subprocess.run([python, "-c", PROBES[engine]], check=True, stdout=subprocess.DEVNULL)
    mark.write_text(wanted)


def _site_packages(target: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(target)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", choices=sorted(RELEASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--folder", type=Path, default=Path(".engines"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with open(options.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would tear each other's folders down
        for engine in options.engines:
            try:
                build(engine, options.device, options.folder.resolve())
            except subprocess.CalledProcessError as e:
                print(f"{engine}: the environment cannot be built: {e}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
