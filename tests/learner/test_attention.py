"""Packed attention against a mask, on one rank. `megarl bench parity` covers the other layouts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megarl.learner.attention import PackedAttention, PackedRow
from tests.support.learner_support import Alone


@pytest.mark.parametrize("skip_last", [False, True])
def test_segments_do_not_see_each_other(skip_last: bool) -> None:
    """Grouped-query attention over three packed segments equals attention under a block-diagonal causal mask."""
    heads, groups, d, lengths = 4, 2, 8, [3, 5, 4]
    config = SimpleNamespace(kv_channels=d, num_query_groups=groups, num_attention_heads=heads)
    attention = PackedAttention(config=config, pg_collection=SimpleNamespace(cp=Alone()), softmax_scale=d**-0.5)
    torch.manual_seed(0)
    t = sum(lengths)
    query, key, value = torch.randn(t, heads, d), torch.randn(t, groups, d), torch.randn(t, groups, d)
    angles = torch.rand(t, 1, d // 2)
    row = PackedRow(segments=lengths, skip_last=skip_last, cos=angles.cos(), sin=angles.sin())
    found = attention(query, key, value, None, row)

    def turned(x: torch.Tensor) -> torch.Tensor:
        cos, sin = angles.cos().repeat(1, 1, 2), angles.sin().repeat(1, 1, 2)
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1) * sin

    segment = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = (segment[:, None] == segment[None]) & torch.ones(t, t, dtype=torch.bool).tril()
    q, k = turned(query), turned(key).repeat_interleave(heads // groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / d**0.5
    scores = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", scores, value.repeat_interleave(heads // groups, 1))
    if skip_last:
        wanted[-lengths[-1] :] = 0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
