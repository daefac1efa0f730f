"""The benchmarks of real servers do their whole work. Their figures are a benchmark's affair, not a test's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

WAYS = {"sglang": ["disk", "tensor", "distributed"], "vllm": ["disk"]}


@pytest.mark.parametrize("engine", WAYS)
def test_weights_arrive_by_every_way(engine: str, tmp_path: Path, bench: Callable[..., None]) -> None:
    """One update each of a random model of some hundred thousand parameters, checked by the transport itself."""
    file = tmp_path / "weight_sync.json"
    bench("weight_sync", "--engines", engine, "--sizes", "1M", "--repeats", 1, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["mode"] for row in rows] == WAYS[engine]
    assert all(row["seconds"] > 0 and row["moved"] == pytest.approx(1, abs=0.05) for row in rows)


def test_tokens_a_second_of_a_real_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """Two requests of the quick start's model: the servers and the embedded engine make as many tokens."""
    monkeypatch.chdir(Path(__file__).parents[2])
    file = tmp_path / "rollout.json"
    asked = ("--engines", "local,sglang,vllm", "--models", "reasoner", "--batches", 2, "--repeats", 1)
    bench("rollout", "--json", file, *asked)
    rows = json.loads(file.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["local", "sglang", "vllm"]
    assert len({row["tokens"] for row in rows}) == 1 and all(row["ratio"] is None or row["ratio"] > 0 for row in rows)
