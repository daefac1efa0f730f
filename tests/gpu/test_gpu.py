"""What only a CUDA device with Transformer Engine can show; `make test-gpu` runs it and writes docs/gpu_results.md.

`megarl bench gpu` measures once, each part in its own process; the tests judge its rows.
"""

import os
from pathlib import Path

import pytest

from megarl.bench.gpu import results
from megarl.bench.gpu.part import FULL
from megarl.bench.gpu.parts import PARTS, lacking
from megarl.bench.gpu.runner import run
from megarl.runtime import device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not device.transformer_engine(), reason="needs a CUDA device and transformer-engine"),
]
MINUTES = 50.0
PLANNED = (
    "speed, bf16", "speed, fp8 tensorwise", "speed, full recompute", "speed, fp8 tensorwise, full recompute",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Measured once; also written to the page that MEGARL_GPU_RESULTS names, and to a JSON file beside it."""
    page = Path(os.environ["MEGARL_GPU_RESULTS"]) if "MEGARL_GPU_RESULTS" in os.environ else None
    found = []
    for row in run(PARTS, FULL, MINUTES, lambda part: lacking(part, rehearsal=False)):
        found.append(row)
        results.save(found, page and page.with_suffix(".json"), page, len(found) == len(PARTS), rehearsal=False)
    return found


def measured(rows, begin):
    """Name and metrics of the parts that were measured and whose name begins so; at least one."""
    found = {r["part"]: r["metrics"] for r in rows if r["outcome"] == "measured" and r["part"].startswith(begin)}
    assert found, [row for row in rows if row["part"].startswith(begin)]
    return found.items()


def test_no_part_fails(rows):
    assert not [(row["part"], row["error"]) for row in rows if row["outcome"] == "failed"]


def test_gradients_are_those_of_transformers(rows):
    """Both kinds of layers, every family. In bf16 the worst tensor is not judged: it is about twice the median."""
    for name, row in measured(rows, "gradients"):
        loss, gradient = (1e-5, 1e-4) if "fp32" in name else (5e-3, 3e-2)
        assert row["dloss"] < loss and row["relgrad"] < gradient, (name, row)


def test_packing_changes_no_gradient(rows):
    """In bf16: rows of three sequences against single ones."""
    for name, row in measured(rows, "packed against unpacked"):
        assert row["dloss"] < 5e-3 and row["relgrad"] < 3e-2, (name, row)


def test_a_resumed_update_is_the_one_that_would_have_come(rows):
    """The loss within a bf16 rounding; kernels that add in any order may make the rest differ in its last bits."""
    for name, row in measured(rows, "resume"):
        assert row["bit_equal"] or row["dloss"] < 5e-3 * row["loss"], (name, row)


def test_fp8_trains_as_bf16_does(rows):
    """The loss at the end of a small run is within 2%; nothing is said of long runs."""
    for name, row in measured(rows, "loss curve"):
        assert abs(row["against_bf16"]) < 0.02, (name, row)


def test_the_planner_foretells_memory_and_time(rows):
    """Peak memory of a model of 1.4 billion parameters within 15%, step time within 35%: one card, one layout."""
    for name, row in measured(rows, "speed"):
        if name in PLANNED:
            assert row["planned_gib"] == pytest.approx(row["peak_gib"], rel=0.15), (name, row)
            assert row["planned_ms"] == pytest.approx(row["update_ms"], rel=0.35), (name, row)
