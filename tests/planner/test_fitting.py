"""What `--dry-run` says about memory: which GPUs a run fits on, and what overflows where none does."""

import pytest

from megarl.config import parse
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.planner.fitting import fitting

QWEN_32B = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6, "tie_word_embeddings": False,
}  # fmt: skip
TREE = {
    "run": "run", "model": {"path": "model"}, "data": {"train": ["x.jsonl"]}, "batch": {"tokens_per_row": 18432},
}  # fmt: skip


def settings(flags=("--tp-size", "4"), **parallel):
    servers = {"flags": list(flags), "addresses": ["http://10.0.0.1:30000"]}
    parallel = {"tp": 4, "pp": 4, "recompute": "full", **parallel}
    return parse({**TREE, "parallel": parallel, "rollout": {"engine": "sglang", "servers": servers}})


def test_a_run_names_the_gpus_that_hold_it():
    """512 GB of state over 16 ranks, with recomputation: more than 40 GB a card, less than 80."""
    said = fitting(settings(), read_shape(QWEN_32B), 16)
    assert "most of it optimizer" in said and " h100" in said and "a100-40gb" not in said


def test_a_run_that_no_gpu_holds_is_refused_by_the_name_of_what_overflows():
    with pytest.raises(UserError, match=r"needs .* GiB of .*, most of it optimizer .*; no layout fits; use more GPUs"):
        fitting(settings(tp=1, pp=1), read_shape(QWEN_32B), 1)
    with pytest.raises(UserError, match=r"most of it activations .*nearest layout that fits: parallel.tp="):
        fitting(settings(recompute="none", tp=1, pp=1), read_shape(QWEN_32B), 16)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tp-size", "3"], "size 3 does not divide the model's 64 heads; nearest valid value: 2"),
        (["--tp=x"], "size x"),
        (["--mem-fraction-static=1.5"], "1.5 is not between 0 and 1"),
    ],
)
def test_engine_flags_that_cannot_start_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        fitting(settings(flags), read_shape(QWEN_32B), 16)
