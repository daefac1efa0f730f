"""GPUs as their data sheets describe them, and how much of that training reaches.

A `Gpu` has published peaks. An `Efficiency` has the fractions of those peaks that large, well-shaped kernels reach.
There is one per architecture, because clocks under load and kernel libraries depend on the architecture, not the card.
`Laws` adds what depends on no GPU: how much communication stays exposed, launch gaps, padding losses.
All fractions were fitted together on published runs (see `megarl bench planner --help`). No constant belongs to one
model, one layout or one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarl.errors import UserError, nearest

Architecture = Literal["ampere", "hopper", "blackwell"]
Dtype = Literal["fp32", "bf16", "fp8", "fp4"]

GIB = 2**30
HOST = 20.0  # GB/s per GPU to host memory, and of Adam on the host's cores: 8 GPUs share a host


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU and its place in the network. Bandwidths are per GPU and in one direction."""

    name: str
    architecture: Architecture
    memory: float  # GiB that the driver reports
    bf16: float  # dense TFLOP/s
    fp8: float  # dense TFLOP/s; the bf16 peak where the chip has no FP8
    fp4: float  # dense TFLOP/s; the fp8 peak where the chip has no FP4
    hbm: float  # TB/s
    nvlink: float  # GB/s
    domain: int  # GPUs connected by NVLink
    network: float  # GB/s to other domains

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of dense matrix products in `dtype` (fp32: TF32 tensor cores, half of bf16)."""
        return {"fp32": self.bf16 / 2, "bf16": self.bf16, "fp8": self.fp8, "fp4": self.fp4}[dtype] * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", "ampere", 39.6, 312, 312, 312, 1.555, 300, 8, 25),
        Gpu("a100", "ampere", 79.2, 312, 312, 312, 2.039, 300, 8, 25),
        Gpu("h100-500w", "hopper", 95.0, 989, 1979, 1979, 2.4, 450, 8, 50),  # 96 GB HBM2e, 500 W
        Gpu("h100", "hopper", 79.1, 989, 1979, 1979, 3.35, 450, 8, 50),
        Gpu("h200", "hopper", 139.8, 989, 1979, 1979, 4.8, 450, 8, 50),
        Gpu("b200", "blackwell", 178.4, 2250, 4500, 9000, 8.0, 900, 8, 50),
        Gpu("b300", "blackwell", 268.0, 2250, 4500, 13500, 8.0, 900, 8, 100),
        Gpu("gb200", "blackwell", 184.0, 2450, 4900, 9800, 8.0, 900, 72, 50),
        Gpu("gb300", "blackwell", 276.0, 2450, 4900, 14700, 8.0, 900, 72, 100),
    )
}


def gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case. Raises UserError naming the nearest known one."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise UserError(f"gpu: '{name}' is unknown{nearest(name.lower(), GPUS)}") from None


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Fractions of the data-sheet peaks that large, aligned kernels reach on one architecture."""

    bf16: float
    fp8: float
    fp4: float
    attention: float  # of the bf16 peak: fused (flash) attention, forward and backward together
    hbm: float

    def matmul(self, dtype: Dtype) -> float:
        return {"fp32": self.bf16, "bf16": self.bf16, "fp8": self.fp8, "fp4": self.fp4}[dtype]


@dataclass(frozen=True, slots=True)
class Laws:
    """Constants of all GPUs. Fractions are of a bandwidth or a volume; times are in microseconds."""

    ampere: Efficiency = Efficiency(bf16=0.8, fp8=0.8, fp4=0.8, attention=0.49, hbm=0.63)
    hopper: Efficiency = Efficiency(bf16=0.75, fp8=0.76, fp4=0.6, attention=0.49, hbm=0.69)
    blackwell: Efficiency = Efficiency(bf16=0.54, fp8=0.76, fp4=0.53, attention=0.38, hbm=0.81)
    nvlink: float = 0.45  # fraction of NVLink that a ring collective reaches
    network: float = 0.95  # fraction of the network that a ring collective reaches
    all_to_all: float = 0.72  # fraction of either that an all-to-all reaches
    tp_exposed: float = 0.22  # tensor-parallel traffic not hidden when overlap is on
    cp_exposed: float = 0.3  # context-parallel traffic not hidden behind attention
    ep_exposed: float = 0.9  # expert traffic not hidden
    ep_overlapped: float = 0.24  # the same, while another micro-batch computes
    dp_exposed: float = 0.15  # data-parallel traffic not hidden when overlap is on
    dense_gap: float = 62.0  # idle GPU time per layer and pass: launches, small kernels
    moe_gap: float = 250.0  # the same, added by routing and permuting
    latency: float = 16.0  # of one collective
    eager: float = 3.6  # memory traffic of element-wise operators run one by one, relative to fused kernels
    misaligned: float = 0.71  # matmul speed when an inner size is not a multiple of 64 elements
    unaligned_heads: float = 0.46  # attention matmul speed when the head size is not a multiple of 8
    flash1: float = 0.58  # speed of FlashAttention 1 relative to 2
    straggler: float = 0.0033  # slow-down per doubling of the number of GPUs

    def efficiency(self, architecture: Architecture) -> Efficiency:
        return {"ampere": self.ampere, "hopper": self.hopper, "blackwell": self.blackwell}[architecture]


LAWS = Laws()
