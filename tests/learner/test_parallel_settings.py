"""Settings of `parallel` that Megatron would ignore, or fail on late: refused in one line."""

import pytest

from megarl.bench.common.models import write_model
from megarl.config import Parallel, Precision
from megarl.errors import UserError
from megarl.learner import parallel
from megarl.learner.model import transformer_config
from megarl.learner.rows import Alignment
from megarl.models.config_json import read_shape
from megarl.runtime import device


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return read_shape(folder)


@pytest.mark.skipif(device.transformer_engine(), reason="refused only where Transformer Engine is not")
@pytest.mark.parametrize(
    "setting",
    [
        {"overlap_tp": True, "tp": 2},
        {"gradient_accumulation_fusion": True},
        {"cp_comm": "a2a", "cp": 2},
        {"offload_optimizer": 0.5},
        {"offload_layers": 1},
        {"recompute_modules": ["layernorm"], "recompute": "selective"},
    ],
)
def test_what_needs_cuda_is_refused_without_it(setting):
    with pytest.raises(UserError, match=f"parallel.{next(iter(setting))}: .* needs a CUDA device .* valid value"):
        parallel.check_device(Parallel(**setting))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"overlap_tp": True}, "sequence parallelism"),
        ({"overlap_tp": True, "tp": 2, "cp": 2}, "cp 1"),
        ({"cp_comm": "a2a", "cp": 8}, "nearest valid value: p2p"),
        ({"offload_layers": 1, "pp": 2}, "needs pp 1"),
        ({"offload_layers": 1, "recompute": "full"}, "recompute none"),
        ({"offload_layers": 4}, "nearest valid value: 3"),
        ({"offload_optimizer": 1.0, "distributed_optimizer": False}, "distributed_optimizer"),
        ({"etp": 2}, "no experts"),
        ({"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}, "no experts; nearest valid value: mlp"),
    ],
)
def test_what_megatron_cannot_combine_is_refused_early(shape, setting, words):
    with pytest.raises(UserError, match=words):
        parallel.check(Parallel(**setting), shape)


def test_each_setting_reaches_megatrons_configuration(shape):
    """Names and values that Megatron accepts; what it then does on a GPU is for tests/gpu."""
    precision = Precision(dtype="bf16")
    plain = transformer_config(shape, Parallel(pp=2, vpp=2), precision)
    assert plain.overlap_p2p_comm and not (plain.tp_comm_overlap or plain.cpu_offloading)
    assert not transformer_config(shape, Parallel(pp=2, vpp=2, overlap_p2p=False), precision).overlap_p2p_comm
    assert transformer_config(shape, Parallel(tp=2, overlap_tp=True), precision).tp_comm_overlap
    away = transformer_config(shape, Parallel(offload_layers=2), precision)
    assert away.cpu_offloading and away.cpu_offloading_num_layers == 2
    chosen = Parallel(recompute="selective", recompute_modules=["layernorm", "mlp"])
    assert transformer_config(shape, chosen, precision).recompute_modules == ["layernorm", "mlp"]


def test_rows_have_one_length_under_user_buffers():
    fixed = Alignment.of(Parallel(tp=2, overlap_tp=True), Precision(dtype="fp8"), 1000)
    assert fixed.row == 1024  # 1000 tokens, in multiples of 2 x 16
    assert Alignment.of(Parallel(tp=2), Precision(dtype="fp8"), 1000).row == 32
