"""Step time: closed forms where they exist, and the direction of every effect. Accuracy is `megarl bench planner`'s."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.errors import UserError
from megarl.models.shape import Experts, ModelShape
from megarl.planner.hardware import GPUS, LAWS, gpu
from megarl.planner.layout import Layout, Software
from megarl.planner.steptime import PARTS, Clock, model_flops, step_time

LLAMA = ModelShape(layers=32, hidden=4096, heads=32, kv_groups=8, head_dim=128, ffn=14336, vocab=128256)
MOE = replace(LLAMA, moe=Experts(64, top_k=4, ffn=1024, dense_layers=1))
BASE = Layout(gpus=64, tp=4, pp=4, micro_batch=1, global_batch=128, sequence=4096)
H100 = GPUS["h100"]


def test_model_flops_are_six_per_parameter_and_token_plus_causal_attention():
    """Megatron's own count, by hand. Proves the formula, not the hardware."""
    layout = replace(BASE, global_batch=1)
    weights = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336) + 4096 * 128256
    scores = 32 * (4096 // 2) * 4096 * 2
    assert model_flops(LLAMA, layout) == pytest.approx(6 * 4096 * (weights + scores))


def test_bubble_of_a_pipeline_without_communication():
    """With equal stages the bubble is (p - 1) / (v m) of the busy time (Narayanan et al. 2021)."""
    shape = replace(LLAMA, vocab=128)  # next to no head: equal stages
    plain = step_time(shape, BASE, Software(), H100)
    interleaved = step_time(shape, replace(BASE, vpp=4), Software(), H100)
    m = BASE.micro_batches
    busy = sum(plain.parts[p] for p in ("matmul", "attention", "elementwise", "launch", "tensor_parallel"))
    assert plain.parts["bubble"] == pytest.approx(busy * 3 / m, rel=0.01)
    assert interleaved.parts["bubble"] == pytest.approx(plain.parts["bubble"] / 4)


def test_parts_are_named_and_not_negative():
    for shape in (LLAMA, MOE):
        for software in (Software(), Software(recompute="full"), Software(fsdp=True), Software(dtype="fp8")):
            result = step_time(shape, replace(BASE, ep=4), software, H100)
            assert set(result.parts) == set(PARTS)
            assert min(result.parts.values()) >= 0
            assert result.seconds == pytest.approx(sum(result.parts.values()))


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (Software(recompute="full"), Software()),
        (Software(tp_overlap=False), Software()),
        (Software(attention="unfused"), Software(attention="flash")),
        (Software(attention="flash1"), Software(attention="flash")),
        (Software(fused=False), Software()),
        (Software(), Software(dtype="fp8")),
        (Software(), Software(graphs=True)),
        (Software(gradient_fusion=False), Software()),
        (Software(offload_optimizer=1.0), Software()),
        (Software(offload_layers=31), Software()),
    ],
)
def test_each_switch_moves_time_the_right_way(slow, fast):
    """Every software switch does something, in the known direction."""
    assert step_time(LLAMA, BASE, slow, H100).seconds > step_time(LLAMA, BASE, fast, H100).seconds


@pytest.mark.parametrize("switch", ["node_dispatch", "ep_overlap", "fused_experts"])
def test_each_expert_switch_saves_time(switch):
    layout = replace(BASE, tp=1, ep=16)
    on = step_time(MOE, layout, Software(**{switch: True}), H100).seconds
    assert on < step_time(MOE, layout, Software(), H100).seconds


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_twice_the_batch_takes_longer_but_not_more_than_twice(tp, pp, micro):
    layout = Layout(gpus=64, tp=tp, pp=pp, micro_batch=micro, global_batch=64 * micro, sequence=2048)
    once = step_time(LLAMA, layout, Software(), H100).seconds
    twice = step_time(LLAMA, replace(layout, global_batch=128 * micro), Software(), H100).seconds
    assert once < twice <= 2 * once


def test_utilisation_is_below_what_a_bare_matmul_reaches():
    """No layout may beat the fraction of peak that its own matrix products reach."""
    for name, card in GPUS.items():
        result = step_time(LLAMA, BASE, Software(), card)
        assert 0.05 < result.mfu(64, card) < LAWS.efficiency(card.architecture).bf16, name


def test_traffic_inside_the_nvlink_domain_is_cheaper():
    clock = Clock(H100, Software(), LAWS)
    assert clock.link(8) > clock.link(16, 8) > 0
    assert clock.ring(1e9, 8) < clock.ring(1e9, 16, 8)
    assert clock.ring(1e9, 1) == 0


def test_unknown_gpu_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'h100'"):
        gpu("h1000")
