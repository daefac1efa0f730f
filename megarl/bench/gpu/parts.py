"""Every part, the most telling first, and what a machine lacks for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from megarl.bench.gpu.part import Layers, Part
from megarl.runtime import device

HERE = "megarl.bench.gpu"
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FAMILIES = ("qwen2", "llama", "qwen3_moe")
TE: Layers = "te"


def _gradients(name: str, seconds: float, layers: Layers, **arguments: Any) -> Part:
    return Part(f"gradients, {name}", f"{HERE}.gradients:against_transformers", seconds, arguments, layers)


def _speed(name: str, seconds: float, layers: Layers = TE, devices: int = 1, **arguments: Any) -> Part:
    arguments |= {"ranks": devices} if devices > 1 else {}
    return Part(f"speed, {name}", f"{HERE}.speed:speed", seconds, arguments, layers, devices=devices)


def _fp8(recipe: str) -> dict[str, str]:
    return {"dtype": "fp8", "recipe": recipe}


LOCAL_NAME = "Megatron's layers"
PARTS = [
    Part("versions", f"{HERE}.environment:versions", 2),
    Part("Transformer Engine imports", f"{HERE}.environment:transformer_engine", 5, layers=TE, cuda=True),
    _gradients(f"fp32, {LOCAL_NAME}", 12, "local"),
    _gradients("bf16", 15, TE, dtype="bf16"),
    Part("attention kernel", f"{HERE}.attention:kernel", 8, layers=TE, cuda=True),
    Part("weights to SGLang", f"{HERE}.servers:weight_sync", 90, {"engine": "sglang"}, devices=2),
    Part("packed against unpacked rows", f"{HERE}.gradients:packed_against_unpacked", 10, layers=TE),
    Part("resume", f"{HERE}.resume:resume", 12, layers=TE),
    _speed("bf16", 25),
    Part("host synchronisations", f"{HERE}.attention:host_synchronisations", 15, layers=TE, cuda=True),
    Part("collectives between devices", f"{HERE}.devices:bandwidth", 40, devices=2),
    *(Part(f"loss curve, fp8 {each}", f"{HERE}.fp8:curve", 15, {"recipe": each}, TE) for each in RECIPES),
    _speed("fp8 tensorwise", 25, precision=_fp8("tensorwise")),
    _speed("fp8 blockwise", 25, precision=_fp8("blockwise")),
    _speed("fp8 mxfp8", 25, precision=_fp8("mxfp8")),
    _gradients(f"bf16, {LOCAL_NAME}", 10, "local", dtype="bf16"),
    *(_gradients(f"{family}, fp32, {LOCAL_NAME}", 10, "local", family=family) for family in FAMILIES),
    *(_gradients(f"{family}, bf16", 10, TE, family=family, dtype="bf16") for family in FAMILIES),
    _speed("tp 2", 70, devices=2, parallel={"tp": 2}),
    _speed("cp 2", 70, devices=2, parallel={"cp": 2}),
    Part("log-probs, hidden size 2560", f"{HERE}.scoring:chunks", 10, {"hidden": 2560}),
    Part("log-probs, hidden size 5120", f"{HERE}.scoring:chunks", 15, {"hidden": 5120}),
    Part("checksums", f"{HERE}.checksums:checksums", 8),
    Part(f"resume, {LOCAL_NAME}", f"{HERE}.resume:resume", 12),
    _gradients(f"full recompute, {LOCAL_NAME}", 10, "local", parallel={"recompute": "full"}),
    _gradients(f"selective recompute, {LOCAL_NAME}", 10, "local", parallel={"recompute": "selective"}),
    _speed("selective recompute", 25, parallel={"recompute": "selective"}),
    _speed("full recompute", 25, parallel={"recompute": "full"}),
    _speed("fp8 tensorwise, full recompute", 25, precision=_fp8("tensorwise"), parallel={"recompute": "full"}),
    _speed("sequences of 8,192", 25, each=8192),
    Part("local engine", f"{HERE}.decoding:embedded", 30),
    _speed(f"bf16, {LOCAL_NAME}", 40, "local"),
    Part(
        "loss curve, fp8 tensorwise, first and last layer in bf16", f"{HERE}.fp8:curve", 15,
        {"recipe": "tensorwise", "high_precision_layers": 1}, TE,
    ),
    Part(
        "gradients, fusion of their accumulation", f"{HERE}.gradients:against_transformers", 12,
        {"dtype": "bf16", "parallel": {"gradient_accumulation_fusion": True}}, TE, cuda=True,
    ),
    Part(
        "speed, fusion of gradient accumulation", f"{HERE}.speed:speed", 25,
        {"parallel": {"gradient_accumulation_fusion": True}}, TE, cuda=True,
    ),
]  # fmt: skip


def lacking(part: Part, rehearsal: bool) -> str:
    """Why this machine cannot run a part; empty if it can.

    The rehearsal has Megatron's layers for Transformer Engine's, and two ranks for the devices.
    """
    if rehearsal:
        return "needs a CUDA device" if part.cuda else ""
    if part.layers == TE and importlib.util.find_spec("transformer_engine") is None:
        return "needs Transformer Engine"
    if part.devices > (count := torch.cuda.device_count() if device.on_cuda() else 0):
        return f"needs {part.devices} devices, {count} found"
    if (engine := part.arguments.get("engine")) and not Path(".engines", engine, "bin", "python").is_file():
        return f"needs .engines/{engine}: make engines"
    return ""
