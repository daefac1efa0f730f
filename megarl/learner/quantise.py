"""FP8 numbers in software: values rounded to e4m3 or e5m2 under Transformer Engine's four scaling recipes.

Tensors in and out, no Megatron. A quantised tensor is returned in its own dtype ("quantise, then dequantise"): in
float32 this is what a matrix product with exact accumulation reads. Conversion saturates as `cvt.satfinite` does on the
GPU. Values that are too large, infinities included, become the largest finite value; nan stays nan.

delayed    one scale per tensor, from the largest magnitude of earlier steps (Micikevicius et al., arXiv 2209.05433)
tensorwise one scale per tensor, from its own largest magnitude ("current scaling")
blockwise  one power-of-two scale per 1 x 128 tile of activations and gradients, and per 128 x 128 tile of weights
mxfp8      one power-of-two scale per 32 values along the summed dimension (OCP Microscaling Formats, v1.0), rounded so
           that nothing overflows, as in NVIDIA's kernels; OCP's conversion saturates (Mishra et al., arXiv 2506.08027).
           Gradients are e4m3 too, because with a scale per block they do not need e5m2's range.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
Role = Literal["input", "weight", "gradient"]

HISTORY = 1024  # steps of amax history (delayed)
TILE = 128  # blockwise
MX_BLOCK = 32
LARGEST_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit floating-point format."""

    name: str
    dtype: torch.dtype
    largest: float


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0)
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0)
HYBRID: dict[Role, Format] = {"input": E4M3, "weight": E4M3, "gradient": E5M2}


def formats(recipe: Recipe) -> dict[Role, Format]:
    """The format of each operand, as in Megatron's recipes: "e4m3" for mxfp8, "hybrid" for the others."""
    return {**HYBRID, "gradient": E4M3} if recipe == "mxfp8" else HYBRID


def round_to(x: Tensor, fmt: Format) -> Tensor:
    """float32 → the nearest value of `fmt` (ties to even, saturating), in float32."""
    return x.clamp(-fmt.largest, fmt.largest).to(fmt.dtype).to(torch.float32)


def scale_of(amax: Tensor, fmt: Format) -> Tensor:
    """The factor that scales `amax` to the format's largest value; 1 where amax is 0, infinite or nan.

    A quotient beyond float32 becomes its largest value. float32 of amax's shape.
    """
    amax = amax.to(torch.float32)
    scale = torch.full_like(amax, fmt.largest) / amax
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, scale, 1.0).clamp(max=LARGEST_SCALE)


def power_of_two_scale(amax: Tensor, fmt: Format) -> Tensor:
    """`scale_of` rounded down to a power of two, so that nothing overflows and scaling is exact."""
    mantissa, exponent = torch.frexp(scale_of(amax, fmt))
    return torch.ldexp(torch.full_like(mantissa, 0.5), exponent)


def quantise_tensor(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """`x` under one scale, in x's dtype."""
    return (round_to(x.to(torch.float32) * scale, fmt) / scale).to(x.dtype)


def quantise_blocks(x: Tensor, fmt: Format, block: tuple[int, int]) -> Tensor:
    """A matrix [m, n] under one power-of-two scale per block, in x's dtype. The last blocks may be smaller."""
    (m, n), (rows, columns) = x.shape, block
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -n % columns, 0, -m % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [m / rows, rows, n / columns, columns]
    scale = power_of_two_scale(tiles.abs().amax((1, 3), keepdim=True), fmt)
    return (round_to(tiles * scale, fmt) / scale).flatten(2, 3).flatten(0, 1)[:m, :n].to(x.dtype)


@dataclass(slots=True)
class DelayedScale:
    """The scale of one tensor of one module under delayed scaling, from the history before this step."""

    fmt: Format
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    scale: float = 1.0

    def record(self, amax: float) -> None:
        """Append this step's largest magnitude and derive the next step's scale.

        A history of zeros, or with an infinity or nan, does not change the scale.
        """
        self.history.append(amax)
        peak = torch.tensor(list(self.history)).max()  # nan if there is one
        if peak > 0 and peak.isfinite():
            self.scale = float(scale_of(peak, self.fmt))


def block_shape(recipe: Recipe, role: Role, dim: int) -> tuple[int, int]:
    """The block of a matrix whose dimension `dim` (0 or 1) the product sums over."""
    if recipe == "mxfp8":
        return (1, MX_BLOCK) if dim == 1 else (MX_BLOCK, 1)
    if role == "weight":
        return TILE, TILE
    return (1, TILE) if dim == 1 else (TILE, 1)


def quantise(x: Tensor, recipe: Recipe, role: Role, dim: int, delayed: DelayedScale | None = None) -> Tensor:
    """The matrix `x` as read by a product that sums over its dimension `dim`. `delayed`: the recipe's state."""
    fmt = formats(recipe)[role]
    if recipe == "delayed":
        if delayed is None:
            raise ValueError("delayed scaling needs its state")
        return quantise_tensor(x, torch.tensor(delayed.scale), fmt)
    if recipe == "tensorwise":
        return quantise_tensor(x, scale_of(x.detach().abs().amax(), fmt), fmt)
    return quantise_blocks(x, fmt, block_shape(recipe, role, dim))
