"""A cache of the Hugging Face Hub as its library lays it out on disk, without the Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def add(
    cache: Path, name: str, files: Mapping[str, Path | str], kind: str = "model", missing: tuple[str, ...] = ()
) -> Path:
    """The snapshot folder of repository `name` with `files` (copied, or their text) in it.

    `missing` are files that the Hub's listing names and an interrupted download has not brought.
    """
    repository = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for file, content in files.items():
        place = snapshot / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(content, place) if isinstance(content, Path) else place.write_text(content)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "trees").mkdir(exist_ok=True)
    listing = {file: {"size": 1, "blob_id": "0"} for file in (*files, *missing)}
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listing}))
    return snapshot
