"""Published training runs as the planner's ground truth: one CSV row is one `Run`.

The columns are model sizes, layout, software and measurements (`id, config_group, framework, layers, …, step_s,
peak_mem_gib, status, complete, notes`). A row that cannot be predicted becomes a `Skipped` with the reason.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Literal

from megarl.errors import UserError
from megarl.models.shape import Experts, LatentAttention, ModelShape
from megarl.planner.hardware import GPUS, Dtype, Gpu
from megarl.planner.layout import AttentionKernel, Layout, Recompute, Software
from megarl.planner.steptime import model_flops, step_time

Row = dict[str, str]
MemoryKind = Literal["allocated", "reserved", "driver"]
DTYPES: dict[str, Dtype] = {"fp16": "bf16", "bf16": "bf16", "fp8": "fp8", "nvfp4": "fp4", "fp32": "fp32"}
POSITIVE = ("layers", "hidden", "heads", "vocab", "seq", "n_gpus", "TP", "PP", "VPP", "CP", "EP", "ETP", "MBS", "GBS",
            "step_s", "tok_s_gpu", "peak_mem_gib")  # fmt: skip
REQUIRED = ("layers", "hidden", "heads", "ffn", "vocab", "seq", "gpu", "n_gpus", "TP", "PP", "GBS", "precision")


@dataclass(frozen=True, slots=True)
class Run:
    """One published run and its measurements; `seconds` or `memory` is None when not measured."""

    id: str
    group: str  # runs of one configuration, under any software release
    source: str
    label: str
    shape: ModelShape
    layout: Layout
    software: Software
    gpu: Gpu
    seconds: float | None
    memory: float | None  # GiB
    memory_kind: MemoryKind
    fits: bool
    recompute_stated: bool  # False: the source does not say what was recomputed or offloaded


@dataclass(frozen=True, slots=True)
class Skipped:
    id: str
    reason: str


def read(file: Path) -> tuple[list[Run], list[Skipped]]:
    """All rows of `file`: the runs that can be predicted, and the others with the reason."""
    if not file.is_file():
        raise UserError(f"runs: {file} does not exist")
    runs: list[Run] = []
    skipped: list[Skipped] = []
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            found = _read_row(defaultdict(str, {name: text or "" for name, text in row.items() if name}))
            if isinstance(found, Run):
                runs.append(found)
            else:
                skipped.append(found)
    return runs, skipped


def _read_row(row: Row) -> Run | Skipped:
    """A run, or why it cannot be predicted. Whatever the cells contain, no row is lost and none stops the others."""
    try:
        reason = _unusable(row)
        if reason:
            return Skipped(row["id"], reason)
        run = _run(row)
        predicted = step_time(run.shape, run.layout, run.software, run.gpu).seconds
        if not (isfinite(predicted) and predicted > 0):
            return Skipped(row["id"], "sizes that cannot be predicted")
        return run
    except (ValueError, KeyError, ArithmeticError, IndexError) as e:
        return Skipped(row["id"], f"a cell that cannot be read: {e}")


def _unusable(row: Row) -> str | None:
    if not row["complete"]:
        return "marked as not predictable"
    if "non-megatron" in row["complete"] or "fsdp" in row["framework"].lower():
        return "not Megatron-style"
    missing = [name for name in REQUIRED if not row[name]]
    if missing:
        return f"no {', '.join(missing)}"
    if row["gpu"].lower().removesuffix("-80gb") not in GPUS:
        return f"unknown GPU {row['gpu']}"
    if row["precision"] not in DTYPES:
        return f"unknown precision {row['precision']}"
    bad = [name for name in POSITIVE if row[name] and not float(row[name]) > 0]
    if bad:
        return f"{', '.join(bad)} not positive"
    if row["complete"].startswith("time") and _seconds(row) is None:
        return "only a throughput in FLOP/s whose convention is not stated"
    return None


def _run(row: Row) -> Run:
    shape = _shape(row)
    layout = _layout(row, shape)
    gpu = GPUS[row["gpu"].lower().removesuffix("-80gb")]
    cards = re.search(r"(\d+)x(\d+)g/node", row["notes"].lower())
    if cards:
        gpu = replace(gpu, network=int(cards[1]) * int(cards[2]) / 8 / gpu.domain)
    return Run(
        id=row["id"],
        group=row["config_group"],
        source=row["source_key"],
        label=f"{row['model']} {row['gpu']}x{layout.gpus} {row['precision']}",
        shape=shape,
        layout=layout,
        software=_software(row),
        gpu=gpu,
        seconds=_seconds(row),
        memory=float(row["peak_mem_gib"]) if row["peak_mem_gib"] else None,
        memory_kind=_memory_kind(row["mem_def"]),
        fits=row["status"] != "oom",
        recompute_stated=bool(row["recompute"])
        and "unstated" not in row["recompute"]
        and "recipe" not in row["recompute"],
    )


def _number(row: Row, name: str, default: int = 0) -> int:
    return int(float(row[name])) if row[name] else default


def _shape(row: Row) -> ModelShape:
    layers, heads, count = (_number(row, name) for name in ("layers", "heads", "experts"))
    experts = Experts(
        count,
        _number(row, "topk"),
        _number(row, "moe_ffn"),
        shared_ffn=_number(row, "shared_ffn"),
        dense_layers=layers - _number(row, "moe_layers"),
    )
    kv_rank = _number(row, "kv_lora")
    return ModelShape(
        layers=layers,
        hidden=_number(row, "hidden"),
        heads=heads,
        kv_groups=_number(row, "kv_heads", heads),
        head_dim=_number(row, "head_dim", _number(row, "hidden") // heads),
        ffn=_number(row, "ffn"),
        vocab=_number(row, "vocab"),
        gated=row["act"] == "swiglu",
        tied=row["tied"] == "1",
        moe=experts if count else None,
        latent=LatentAttention(kv_rank, _number(row, "q_lora")) if kv_rank else None,
        mtp=_number(row, "mtp"),
        window=128 if "swa128" in row["attn"] else 0,
    )


def _layout(row: Row, shape: ModelShape) -> Layout:
    tp, pp, ep, gpus = _number(row, "TP"), _number(row, "PP"), _number(row, "EP", 1), _number(row, "n_gpus")
    # Megatron-Core's default is etp = tp. Its newer front ends' recipes, and layouts too small for that, use 1.
    etp = 1 if "bridge" in row["framework"] or "(dev)" in row["framework"] or gpus % (tp * pp * ep) else tp
    chunks = re.search(r"vp printed na in this tag \((\d+) in", row["notes"].lower())
    return Layout(
        gpus=gpus,
        tp=tp,
        pp=pp,
        vpp=int(chunks[1]) if chunks else _number(row, "VPP", 1),
        cp=_number(row, "CP", 1),
        ep=ep,
        etp=_number(row, "ETP", etp) if shape.moe else 1,
        micro_batch=_number(row, "MBS", 1),
        global_batch=_number(row, "GBS"),
        sequence=_number(row, "seq"),
    )


def _seconds(row: Row) -> float | None:
    if row["step_s"]:
        return float(row["step_s"])
    if row["tok_s_gpu"]:
        return float(row["GBS"]) * float(row["seq"]) / float(row["tok_s_gpu"]) / float(row["n_gpus"])
    if row["tflops_per_gpu"] and "megatron_model(causal/2)" in row["flops_def"]:  # `model_flops` counts the same
        shape, layout = _shape(row), _layout(row, _shape(row))
        return model_flops(shape, layout) / float(row["tflops_per_gpu"]) / 1e12 / layout.gpus
    return None


def _memory_kind(text: str) -> MemoryKind:
    if "nvidia-smi" in text:
        return "driver"
    return "reserved" if "max reserved" in text else "allocated"


def _software(row: Row) -> Software:
    text = f"{row['notes']}; {row['overlap']}; {row['recompute']}; {row['optimizer']}".lower()
    early = row["framework"] in ("megatron-lm", "megatron-deepspeed") or "kernel:" in text
    release = re.search(r"performance summary (\d+)\.(\d+)", row["source"])
    modern = release is not None and tuple(map(int, release.groups())) >= (26, 6)
    attention: AttentionKernel = "flash"
    if "kernel: torch" in text:
        attention = "unfused"
    elif "kernel: fused" in text or (early and "kernel: flash" not in text):
        attention = "fused_softmax"
    elif "flash_attentionv1" in text:
        attention = "flash1"
    recipe = any(name in row["framework"] for name in ("nemo", "bridge", "(dev)"))
    plain = row["overlap"] == "dp"  # Megatron-Core's defaults: no sequence parallelism
    overlap = not early and not plain and "all overlap off" not in text and row["overlap"] != "none"
    return Software(
        dtype=DTYPES[row["precision"]],
        attention=attention,
        fused="kernel:" not in text or "rms kernel" in text,
        sequence_parallel="seq_parallel=true" in text or "+sequence-parallel" in text or not (early or plain),
        tp_overlap=overlap,
        dp_overlap=overlap or plain,
        graphs="cuda-graph" in text and "cuda-graph none" not in text,
        node_dispatch=modern or any(name in text for name in ("hybridep", "deepep")),
        ep_overlap="moe-a2a" in text or "a2a overlap" in text,
        fused_experts=modern,
        distributed_optimizer="no dist" not in text,
        fsdp=row["FSDP"] not in ("", "0", "1"),
        recompute=_recompute(row["recompute"].lower()),
        # DeepSpeed's bf16 optimizer keeps the gradients, their fp32 sum and the flat copy that it reduces.
        # NVIDIA's benchmark recipes reduce and keep gradients in bf16.
        gradient_bytes=8.0 if "fp32 grad accumulation" in text else 2.0 if recipe or "kernel:" in text else 4.0,
        parallel_loss="kernel:" not in text,
        trainable=0.0 if "lora" in row["kind"] else 1.0,
    )


def _recompute(text: str) -> Recompute:
    if text.startswith("full"):
        return "full"
    if "core_attn" in text:
        return "attention"
    if "moe)" in text or '"mlp"' in text or ",moe" in text:
        return "moe"
    inside = re.search(r"selective ?[\[(](.+?)[\])]", text)
    return "selective" if inside else "none"
