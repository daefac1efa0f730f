"""What only a CUDA device with Transformer Engine can show; `make test-gpu` runs it and writes docs/gpu_results.md."""

import os
from pathlib import Path

import pytest

from megarl.bench import gpu
from megarl.runtime import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not device.transformer_engine(), reason="needs a CUDA device and transformer-engine"),
]


@pytest.fixture(scope="module")
def rows():
    """Measured once; also written to the file that MEGARL_GPU_RESULTS names."""
    found = gpu.measure()
    if "MEGARL_GPU_RESULTS" in os.environ:
        Path(os.environ["MEGARL_GPU_RESULTS"]).write_text(gpu.page(found))
    return found


def of(rows, check):
    return [row for row in rows if row["check"] == check]


def test_layer_specs_and_packing_give_one_gradient(rows):
    """In bf16: Transformer Engine's layers against Megatron's own, and packed rows against single sequences."""
    for row in of(rows, "gradients"):
        assert row["dloss"] < 5e-3 and row["relgrad"] < 3e-2, row


def test_fp8_trains_as_bf16_does(rows):
    """The loss at the end of a small run is within 2 %; nothing is said of long runs."""
    for row in of(rows, "curve"):
        assert abs(row["against_bf16"]) < 0.02, row


def test_the_planner_foretells_memory_and_time(rows):
    """Peak memory of a billion-parameter model within 15 %, step time within 35 %: one card, one layout."""
    for row in of(rows, "speed"):
        assert row["planned_gib"] == pytest.approx(row["peak_gib"], rel=0.15), row
        assert row["planned_seconds"] == pytest.approx(row["seconds"], rel=0.35), row
