"""The norm against torch's own: outputs and every gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megarl.learner.norm import RMSNorm


def both(width: int, dtype: torch.dtype) -> tuple[torch.nn.RMSNorm, torch.nn.RMSNorm]:
    ours = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=True), width, 1e-6)
    torchs = torch.nn.RMSNorm(width, eps=1e-6, dtype=dtype)
    weight = torch.rand(width, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours.weight.data.copy_(weight), torchs.weight.data.copy_(weight)
    return ours, torchs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(7, 1, 64), (7, 4, 16)])  # hidden states; heads
def test_it_is_torchs_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    ours, torchs = both(shape[-1], dtype)
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    found = []
    for norm in ours, torchs:
        given = x.clone().requires_grad_()
        y = norm(given)
        y.backward(grad)
        found.append([y.detach(), given.grad, norm.weight.grad])
    for mine, expected in zip(*found, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    ours, _ = both(8, torch.float32)
    x = torch.zeros(2, 8, requires_grad=True)
    ours(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_its_weight_is_marked_under_sequence_parallelism() -> None:
    assert both(8, torch.float32)[0].weight.sequence_parallel
