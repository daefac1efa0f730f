"""The router's auxiliary losses: gradients and reported figures against transformers' routers and a plain formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.bench.common.learners import TIMEOUT, per_expert, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.runtime.spawn import spawn

LAYOUTS = {
    "tp1": (1, {}, {}),
    "tp1 full recompute, fp64 router": (1, {"recompute": "full"}, {"router_dtype": "fp64"}),
    "tp2+sp": (2, {"tp": 2}, {}),
    "ep2": (2, {"ep": 2}, {}),
    "cp2": (2, {"cp": 2}, {}),
    "pp2": (2, {"pp": 2}, {}),
}
BALANCE, Z = 0.3, 0.02
CASES = {"aux_loss": BALANCE, "seq_aux_loss": BALANCE, "none": 0.0}
SIZES = {"num_hidden_layers": 2}


def reference(model: Any, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of the likelihood and the auxiliary losses, one sequence at a time; the losses' means over layers."""
    drawn = samples()
    total = sum(sample.input_length for sample in drawn)
    loss = balance = z = torch.zeros(())
    layers = model.config.num_hidden_layers
    for row in ([0, 1], [2, 3], [4]):  # as `split` packs them
        logits = [[] for _ in range(layers)]
        for sample in (drawn[i] for i in row):
            ids = torch.from_numpy(sample.token_ids).long()
            out = model(ids[None, :-1], output_router_logits=True)
            logprobs = out.logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            loss = loss - sample.scale * logprobs[sample.response_start - 1 :].sum()
            for layer, router in enumerate(out.router_logits):
                logits[layer].append(router)
                z = z + router.logsumexp(-1).square().sum() / total
        for layer in logits:
            for group in [torch.cat(layer)] if kind == "aux_loss" else layer:
                scores = group.softmax(-1)
                taken = torch.nn.functional.one_hot(scores.topk(2, -1).indices, 4).sum(1).float()
                share = taken.mean(0) / 2
                balance = balance + len(group) / total * 4 * (share * scores.mean(0)).sum()
    (loss + CASES[kind] * balance + Z * z).backward()
    gradients = per_expert({name: parameter.grad for name, parameter in model.named_parameters()})
    balance = balance if kind != "none" else torch.zeros(())
    return gradients, {"load_balance": balance.item() / layers, "z_loss": z.item() / layers}


def measure(folder: Path, layouts: list[str]) -> list[Any]:
    """On every rank: (layout, kind of loss, gradients, figures), the gradients on rank 0 only."""
    from megarl.learner import router
    from megarl.learner.learner import Learner, sft_objective
    from megarl.learner.model import unwrap
    from megarl.learner.parallel import start

    found = []
    for layout in layouts:
        _, parallel, options = LAYOUTS[layout]
        for kind, strength in CASES.items():
            experts = {**options, "router_load_balancing_type": kind, "aux_loss_coeff": strength, "z_loss_coeff": Z}
            chosen = settings(folder, parallel, experts=experts)
            world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
            learner = Learner(chosen, world, total_updates=1)
            batch = split(samples(), world.dp_size, 2) if world.is_controller else None
            learner.accumulate(batch, sft_objective)
            gradients = {name: tensor.clone() for name, tensor in learner.named_gradients()}
            figures = router.take_losses([unwrap(m) for m in learner.models], learner.shape.layers, world.control)
            world.release()
            found.append((layout, kind, gradients if world.is_controller else {}, figures))
    return found


@pytest.mark.parallel
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_auxiliary_losses_are_the_formulas_under_every_layout(tmp_path: Path, ranks: int) -> None:
    """Of rows, of sequences, and the z-loss alone: every gradient and the figures, padding left out; fp32.

    Without the losses the router's gradients differ by more than a hundred times the bound.
    """
    references = {kind: reference(write_model(tmp_path, "qwen3_moe", **SIZES), kind) for kind in CASES}
    layouts = [name for name, (n, *_) in LAYOUTS.items() if n == ranks]
    rows = spawn(measure, ranks, (tmp_path, layouts), TIMEOUT)[0]
    assert len(rows) == len(layouts) * len(CASES)
    for layout, kind, gradients, figures in rows:
        wanted, losses = references[kind]
        assert gradients.keys() == wanted.keys()
        for name, gradient in gradients.items():
            error = (gradient - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error < 2e-5, (layout, kind, name, error)
        assert figures == pytest.approx(losses, rel=1e-5), (layout, kind)
    gate = "model.layers.0.mlp.gate.weight"
    for other in ("aux_loss", "seq_aux_loss"):
        assert (references[other][0][gate] - references["none"][0][gate]).abs().max() > 2e-3 * BALANCE


@pytest.mark.parametrize(
    ("family", "more", "words"),
    [
        ("qwen3", {"experts": {"z_loss_coeff": 0.1}}, "experts.z_loss_coeff: .* no experts"),
        (
            "qwen3",
            {"experts": {"aux_loss_coeff": 0.1, "router_load_balancing_type": "aux_loss"}},
            "aux_loss_coeff: .* no experts",
        ),
        ("qwen3", {"rollout": {"replay_routing": True}}, "rollout.replay_routing: .* no experts.*valid value: false"),
        (
            "qwen3_moe",
            {"parallel": {"tp": 2, "sequence_parallel": False}},
            "parallel.sequence_parallel: .*valid value: true",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, family: Any, more: dict[str, Any], words: str) -> None:
    from megarl.learner import router

    write_model(tmp_path, family, **SIZES)
    chosen = settings(tmp_path, **{"parallel": {}, **more})
    with pytest.raises(UserError, match=words) as caught:
        router.check(chosen, read_shape(tmp_path))
    assert "\n" not in str(caught.value)
