"""Hub ids become files of the cache. No network: the cache is made by hand, and downloads are stood in for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from megarl.errors import UserError
from megarl.models import hub
from tests.support import hub_cache

ROOT = Path(__file__).parents[2]
REASONER = ROOT / "examples/quickstart/reasoner"
FILES = {file.name: file for file in REASONER.iterdir() if file.suffix in (".json", ".safetensors")}
ROWS = '{"prompt": "1 2 -> 3 <think>", "answer": "1 2 -> 3"}\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline, seen from an empty working directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hub"


def test_a_cached_model_is_found_and_a_local_folder_wins(cache: Path) -> None:
    snapshot = hub_cache.add(cache, "Owner/Model-1B", FILES)
    assert hub.model(Path("Owner/Model-1B")) == snapshot
    Path("Owner/Model-1B").mkdir(parents=True)
    assert hub.model(Path("Owner/Model-1B")) == Path("Owner/Model-1B")
    for local in ("nowhere", "/Owner/Model-1B", "../Model-1B", "a/b/c"):  # no ids: the caller refuses them
        assert hub.model(Path(local)) == Path(local)


def test_an_absent_model_is_one_line_with_the_command(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        hub.model(Path("Owner/Model-1B"))
    assert str(caught.value).startswith("model.path: there is no folder Owner/Model-1B, and ")
    assert "run: hf download Owner/Model-1B (" in str(caught.value) and "\n" not in str(caught.value)
    Path("models/Model-2B").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean 'Model-2B'"):
        hub.model(Path("models/Model-1B"))


def test_an_interrupted_download_is_not_taken_for_a_model(cache: Path) -> None:
    """Its configuration alone is complete, and so may be read for a plan; copies in other formats do not count."""
    some = {name: file for name, file in FILES.items() if name.endswith(".json")}
    hub_cache.add(cache, "Owner/Half", some, missing=("model.safetensors", "original/params.json", "model.bin"))
    with pytest.raises(UserError, match="no complete copy"):
        hub.model(Path("Owner/Half"))
    assert (hub.model(Path("Owner/Half"), weights=False) / "config.json").is_file()


@pytest.mark.parametrize("written", ["hf://datasets/Owner/Set", "hf:/datasets/Owner/Set"])
def test_data_sets_are_files_of_the_cache(cache: Path, written: str) -> None:
    """Settings are paths, in which two slashes become one."""
    snapshot = hub_cache.add(cache, "Owner/Set", {"main/a-1.jsonl": ROWS, "info.json": "{}"}, "dataset")
    assert hub.data(Path(written), "data.train") == [snapshot / "main/a-1.jsonl"]
    assert hub.data(Path(f"{written}/main/*.jsonl"), "data.train") == [snapshot / "main/a-1.jsonl"]
    assert hub.data(Path("plain.jsonl"), "data.train") == [Path("plain.jsonl")]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("hf://datasets/Owner/Set", ["data.eval: hf://datasets/Owner/Set has 2 files", "/main/a.jsonl"]),
        ("hf://datasets/Owner/Set/main/c.jsonl", ["data.eval", "no file main/c.jsonl", "main/a.jsonl"]),
        ("hf://datasets/Owner/None", ["data.eval", "hf download --repo-type dataset Owner/None --include '*.parquet'"]),
        ("hf://datasets/Owner/None/x.parquet", ["hf download --repo-type dataset Owner/None --include 'x.parquet'"]),
    ],
)
def test_what_data_is_meant_must_be_clear(cache: Path, written: str, words: list[str]) -> None:
    hub_cache.add(cache, "Owner/Set", {"main/a.jsonl": ROWS, "main/b.parquet": ""}, "dataset")
    with pytest.raises(UserError) as caught:
        hub.data(Path(written), "data.eval")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_process_that_starts_a_run_downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cached is not looked up again; a rank under a launcher refuses rather than downloads."""
    real, downloads = hub.snapshot_download, []

    def stand_in(repo_id: str, local_files_only: bool = False, **more: Any) -> str:
        if not local_files_only:
            downloads.append(repo_id)
            hub_cache.add(cache, repo_id, FILES)
        return real(repo_id, local_files_only=True, **more)

    monkeypatch.setattr(hub, "snapshot_download", stand_in)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        with monkeypatch.context() as under:
            under.setenv(name, "1")
            with pytest.raises(UserError, match="hf download Owner/New"):
                hub.model(Path("Owner/New"))
    assert downloads == []
    assert hub.model(Path("Owner/New")) == hub.model(Path("Owner/New"))
    assert downloads == ["Owner/New"]


@pytest.mark.slow
def test_the_dry_run_reads_model_and_data_of_the_hub(tmp_path: Path) -> None:
    """The whole way, in a process of its own with HF_HOME: weights, prompts and reward are those of the cache."""
    hub_cache.add(tmp_path / "hub", "Owner/Reasoner", FILES)
    hub_cache.add(tmp_path / "hub", "Owner/Problems", {"data/train.jsonl": ROWS}, "dataset")
    command = [
        sys.executable, "-m", "megarl.cli", "train", "examples/quickstart/train.yaml", f"run={tmp_path / 'run'}",
        "model.path=Owner/Reasoner", "data.train=[hf://datasets/Owner/Problems]", "data.eval=[]", "--dry-run",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 prompts" in done.stderr and "search_verify:grade: wrong for a made-up response" in done.stderr
