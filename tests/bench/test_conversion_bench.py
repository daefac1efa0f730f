"""`megarl bench conversion`: every direction is measured beside a copy. Its figures are a benchmark's affair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_conv import bench as conversion

pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def test_every_direction_has_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Callable[..., None]
) -> None:
    """A few layers of a small model: all weights are converted there and back."""
    monkeypatch.setattr(conversion, "CONFIG", {**conversion.CONFIG, **SMALL})
    small = ("--gigabytes", 0.001, "--rounds", 1, "--folder", tmp_path)
    bench("conversion", "--json", tmp_path / "conversion.json", *small)
    copy, *rows = json.loads((tmp_path / "conversion.json").read_text())["rows"]
    assert copy["of_copy_speed"] == 1
    assert [row["what"] for row in rows] == list(conversion.DIRECTIONS)
    assert all(row["written_gb"] >= 0.0009 and row["of_copy_speed"] > 0 for row in rows)
    assert [file.name for file in tmp_path.iterdir()] == ["conversion.json"]
