"""Every tensor of the published models is mapped exactly once, in shape. On meta tensors: nothing is allocated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.layout import Layout, chunks, local_rules, padded_vocab
from megarl.models.rules import Rule
from megarl.models.shape import ModelShape

CONFIGS = json.loads((Path(__file__).parent / "published_configs.json").read_text())

PARAMETERS = {  # as the model cards' weight files count them; tied output layers once
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
}

LAYOUTS = {
    "Qwen3-0.6B": [Layout(), Layout(tp=2)],
    "Qwen3-1.7B": [Layout(), Layout(tp=2, pp=2)],
    "Qwen3-4B": [Layout(tp=2), Layout(tp=4, pp=2, vpp=3)],
    "Qwen3-8B": [Layout(tp=4), Layout(tp=2, pp=2, vpp=2)],
    "Qwen3-14B": [Layout(tp=8), Layout(tp=4, pp=2, vpp=2)],
    "Qwen3-32B": [Layout(tp=8, pp=2), Layout(tp=8, pp=4, vpp=2)],
    "Qwen3-30B-A3B": [Layout(tp=4, ep=8), Layout(tp=2, pp=2, vpp=2, ep=8)],
    "Qwen3-235B-A22B": [Layout(tp=4, pp=2, ep=16, etp=1)],
    "Llama-3.1-8B": [Layout(tp=4), Layout(tp=2, pp=2, vpp=2)],
    "Llama-3.1-70B": [Layout(tp=8, pp=2), Layout(tp=8, pp=4, vpp=5)],
}

CLUSTER = Path(__file__).parents[2] / "slurm" / "configs"


def cluster_layouts() -> dict[str, Layout]:
    """The layout of each published model that slurm/ trains."""
    found = {}
    for file in CLUSTER.glob("qwen3_*.yaml"):
        settings = yaml.safe_load(file.read_text())
        sizes = settings.get("parallel", {}).items()
        layout = Layout(**{key: size for key, size in sizes if key in ("tp", "pp", "vpp", "ep", "etp")})
        found[Path(settings["model"]["path"]).name] = layout
    return {name: layout for name, layout in found.items() if name in CONFIGS}


def transformers_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """The published files' tensors, from transformers' own model of the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[name])
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    found = {}
    for key, tensor in state.items():
        shape = tuple(tensor.shape)
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        prefix, fused, _ = key.partition("experts.gate_up_proj")
        if fused:  # in memory transformers 5 stacks the experts; in files they are apart
            for e in range(shape[0]):
                for half in ("gate", "up"):
                    found[f"{prefix}experts.{e}.{half}_proj.weight"] = (shape[1] // 2, shape[2])
        elif key.endswith("experts.down_proj"):
            found |= {key.replace("experts.", f"experts.{e}.") + ".weight": shape[1:] for e in range(shape[0])}
        else:
            found[key] = shape
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_mapped_once(name: str) -> None:
    """The rules' tensors are exactly transformers' (two independent sources), none twice, in the published number."""
    shape = read_shape(CONFIGS[name])
    for spec in ("local", "te"):
        owned = [rule for rule in rules(shape, spec) if not rule.copy]
        parts = [part for rule in owned for part in rule.parts]
        assert max(Counter(part.name for part in parts).values()) == 1
        assert max(Counter(rule.megatron for rule in owned).values()) == 1
        assert {part.name: part.shape for part in parts} == transformers_tensors(name)
    assert shape.parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_covers_every_value_once(name: str) -> None:
    """On many GPUs' layouts each tensor lies in one pipeline chunk (and expert rank), and its shards tile it."""
    assert_covered(name, LAYOUTS[name])


def test_the_layouts_of_the_slurm_scripts_cover_every_value_once() -> None:
    """The same, read from the settings of the five scripts."""
    layouts = cluster_layouts()
    assert sorted(layouts) == ["Qwen3-235B-A22B", "Qwen3-30B-A3B", "Qwen3-32B", "Qwen3-4B", "Qwen3-8B"]
    for name, layout in layouts.items():
        assert_covered(name, [layout])


def assert_covered(name: str, layouts: list[Layout]) -> None:
    shape = read_shape(CONFIGS[name])
    for layout in layouts:
        every = rules(shape, "te", padded_vocab(shape.vocab, layout.tp, 128))
        held = Counter(
            rule.megatron
            for chunk in chunks(shape, layout)
            for ep_rank in range(layout.ep)
            for rule in local_rules(every, shape, layout, chunk.pp_rank, chunk.index, ep_rank).values()
            if rule.expert is not None or ep_rank == 0
        )
        expected = {rule.megatron for rule in every if not rule.copy or layout.pp > 1}
        assert held.keys() == expected and set(held.values()) == {1}
        for rule in every:
            assert_shards_tile(rule, layout)
        for rule in (rule for rule in every if rule.layer in (None, 0) and rule.expert in (None, 0)):
            assert_fuses(rule, shape, layout)


def assert_shards_tile(rule: Rule, layout: Layout) -> None:
    size = layout.shards(rule)
    by_rank = [rule.slices(rank, size) for rank in range(size)]
    for part in rule.parts:
        for dim, n in enumerate(part.shape):
            ranges = [slices[part.name][dim] for slices in by_rank]
            if dim == rule.partition:
                assert [r.start for r in ranges] == [0, *(r.stop for r in ranges[:-1])] and ranges[-1].stop == n
            else:
                assert all((r.start, r.stop) == (0, n) for r in ranges)


def assert_fuses(rule: Rule, shape: ModelShape, layout: Layout) -> None:
    size = layout.shards(rule)
    hf = {part.name: torch.empty(part.shape, device="meta") for part in rule.parts}
    shards = []
    for rank in range(size):
        pieces = {name: hf[name][index] for name, index in rule.slices(rank, size).items()}
        shards.append(rule.fuse(pieces, size))
        assert shards[-1].shape == rule.shape(size)
    back = rule.split(rule.unshard(shards))
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in hf.items()}
