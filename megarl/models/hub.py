"""Models and data sets of the Hugging Face Hub, read from its cache (HF_HOME) and downloaded when absent.

Only the one process that starts a run downloads: ranks under torchrun or srun read the cache, which they share.
"""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from megarl.errors import UserError, nearest

_CONFIGURATION = ["*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_TABLES = ["*.parquet", "*.jsonl"]  # *.json only by name: data sets have their descriptions in such files
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DATA_SET = re.compile(rf"hf:/{{1,2}}datasets/({_ID.pattern})(?:/(.+))?")  # `Path` has made one slash of two


def model(path: Path, weights: bool = True) -> Path:
    """The folder of a model: `path` if it exists or is no id `OWNER/NAME`, else that model's folder in the cache.

    `weights` False leaves out *.safetensors. Raises UserError, with the command that downloads it, if it is absent.
    """
    if path.exists() or not _ID.fullmatch(str(path)):
        return path
    patterns = [*_CONFIGURATION, *(["*.safetensors"] if weights else [])]
    siblings = [folder.name for folder in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings) if siblings else ""
    return _snapshot(f"model.path: there is no folder {path}{near}", "model", str(path), patterns)


def data(path: Path, setting: str) -> list[Path]:
    """The files of `path`: itself, or those of `hf://datasets/OWNER/NAME[/FILE]`, where FILE may contain `*`.

    Without FILE, the data set must have one Parquet or JSONL file. Raises UserError, naming `setting`.
    """
    found = _DATA_SET.fullmatch(str(path))
    if path.exists() or not found:
        return [path]
    name, file = found.groups()
    patterns, where = [file] if file else _TABLES, f"{setting}: hf://datasets/{name}"
    try:
        folder = _snapshot(where, "dataset", name, patterns, download=False)
    except UserError:
        if not _may_download():
            raise
        _choose(where, _listed(where, name, patterns), file, patterns)  # before anything large is downloaded
        folder = _snapshot(where, "dataset", name, patterns)
    there = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return [folder / each for each in _choose(where, there, file, patterns)]


def _choose(where: str, there: list[str], file: str | None, patterns: list[str]) -> list[str]:
    """Those of the files `there` that match `patterns`; UserError if none does, or if it is unclear which is meant."""
    chosen = [each for each in there if any(fnmatch(each, pattern) for pattern in patterns)]
    if not chosen:
        raise UserError(f"{where} has no file {file or ' or '.join(patterns)}{nearest(file or '', there)}")
    if len(chosen) > 1 and not file:
        raise UserError(f"{where} has {len(chosen)} files; add one or a pattern, e.g. /{chosen[0]}")
    return chosen


def _listed(where: str, name: str, patterns: list[str]) -> list[str]:
    try:
        return list(HfApi().list_repo_files(name, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        raise _refusal(where, "dataset", name, patterns, e) from None


def _snapshot(where: str, kind: str, name: str, patterns: list[str], download: bool = True) -> Path:
    """The newest complete snapshot in the cache, downloaded first when there is none and this process may."""
    wanted: dict[str, Any] = {"repo_id": name, "repo_type": kind, "allow_patterns": patterns}
    if kind == "model":
        wanted["ignore_patterns"] = [f"*/{each}" for each in patterns if each != "*.jinja"]  # copies in other formats
    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except (OSError, HFValidationError) as e:
        reason: Exception = e
    if download and _may_download():
        try:
            return Path(snapshot_download(**wanted))
        except (HfHubHTTPError, HFValidationError, OSError) as e:
            reason = e
    raise _refusal(where, kind, name, patterns, reason) from None


def _may_download() -> bool:
    ranks = "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    return not ranks and not constants.is_offline_mode()


def _refusal(where: str, kind: str, name: str, patterns: list[str], reason: Exception) -> UserError:
    if isinstance(reason, HfHubHTTPError) and reason.response.status_code in (401, 403, 404):
        return UserError(f"{where}, and the Hub refuses {name}: {str(reason).splitlines()[0]}")
    files = f" --repo-type dataset {name}" + "".join(f" --include '{p}'" for p in patterns) if kind != "model" else ""
    return UserError(
        f"{where}, and {constants.HF_HUB_CACHE} has no complete copy from the Hub; where there is a network, run: "
        f"hf download{files or f' {name}'} (HF_HOME must be the same there and here)"
    )
