"""The map is a bijection: sharded by any layout and gathered back, every byte of every tensor is where it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megarl.errors import UserError
from megarl.models.families import FAMILIES, rules
from megarl.models.layout import Layout, chunks, local_rules, padded_vocab
from megarl.models.rules import Rule, Spec
from megarl.models.shape import ModelShape
from tests.support.random_models import LAYOUTS, Case, cases
from tests.support.tiny_models import ARCHITECTURES, tiny, weights


def scatter(hf: dict[str, Tensor], shape: ModelShape, layout: Layout, spec: Spec) -> dict[tuple, dict[str, Tensor]]:
    """(tp rank, stage, chunk, ep rank) → its tensors by local name, made from slices of the HF tensors only."""
    every = rules(shape, spec, padded_vocab(shape.vocab, layout.tp))
    ranks = {}
    for chunk in chunks(shape, layout):
        for ep_rank in range(layout.ep):
            local = local_rules(every, shape, layout, chunk.pp_rank, chunk.index, ep_rank)
            for tp_rank in range(layout.tp):
                held = {}
                for name, rule in local.items():
                    size = layout.shards(rule)
                    pieces = {part: hf[part][index] for part, index in rule.slices(tp_rank, size).items()}
                    held[name] = rule.fuse(pieces, size)
                    assert held[name].shape == rule.shape(size)
                ranks[tp_rank, chunk.pp_rank, chunk.index, ep_rank] = held
    return ranks


def gather(ranks: dict[tuple, dict[str, Tensor]], shape: ModelShape, layout: Layout, spec: Spec) -> dict[str, Tensor]:
    """The inverse, checking that tensors which two ranks hold are equal and that the two ways of sharding agree."""
    every = rules(shape, spec, padded_vocab(shape.vocab, layout.tp))
    hf: dict[str, Tensor] = {}
    for chunk in chunks(shape, layout):
        for ep_rank in range(layout.ep):
            for name, rule in local_rules(every, shape, layout, chunk.pp_rank, chunk.index, ep_rank).items():
                shards = [ranks[tp, chunk.pp_rank, chunk.index, ep_rank][name] for tp in range(layout.tp)]
                full = rule.unshard(shards)
                assert full.shape == rule.shape()
                for rank, shard in enumerate(shards):
                    assert torch.equal(rule.shard(full, rank, layout.tp), shard), name
                for part, tensor in rule.split(full).items():
                    assert part not in hf or torch.equal(hf[part], tensor), part
                    hf[part] = tensor
    return hf


def assert_round_trip(shape: ModelShape, layout: Layout, spec: Spec, dtype: torch.dtype = torch.float32) -> None:
    before = weights(shape, dtype)
    after = gather(scatter(before, shape, layout, spec), shape, layout, spec)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_round_trips(family: str, tied: bool) -> None:
    """Every (tp, pp, vpp, ep) in {1,2,4}x{1,2,4}x{1,2}x{1,2} that the model allows, an odd vocabulary, TE and local
    names. Does not prove that Megatron means the same by its names: test_megatron.py and test_real_weights.py do."""
    for layout in LAYOUTS:
        shape = tiny(family, tie_word_embeddings=tied, num_hidden_layers=layout.pp * layout.vpp)
        if layout.ep > 1 and shape.moe is None:
            continue
        for spec in ("local", "te"):
            assert_round_trip(shape, layout, spec)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_random_configs_round_trip(case: Case) -> None:
    """Random sizes, layouts and types in memory; test_conversion.py takes fewer through files."""
    assert_round_trip(tiny(case.family, **case.sizes), case.layout, case.spec, case.dtype)


def test_query_key_value_order() -> None:
    """The fused rows are, group by group, the group's queries, its key, its value: Megatron's own view of them."""
    shape = tiny("qwen3", num_attention_heads=4, num_key_value_heads=2, head_dim=1)
    rule = next(rule for rule in rules(shape) if rule.megatron.endswith("0.self_attention.linear_qkv.weight"))
    rows = {"q": [0, 1, 2, 3], "k": [10, 11], "v": [20, 21]}
    parts = {
        name: torch.tensor(rows[x])[:, None].expand(-1, shape.hidden) for name, x in zip(rule.hf, "qkv", strict=True)
    }
    assert rule.fuse(parts)[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_padding_is_zero_and_is_cut() -> None:
    shape = tiny("llama", vocab_size=5)
    embedding = rules(shape, vocab_rows=padded_vocab(5, tp=4))[0]
    hf = {embedding.hf[0]: torch.ones(5, shape.hidden)}
    pieces = [{name: hf[name][index] for name, index in embedding.slices(rank, 4).items()} for rank in range(4)]
    shards = [embedding.fuse(piece, 4) for piece in pieces]
    assert [float(shard[:, 0].sum()) for shard in shards] == [2, 2, 1, 0]
    assert torch.equal(embedding.split(embedding.unshard(shards))[embedding.hf[0]], hf[embedding.hf[0]])


def test_rules_work_on_meta_tensors() -> None:
    shape = tiny("qwen3_moe")
    for rule in rules(shape):
        parts = {part.name: torch.empty(part.shape, device="meta") for part in rule.parts}
        full = rule.fuse(parts)
        assert full.is_meta and full.shape == rule.shape()
        assert {name: t.shape for name, t in rule.split(full).items()} == {name: t.shape for name, t in parts.items()}


def test_tied_copy_only_on_a_last_stage_that_has_no_embedding() -> None:
    shape = tiny("qwen3", tie_word_embeddings=True)

    def holders(layout: Layout) -> list[tuple[int, int]]:
        return [
            (chunk.pp_rank, chunk.index)
            for chunk in chunks(shape, layout)
            if "output_layer.weight" in local_rules(rules(shape), shape, layout, chunk.pp_rank, chunk.index)
        ]

    assert holders(Layout()) == []
    assert holders(Layout(pp=2, vpp=2)) == [(1, 1)]


@pytest.mark.parametrize(
    ("layout", "family", "message"),
    [
        (Layout(tp=8), "qwen3", "tp: 8 does not divide the 4 key/value groups; nearest valid value: 4"),
        (Layout(pp=3), "qwen3", "pp: 3 does not divide the 4 layers; nearest valid value: 2"),
        (Layout(vpp=2), "qwen3", "vpp: 2: needs pp > 1"),
        (Layout(pp=2, vpp=4), "qwen3", "vpp: 4 does not divide the 2 layers of each of 2 pipeline stages"),
        (Layout(ep=2), "qwen3", "ep: 2: the model has no experts"),
        (Layout(ep=3), "qwen3_moe", "ep: 3 does not divide the 4 experts; nearest valid value: 2"),
    ],
)
def test_impossible_layouts_are_refused(layout: Layout, family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layout.check(tiny(family))


def test_an_unsplittable_rule_is_refused() -> None:
    rule: Rule = rules(tiny("qwen3", num_attention_heads=3, num_key_value_heads=3))[2]
    with pytest.raises(UserError, match="linear_qkv"):
        rule.slices(0, 2)


def test_every_family_is_walked() -> None:
    """A family added to the registry without a tiny config here would silently escape these tests."""
    assert sorted(ARCHITECTURES) == sorted(FAMILIES)
