"""Memory: hand counts of parameters and activations, schedules, and what fits. Against real models: test_count.py."""

from dataclasses import replace

import pytest

from megarl.learner import logprobs
from megarl.models.shape import Experts, ModelShape
from megarl.planner.hardware import GIB, GPUS
from megarl.planner.layout import Layout, Software
from megarl.planner.memory import (
    LOSS_CHUNK,
    LOSS_KEPT,
    PERSISTENT,
    fits,
    in_flight,
    layer_bytes,
    plan_memory,
    stage_holdings,
)

LLAMA = ModelShape(layers=32, hidden=4096, heads=32, kv_groups=8, head_dim=128, ffn=14336, vocab=128256)
MOE = replace(LLAMA, moe=Experts(16, top_k=2, ffn=2048, dense_layers=2))


def test_parameters_of_llama_8b():
    """The published count, to the parameter: 8,030,261,248."""
    assert LLAMA.parameters() == 8_030_261_248


@pytest.mark.parametrize("shape", [LLAMA, MOE])
@pytest.mark.parametrize("layout", [Layout(gpus=1), Layout(gpus=8, tp=2, pp=4), Layout(gpus=8, pp=8)])
def test_stages_hold_the_whole_model(shape, layout):
    """Summed over stages and tensor ranks, what ranks hold is the model; norms and routers are on every tensor rank."""
    held = stage_holdings(shape, layout)
    copies = (layout.tp - 1) * (shape.layers * 2 + 1) * shape.hidden
    copies += (layout.tp - 1) * shape.moe_layers * shape.hidden * (shape.moe.count if shape.moe else 0)
    total = layout.tp * sum(h.shared for h in held) + sum(h.experts for h in held)
    assert total == shape.parameters() + copies


def test_activations_of_a_gpt_layer_match_korthikanti():
    """34 s b h bytes of a GPT layer without attention scores, less the dropout masks (3 s b h) that we do not keep."""
    gpt = ModelShape(layers=1, hidden=1024, heads=8, kv_groups=8, head_dim=128, ffn=4096, vocab=1024, gated=False)
    layout = Layout(gpus=1, sequence=2048)
    kept = layer_bytes(gpt, layout, Software(), False) / (2048 * 1024)
    # norms 4 x 2, q k v 3 x 2, attention output twice, fc1 out and fc2 in 2 x 4 x 2, and 4 bytes a head of statistics
    assert kept == pytest.approx(8 + 6 + 4 + 16 + 4 * 8 / 1024)


def test_a_layer_without_fused_kernels_keeps_what_autograd_was_seen_to_save():
    """Summed over the storages that torch's saved-tensor hooks reported for one layer of the learner on a CPU: 8,024
    bytes a token, of which 56 are statistics of the norms that the planner leaves out."""
    small = ModelShape(layers=2, hidden=64, heads=8, kv_groups=4, head_dim=16, ffn=192, vocab=510, qk_norm=True)
    software = Software(dtype="fp32", cpu=True)
    assert layer_bytes(small, Layout(gpus=1, sequence=512), software, False) == 512 * (8024 - 56)


def test_the_chunked_loss_keeps_logits_of_a_chunk_only():
    """Twice the tokens, twice the whole logits but not the chunk; the bound is the learner's own."""
    assert (LOSS_CHUNK, LOSS_KEPT) == (logprobs.CHUNK_BYTES, logprobs.KEEP_BYTES)
    software = Software(chunked_loss=True)
    short, long = (plan_memory(LLAMA, Layout(gpus=1, sequence=n), software)[0].parts["logits"] for n in (16384, 32768))
    assert long - short == 16384 * 2 * LLAMA.hidden  # the gradients of the hidden states
    assert long < 0.5 * plan_memory(LLAMA, Layout(gpus=1, sequence=32768), Software())[0].parts["logits"]


def test_in_flight_micro_batches_of_1f1b_and_of_the_interleaved_schedule():
    layout = Layout(gpus=4, pp=4, global_batch=16)
    assert [in_flight(layout, s) for s in range(4)] == [4, 3, 2, 1]
    assert in_flight(replace(layout, vpp=2), 0) == (2 * 3 + 4 + 1) / 2
    assert in_flight(replace(layout, global_batch=2), 0) == 2


def test_full_recomputation_sequence_parallelism_and_sharding_save_memory():
    layout = Layout(gpus=8, tp=4, global_batch=8, sequence=8192)
    plain = plan_memory(LLAMA, layout, Software())[0]
    for software in (
        Software(recompute="full"),
        Software(recompute="selective"),
        Software(dtype="fp8"),
        Software(gradient_bytes=2.0),
    ):
        assert plan_memory(LLAMA, layout, software)[0].allocated < plain.allocated
    for software in (
        Software(sequence_parallel=False),
        Software(distributed_optimizer=False),
        Software(attention="unfused"),
        Software(fused=False),
        Software(parallel_loss=False),
        Software(dtype="fp32"),
    ):
        assert plan_memory(LLAMA, layout, software)[0].allocated > plain.allocated


def test_a_70b_model_needs_more_than_one_card():
    """Weights, gradients and Adam of 70e9 parameters are 18 bytes each, 1.2 TiB: no card holds that; 64 do."""
    big = ModelShape(layers=80, hidden=8192, heads=64, kv_groups=8, head_dim=128, ffn=28672, vocab=128256)
    one = Layout(gpus=1)
    stages = plan_memory(big, one, Software())
    assert sum(stages[0].parts.get(p, 0.0) for p in PERSISTENT) == 18 * big.parameters()
    assert stages[0].largest == "optimizer"
    assert stages[0].allocated > 1100 and 18 * big.parameters() > 1100 * GIB
    assert not fits(stages, one, GPUS["b300"])
    many = Layout(gpus=64, tp=8, pp=4, global_batch=64)
    assert fits(plan_memory(big, many, Software()), many, GPUS["h100"])
