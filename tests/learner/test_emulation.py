"""The learner in emulated FP8: it trains as bf16 does, and the layout changes no more than the recipe's rounding."""

import pytest
import torch

from megarl.bench.common.learners import settings
from megarl.bench.common.models import write_model
from megarl.bench.gpu.batches import chain
from megarl.config import Precision
from megarl.learner import precision as precisions
from megarl.models.config_json import read_shape
from megarl.runtime.spawn import spawn

pytestmark = pytest.mark.slow

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
STEPS = 25
TINY = {
    **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64},
}
DEADLINE = 280.0


def _losses(folder, parallel, wanted):
    """Runs on every rank: the loss of each step of supervised training, for each precision."""
    from megarl.learner.learner import Learner, sft_objective
    from megarl.learner.parallel import start

    found = []
    for precision in wanted:
        chosen = settings(folder, parallel, precision=precision, optimizer={"lr": 4e-3})
        world = start(chosen.parallel, chosen.precision, chosen.seed, DEADLINE)
        learner = Learner(chosen, world, total_updates=STEPS)
        batches = [chain(step) if world.is_controller else None for step in range(STEPS)]
        found.append([learner.train_step(batch, sft_objective)["loss"] for batch in batches])
        world.release()
    return found


@pytest.mark.parallel
@pytest.mark.timeout(600)
def test_each_recipe_trains_as_bf16_does_and_tp2_as_tp1(tmp_path):
    """A tiny model learns a noisy chain whose entropy is 1.36 nats: at the end every recipe's loss is within 2 % of
    bf16's without being bf16's, and tp2's within 2 % of tp1's. Says nothing about long runs or large models."""
    write_model(tmp_path, **TINY)
    wanted = [{"dtype": "bf16"}, *({"dtype": "fp8", "recipe": recipe} for recipe in RECIPES)]
    one = spawn(_losses, 1, (tmp_path, {}, wanted), DEADLINE)[0]
    two = spawn(_losses, 2, (tmp_path, {"tp": 2}, wanted), DEADLINE)[0]
    ends = [[sum(losses[-5:]) / 5 for losses in runs] for runs in (one, two)]
    assert ends[0][0] < 2.2  # the tokens alone have 2.77 nats: the chain was learned
    assert ends[0][1:] == pytest.approx([ends[0][0]] * len(RECIPES), rel=0.02)
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
    assert all(losses != one[0] for losses in one[1:])


def _scores(folder, precision):
    """Runs on the rank: log-probs of one sequence, quantised, not quantised, and quantised again."""
    from megarl.learner.learner import Learner
    from megarl.learner.parallel import start

    chosen = settings(folder, {}, precision=precision)
    world = start(chosen.parallel, chosen.precision, chosen.seed, DEADLINE)
    learner = Learner(chosen, world, total_updates=1)
    found = [learner.logprobs(chain(0), "policy", quantised=q)[0].tolist() for q in (True, False, True)]
    world.release()
    return found


@pytest.mark.parallel
@pytest.mark.parametrize("recipe", RECIPES)
def test_scores_that_are_not_quantised_are_bf16s(tmp_path, recipe):
    """What the canary of weight sync compares with the engine: bit by bit a bf16 learner's, and FP8 is back after."""
    write_model(tmp_path, **TINY)
    (bf16, *_) = spawn(_scores, 1, (tmp_path, {"dtype": "bf16"}), DEADLINE)[0]
    quantised, plain, again = spawn(_scores, 1, (tmp_path, {"dtype": "fp8", "recipe": recipe}), DEADLINE)[0]
    assert plain == bf16
    assert quantised != bf16
    assert again == quantised


def test_the_manifest_names_layers_formats_and_blocks(tmp_path):
    write_model(tmp_path)
    shape = read_shape(tmp_path)
    found = precisions.manifest(Precision(dtype="fp8", recipe="blockwise", high_precision_layers=1), shape)
    assert (found["first_layer"], found["last_layer"]) == (1, 2)
    assert found["blocks"] == {"input": [1, 128], "weight": [128, 128], "gradient": [1, 128]}
    assert found["emulated"] is not torch.cuda.is_available()
    assert precisions.manifest(Precision(dtype="bf16"), shape) == {"dtype": "bf16"}
    file = precisions.write_manifest(tmp_path, Precision(dtype="fp8"), shape)
    assert '"tensorwise"' in file.read_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_are_e5m2_save_under_mxfp8(tmp_path, monkeypatch, recipe):
    """In the emulation, in the manifest, and in what megarl asks of Megatron on a GPU. Runs no GPU."""
    wanted = "e4m3" if recipe == "mxfp8" else "e5m2"
    write_model(tmp_path)
    chosen = Precision(dtype="fp8", recipe=recipe)
    assert precisions.manifest(chosen, read_shape(tmp_path))["formats"] == {
        "input": "e4m3", "weight": "e4m3", "gradient": wanted,
    }  # fmt: skip
    monkeypatch.setattr(precisions.device, "on_cuda", lambda: True)
    settings = precisions.transformer_settings(chosen)
    assert (settings["fp8"], settings["fp8_recipe"]) == ("e4m3" if recipe == "mxfp8" else "hybrid", recipe)
