"""Reading published runs, scoring and calibrating, on made-up rows."""

import csv
import json
from dataclasses import replace

import pytest

from examples.planner import bench, calibrate
from examples.planner.published import read
from megarl.planner.hardware import LAWS
from megarl.planner.steptime import step_time

HEADER = """
id config_group source_key source framework kind model attn layers hidden heads kv_heads head_dim ffn act
vocab seq experts topk moe_ffn shared_ffn moe_layers q_lora kv_lora mtp tied gpu n_gpus precision optimizer TP
PP VPP CP EP ETP FSDP MBS GBS recompute overlap step_s tflops_per_gpu tok_s_gpu peak_mem_gib mem_def status
flops_def complete notes
"""
COLUMNS = HEADER.split()
ROW = {
    **{"id": "a0", "config_group": "g0", "source_key": "made-up", "framework": "megatron-core", "model": "M"},
    **{"layers": "16", "hidden": "2048", "heads": "16", "kv_heads": "8", "head_dim": "128", "ffn": "8192"},
    **{"act": "swiglu", "attn": "gqa", "vocab": "32000", "seq": "4096", "gpu": "H100", "n_gpus": "16"},
    **{"precision": "bf16", "TP": "2", "PP": "2", "MBS": "1", "GBS": "64", "recompute": "none"},
    **{"step_s": "1.0", "status": "ok", "complete": "time"},
}


def table(path, *changes):
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        for i, change in enumerate(changes):
            writer.writerow({**ROW, "id": f"a{i}", "config_group": f"g{i}", **change})
    return path


def test_no_row_is_lost(tmp_path):
    """Every row is a run or is skipped with a reason."""
    file = table(
        tmp_path / "runs.csv",
        {},
        {"complete": ""},
        {"complete": "time(non-megatron)"},
        {"gpu": "TPU"},
        {"layers": ""},
        {"step_s": "", "tok_s_gpu": "4096"},
        {"step_s": "", "tflops_per_gpu": "400"},
        {"step_s": "", "tflops_per_gpu": "400", "flops_def": "megatron_model(causal/2)"},
    )
    runs, skipped = read(file)
    assert [r.id for r in runs] == ["a0", "a5", "a7"]
    assert runs[1].seconds == pytest.approx(64 * 4096 / 4096 / 16)
    assert len({s.reason for s in skipped}) == 5


def test_odd_cells_are_skipped_with_a_reason(tmp_path):
    """Unknown hardware, types and software, words for numbers, and zeros: a reason or a prediction, never an error."""
    odd = [
        {"gpu": "GB400"}, {"precision": "int4"}, {"layers": "many"}, {"heads": "0"}, {"TP": "0"}, {"step_s": "fast"},
        {"GBS": "-1"}, {"EP": "x"}, {"gpu": "96GB class (unstated)"}, {"precision": ""}, {"step_s": "0"},
    ]  # fmt: skip
    fine = [{"framework": "a-new-trainer"}, {"model": ""}, {"attn": "unheard of"}, {"kind": "?"}, {"mem_def": "?"}]
    runs, skipped = read(table(tmp_path / "runs.csv", *odd, *fine))
    assert (len(runs), len(skipped)) == (len(fine), len(odd))
    assert all(s.reason for s in skipped)
    bench.main(runs=tmp_path / "runs.csv")


def test_a_table_without_optional_columns_is_read(tmp_path):
    kept = ("id", "layers", "hidden", "heads", "ffn", "vocab", "seq", "gpu", "n_gpus", "TP", "PP", "GBS", "precision")
    kept += ("step_s", "complete")
    with (tmp_path / "runs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, kept, extrasaction="ignore")
        writer.writeheader()
        writer.writerow(ROW)
    assert len(read(tmp_path / "runs.csv")[0]) == 1


def test_software_is_read_from_what_the_source_says(tmp_path):
    file = table(
        tmp_path / "runs.csv",
        {"framework": "megatron-deepspeed", "recompute": "full(every layer)", "notes": "Omni-Path 4x100G/node"},
        {"framework": "scaling (Megatron-style 3D)", "notes": "kernel: torch; seq_parallel=n/a"},
        {"framework": "megatron-bridge", "overlap": "cuda-graph local", "source": "performance summary 26.06"},
    )
    old, torch_like, bridge = (run for run in read(file)[0])
    assert (old.software.attention, old.software.recompute, old.software.sequence_parallel) == (
        "fused_softmax",
        "full",
        False,
    )
    assert old.gpu.network == 4 * 100 / 8 / 8
    assert (torch_like.software.attention, torch_like.software.fused) == ("unfused", False)
    assert bridge.software.graphs and bridge.software.fused_experts and bridge.software.sequence_parallel


def test_score_counts_groups_once_and_writes_its_summary(tmp_path, bench):
    """Two runs of one group weigh as one; an impossible run that is reported as fitting counts against us."""
    file = table(tmp_path / "runs.csv", {}, {"config_group": "g0"}, {"hidden": "65536", "heads": "512", "step_s": "9"})
    bench("planner", "--runs", file, "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    summary = result["summary"]
    assert summary["scored"] == 3 and summary["skipped"] == 0 and result["details"]["time_groups"] == 2
    assert summary["fits_accuracy"] == pytest.approx(2 / 3)
    assert set(summary) == {
        "time_median_abs_error",
        "time_p90_abs_error",
        "memory_median_abs_error",
        "fits_accuracy",
        "scored",
        "skipped",
    }
    assert result["rows"][0]["time_error"] == max((r["time_error"] for r in result["rows"]), key=abs)


def test_a_perfect_prediction_scores_zero(tmp_path):
    runs, _ = read(table(tmp_path / "runs.csv", {}, {"TP": "4"}))
    exact = [replace(r, seconds=step_time(r.shape, r.layout, r.software, r.gpu).seconds) for r in runs]
    assert bench.score(exact, [])[1]["time_p90_abs_error"] == pytest.approx(0, abs=1e-12)


def test_calibration_finds_a_constant_that_was_moved(tmp_path):
    """Times made with a slower matrix product pull the fit back to it; held-out errors shrink too."""
    changes = [{"TP": tp, "hidden": h, "heads": str(int(h) // 128)} for tp in "14" for h in ("2048", "4096", "8192")]
    runs, _ = read(table(tmp_path / "runs.csv", *changes))
    true = replace(LAWS, hopper=replace(LAWS.hopper, bf16=0.5))
    runs = [replace(r, seconds=step_time(r.shape, r.layout, r.software, r.gpu, true).seconds) for r in runs]
    fitted = calibrate.fit(LAWS, [[r] for r in runs], sweeps=4)
    assert fitted.hopper.bf16 == pytest.approx(0.5, rel=0.15)
    before = [abs(e[0]) for e in calibrate.group_errors(LAWS, [[r] for r in runs])]
    held = calibrate.held_out_errors(LAWS, runs, lambda r: r.group, folds=2)
    assert max(held) < min(before)
