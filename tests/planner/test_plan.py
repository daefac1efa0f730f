"""`megarl plan` on small models: exact counts, refusals that name what overflows, search. Times are not judged here."""

import json
import multiprocessing
import xml.etree.ElementTree as tree
from pathlib import Path

import pytest
import torch

from megarl.config import Parallel, load, parse
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
from megarl.planner.published import PUBLISHED, shape_of
from megarl.planner.search import nearest_fit, ranked
from megarl.rollout.local.decoder import Decoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

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
    """Qwen3-32B without tensor or pipeline parallelism needs 200 GB a rank: refused, with a layout that does fit."""
    shape, card = read_shape(QWEN_32B), gpu("h100")
    wanted = settings_of_32b(tp=1, pp=1)
    result = plan(wanted, shape, card, 64)
    other = nearest_fit(wanted, shape, card, 64, None)
    assert not result.fits and other is not None and other.fits
    message = command.refusal(result, other)
    assert "stage 0" in message and result.peak.largest in message and "parallel.pp=" in message
    assert "use more GPUs" in command.refusal(result, None)
    assert nearest_fit(settings_of_32b(), shape, card, 4, None) is None


def test_search_ranks_only_what_fits():
    shape, card = read_shape(QWEN_32B), gpu("b200")
    found = ranked(settings_of_32b(), shape, card, 64, 8000)
    assert found and all(p.fits for p in found)
    times = [p.seconds["logprobs"] + p.seconds["train"] for p in found]
    assert times == sorted(times)


def test_servers_take_no_memory_of_the_learners_gpus():
    """They have GPUs of their own: as many as the learner, or those of their addresses."""
    shape, card = read_shape(QWEN_32B), gpu("h100")
    many = plan(settings_of_32b(), shape, card, 64)
    named = settings_of_32b()
    named.rollout.servers.addresses = ["http://10.0.0.1:30000"]
    one = plan(named, shape, card, 64)
    for result, engines in ((many, 8), (one, 1)):
        assert result.engine.engines == engines
        assert not {"engine_weights", "kv_cache"} & set(result.peak.parts)
    assert one.seconds["rollout"] > many.seconds["rollout"]


@pytest.mark.parametrize("config", [QWEN, MOE])
def test_an_embedded_engine_has_all_weights_and_its_whole_cache_on_every_gpu(config):
    """Counted on the engine that a run of these settings makes, whatever tp and pp divide."""
    shape = read_shape(config)
    wanted = settings(
        Path("model"), parallel={"tp": 2, "pp": 2}, precision={"dtype": "fp32"}, batch={"tokens_per_row": 1024},
        rollout={"max_response_tokens": 100, "local_max_sequences": 5},
    )  # fmt: skip
    decoder = Decoder(shape, torch.device("cpu"), torch.float32, 5 + 1, wanted.longest_sequence)
    parts = plan(wanted, shape, gpu("h100"), 8).peak.parts
    assert parts["kv_cache"] == sum(t.nbytes for t in (*decoder.cache.keys, *decoder.cache.values))
    assert parts["engine_weights"] == sum(t.nbytes for t in decoder.weights().values())


def test_a_cache_that_does_not_fit_names_the_sequences_that_do():
    """The nearest value of `rollout.local_max_sequences` fits, and one more does not."""
    shape, card = read_shape(json.loads((PUBLISHED / "Qwen3-4B" / "config.json").read_text())), gpu("h100")

    def with_sequences(number):
        rollout = {"max_response_tokens": 16384, "local_max_sequences": number}
        batch = {"tokens_per_row": 18432}
        return plan(settings(Path("model"), rollout=rollout, batch=batch, parallel={"cp": 4}), shape, card, 64)

    too_many = with_sequences(64)
    nearest = int(command.refusal(too_many, None).rpartition("local_max_sequences=")[2])
    assert not too_many.fits and with_sequences(nearest).fits and not with_sequences(nearest + 1).fits


@pytest.mark.parametrize("name", ["qwen3_4b", "qwen3_8b", "qwen3_32b", "qwen3_30b_a3b", "qwen3_235b_a22b"])
@pytest.mark.parametrize("card", ["h100", "h200", "b200"])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_shipped_configurations_fit_as_they_are(name, card, fp8):
    """By the published sizes: there is no model folder. FP8 is not slower, and said with its recipe."""
    gpus = {"qwen3_4b": 8, "qwen3_8b": 8, "qwen3_32b": 16, "qwen3_30b_a3b": 16, "qwen3_235b_a22b": 128}[name]
    wanted = load(ROOT / "slurm" / "configs" / f"{name}.yaml", ["precision.dtype=fp8"] if fp8 else [])
    result = plan(wanted, shape_of(wanted.model.path), gpu(card), gpus)
    assert result.fits, command.refusal(result, None)
    assert result.precision.startswith(wanted.precision.dtype)


def test_published_sizes_are_the_published_ones():
    """Parameters, to the last, of the five models."""
    counts = {path.parent.name: read_shape(path).parameters() for path in PUBLISHED.glob("*/config.json")}
    assert counts == {
        "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360, "Qwen3-32B": 32_762_123_264,
        "Qwen3-30B-A3B": 30_532_122_624, "Qwen3-235B-A22B": 235_093_634_560,
    }  # fmt: skip


def test_fp8_is_priced_by_gpu_layer_by_layer():
    """Faster than bf16, with quantised copies of the weights beside them. Each bf16 layer takes back its part. A GPU
    without the type or the recipe is refused."""
    shape, card = shape_of(Path("models/Qwen3-8B")), gpu("h100")
    base = {"parallel": {"tp": 2, "cp": 4}, "rollout": {"engine": "sglang"}}

    def priced(card=card, **precision):
        return plan(settings(Path("model"), **base, precision=precision), shape, card, 8)

    bf16, fp8, some, all_bf16 = (
        priced(dtype="bf16"),
        *(priced(dtype="fp8", high_precision_layers=n) for n in (0, 2, 18)),
    )
    assert fp8.train.seconds < some.train.seconds < all_bf16.train.seconds == pytest.approx(bf16.train.seconds)
    copies = [p.peak.parts["fp8_weights"] for p in (fp8, some, all_bf16)]
    assert copies[0] > copies[1] > copies[2] == 0
    assert copies[0] == 2 * 36 * (shape.attention_parameters(2) + shape.dense_parameters(2))
    assert {k: v for k, v in all_bf16.peak.parts.items() if k != "fp8_weights"} == bf16.peak.parts
    with pytest.raises(UserError, match=r"precision\.dtype: fp8 does not run on a100; nearest valid value: bf16"):
        priced(gpu("a100"), dtype="fp8")
    with pytest.raises(UserError, match=r"recipe: mxfp8 does not run on h100; nearest valid value: blockwise"):
        priced(dtype="fp8", recipe="mxfp8")
    assert priced(gpu("b200"), dtype="fp8", recipe="mxfp8").precision == "fp8 mxfp8"


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


@pytest.mark.parallel
def test_the_command_plans_a_shipped_configuration(capsys):
    """Without an override, without a model folder: tables that name the precision, no refusal."""
    command.main(ROOT / "slurm" / "configs" / "qwen3_4b.yaml", [], gpus=8, gpu="h200")
    said = capsys.readouterr()
    assert f" in {load(ROOT / 'slurm' / 'configs' / 'qwen3_4b.yaml').precision.dtype}" in said.out + said.err
