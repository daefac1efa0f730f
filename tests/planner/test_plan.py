"""`megarl plan` on small models: exact counts, refusals that name what overflows, search. Times are not judged here."""

import json
import multiprocessing
import xml.etree.ElementTree as tree

import pytest

from megarl.config import Parallel, parse
from megarl.errors import UserError
from megarl.learner.model import vocabulary_rows
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.layout import Layout as Divisions
from megarl.models.layout import local_rules
from megarl.planner import command
from megarl.planner.count import build_stages
from megarl.planner.hardware import gpu
from megarl.planner.job import plan
from megarl.planner.search import nearest_fit, ranked

pytestmark = pytest.mark.slow

QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 96, "vocab_size": 250, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": False,
}  # fmt: skip
MOE = QWEN | {
    "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}  # fmt: skip
QWEN2 = QWEN | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
LLAMA = QWEN | {"architectures": ["LlamaForCausalLM"]}
QWEN_32B = QWEN | {
    "num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 25600, "vocab_size": 151936,
}  # fmt: skip
CASES = [
    (QWEN, Parallel(), 1),
    (QWEN, Parallel(tp=2, pp=4, vpp=2), 32),
    (QWEN2, Parallel(tp=4, pp=2), 16),
    (LLAMA, Parallel(tp=2, pp=2, cp=2), 16),
    (MOE, Parallel(ep=4), 8),
    (MOE, Parallel(tp=2, ep=4, etp=1), 16),
    (MOE, Parallel(tp=2, pp=2, ep=2), 1024),
]


def settings(folder, **more):
    return parse({"run": str(folder / "run"), "model": {"path": str(folder)}, "data": {"train": ["x.jsonl"]}, **more})


@pytest.mark.parallel
def test_counts_of_the_real_model_are_exactly_the_maps():
    """Megatron's own modules, built for the first, a middle and the last stage of worlds of up to 1,024 ranks, hold
    exactly the parameters that the checkpoint map places there: four families, tied embeddings, pipelines, experts."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for config, parallel, gpus in CASES:
            shape = read_shape(config)
            layout = Divisions(parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.etp)
            held = pool.apply_async(build_stages, (shape, parallel, gpus)).get(timeout=200)
            for stage, holding in enumerate(held):
                wanted = {True: 0, False: 0}
                every = rules(shape, "local", vocabulary_rows(shape, parallel.tp))
                for chunk in range(parallel.vpp):
                    for rule in local_rules(every, shape, layout, stage, chunk).values():
                        size = 1
                        for n in rule.shape(layout.shards(rule)):
                            size *= n
                        wanted[rule.expert is not None] += size
                apart = parallel.ep > 1  # without expert parallelism Megatron reduces experts like the rest
                assert holding.experts == (wanted[True] if apart else 0), (config["architectures"], stage)
                assert holding.shared == wanted[False] + (0 if apart else wanted[True]), (
                    config["architectures"],
                    stage,
                )


def settings_of_32b(**parallel):
    return parse(
        {
            "run": "run",
            "model": {"path": "model"},
            "data": {"train": ["x.jsonl"]},
            "parallel": {"tp": 8, "pp": 4, **parallel},
            "rollout": {"engine": "sglang", "servers": {"flags": ["--tp-size 8", "--mem-fraction-static=0.3"]}},
        }
    )


def test_what_does_not_fit_is_named_and_a_neighbour_is_offered():
    """Qwen3-32B on one H100 tensor group needs 600 GB of state: refused, with a layout that does fit."""
    shape, card = read_shape(QWEN_32B), gpu("h100")
    wanted = settings_of_32b(pp=1)
    result = plan(wanted, shape, card, 64)
    other = nearest_fit(wanted, shape, card, 64, None)
    assert not result.fits and other is not None and other.fits
    message = command.refusal(result, other)
    assert "stage 0" in message and result.peak.largest in message and "parallel.pp=" in message
    assert "use more GPUs" in command.refusal(result, None)
    assert nearest_fit(settings_of_32b(), shape, card, 8, None) is None


def test_search_ranks_only_what_fits():
    shape, card = read_shape(QWEN_32B), gpu("b200")
    found = ranked(settings_of_32b(), shape, card, 64, 8000)
    assert found and all(p.fits for p in found)
    times = [p.seconds["logprobs"] + p.seconds["train"] for p in found]
    assert times == sorted(times)


def test_a_colocated_engine_takes_memory_and_a_remote_one_does_not():
    shape, card = read_shape(QWEN_32B), gpu("h100")
    here = plan(settings_of_32b(), shape, card, 64)
    there = settings_of_32b()
    there.rollout.servers.addresses = ["http://10.0.0.1:30000"]
    away = plan(there, shape, card, 64)
    assert here.peak.parts["engine_weights"] + here.peak.parts["kv_cache"] == pytest.approx(0.3 * card.memory * 2**30)
    assert "engine_weights" not in away.peak.parts
    assert away.seconds["rollout"] > here.seconds["rollout"]


def test_a_kl_term_keeps_a_second_copy_of_the_weights():
    shape, card = read_shape(QWEN_32B), gpu("h100")
    kl = settings_of_32b()
    kl.algorithm.kl.coef = 0.01
    for without, stage in zip(
        plan(settings_of_32b(), shape, card, 64).stages, plan(kl, shape, card, 64).stages, strict=True
    ):
        assert stage.parts["reference"] == stage.parts["weights"]
        assert stage.allocated == pytest.approx(without.allocated + stage.parts["weights"] / 2**30)


def test_sizes_that_cannot_be_laid_out_name_the_nearest():
    shape = read_shape(QWEN_32B)
    with pytest.raises(UserError, match="gpus: 40 .*nearest valid number: 32"):
        plan(settings_of_32b(), shape, gpu("h100"), 40)


def test_more_work_takes_more_time():
    """KL adds a pass over the reference, more updates one over the old policy; longer responses cost everywhere."""
    shape, card = read_shape(QWEN_32B), gpu("h100")
    plain = plan(settings_of_32b(), shape, card, 64, 4000)
    kl = settings_of_32b()
    kl.algorithm.kl.coef = 0.01
    assert plain.seconds["logprobs"] == 0 < plan(kl, shape, card, 64, 4000).seconds["logprobs"]
    longer = plan(settings_of_32b(), shape, card, 64, 8000)
    assert all(longer.seconds[p] > plain.seconds[p] for p in ("rollout", "train"))


@pytest.mark.parallel
def test_the_command_writes_a_plan_and_a_picture(tmp_path):
    """From a YAML file to a table, JSON with every stage, and a well-formed picture."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    (tmp_path / "run.yaml").write_text(
        f"run: {tmp_path}/run\nmodel: {{path: {tmp_path}}}\ndata: {{train: [x.jsonl]}}\n"
        "batch: {tokens_per_row: 512}\n"
        "rollout: {max_response_tokens: 256}\n"
    )
    command.main(
        tmp_path / "run.yaml", ["parallel.pp=4"], gpus=8, json=tmp_path / "plan.json", chart=tmp_path / "plan.svg"
    )
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["fits"] and len(result["stages"]) == 4 and result["parameters_counted_on_the_model"]
    assert set(result["seconds"]) == {"rollout", "logprobs", "train", "sync"}
    assert tree.fromstring((tmp_path / "plan.svg").read_text()).tag.endswith("svg")
