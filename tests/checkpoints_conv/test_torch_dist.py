"""The distributed checkpoint that we write is one to torch's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

from checkpoints_conv.torch_dist import TorchDistWriter, stored_keys
from megarl.models.families import rules
from tests.support.conversions import convert_folder, read_all, write_model
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_torchs_reader_loads_it(family: str, tmp_path: Path) -> None:
    """Every key whole, as stacked over the layers (and experts). test_megatron.py has Megatron ask for its shards."""
    model, hf = tiny(family), write_model(tmp_path / "hf", family)
    convert_folder(hf, tmp_path / "dist", TorchDistWriter(model))
    expected, held = read_all(hf), {rule: stored_keys(rule, model)[0] for rule in rules(model)}
    state = {at.key: torch.zeros(*at.of, *rule.shape(), dtype=torch.bfloat16) for rule, at in held.items()}
    torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path / "dist" / "release", no_dist=True)
    for rule, at in held.items():
        assert torch.equal(state[at.key][at.at], rule.fuse(expected)), rule.megatron
