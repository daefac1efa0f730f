"""Loss and every gradient of the learner against transformers, in float32, under every layout."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from megarl.bench.common import result
from megarl.bench.common.choice import chosen
from megarl.bench.common.learners import TIMEOUT, new_learner, per_expert, samples, settings, split
from megarl.bench.common.models import Family, write_model
from megarl.runtime.spawn import spawn
from megarl.types import Sample


@dataclass(frozen=True)
class Case:
    """One row of the table: a layout on `ranks` ranks, a model and a packing."""

    layout: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    family: Family = "qwen3"
    tied: bool = False
    packed: bool = True


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp1 selective recompute": (1, {"recompute": "selective"}),
    "tp2": (2, {"tp": 2, "sequence_parallel": False}),
    "tp2+sp": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2·vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2·vpp2, no p2p overlap": (2, {"pp": 2, "vpp": 2, "overlap_p2p": False}),
    "tp1 recompute of the MLP": (1, {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {"distributed_optimizer": False}),
    "dp2 distributed optimizer": (2, {}),
    "dp2 distributed optimizer, overlap": (2, {"overlap_grad_reduce": True}),
    "tp2+sp full recompute": (2, {"tp": 2, "recompute": "full"}),
    "tp4+sp": (4, {"tp": 4}),
    "pp4": (4, {"pp": 4}),
    "cp4": (4, {"cp": 4}),
    "tp2·pp2+sp": (4, {"tp": 2, "pp": 2}),
    "tp2·pp2·vpp2+sp": (4, {"tp": 2, "pp": 2, "vpp": 2}),
    "tp2·cp2+sp": (4, {"tp": 2, "cp": 2}),
    "pp2·cp2": (4, {"pp": 2, "cp": 2}),
    "pp2·dp2 overlap": (4, {"pp": 2, "overlap_grad_reduce": True}),
    "tp2·dp2": (4, {"tp": 2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "ep2": (2, {"ep": 2}),
    "ep2, overlap": (2, {"ep": 2, "overlap_grad_reduce": True}),
    "ep2·tp2·etp1+sp": (2, {"ep": 2, "tp": 2, "etp": 1}),
    "tp2·etp1+sp": (2, {"tp": 2, "etp": 1}),
    "etp2": (2, {"etp": 2}),
    "cp2·etp2": (2, {"cp": 2, "etp": 2}),
    "tp2·pp2·etp1+sp": (4, {"tp": 2, "pp": 2, "etp": 1}),
    "ep2·tp2+sp": (4, {"ep": 2, "tp": 2}),
    "ep2·pp2": (4, {"ep": 2, "pp": 2}),
}


def cases() -> list[Case]:
    """Every layout, tied and untied, packed and unpacked; the other families on a few."""
    found = []
    for layout, (ranks, parallel) in LAYOUTS.items():
        for tied in (False, True):
            for packed in (True, False):
                found.append(Case(layout, ranks, parallel, tied=tied, packed=packed))
    for family in ("qwen2", "llama"):
        for layout in ("tp1", "tp2+sp", "tp2·pp2+sp", "tp2·cp2+sp"):
            found.append(Case(layout, *LAYOUTS[layout], family=family, tied=family == "qwen2"))
    found += [Case(layout, *placed, family="qwen3_moe") for layout, placed in EXPERT_LAYOUTS.items()]
    return found


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    layout: Annotated[list[str] | None, typer.Option(help="Only this layout; may be given again.")] = None,
) -> None:
    """Loss and every gradient of the learner against transformers, in float32, for every layout."""
    wanted = chosen(layout or {**LAYOUTS, **EXPERT_LAYOUTS}, {**LAYOUTS, **EXPERT_LAYOUTS}, "layout")
    result.publish("parity", compare([case for case in cases() if case.layout in wanted]), json)


def compare(wanted: list[Case]) -> list[dict[str, Any]]:
    """One row per case.

    `dloss` and `dgrad` are the largest absolute differences; `gradient` is the largest entry of the reference.
    `relgrad` is the largest difference of a tensor over the tensor's largest entry.
    `dnorm` is the relative difference of the gradient norm that clipping uses.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        for case in wanted:
            key = case.family, case.tied
            if key not in references:
                path = Path(folder) / "-".join(map(str, key))
                references[key] = path, reference(write_model(path, case.family, case.tied), samples())
        for ranks in sorted({case.ranks for case in wanted}):
            group = [case for case in wanted if case.ranks == ranks]
            work = [(case, references[case.family, case.tied]) for case in group]
            rows += spawn(_measure, ranks, (work,), TIMEOUT)[0]
    return rows


def reference(model: Any, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers, one sequence at a time."""
    loss = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()
        logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        loss = loss - sample.scale * logprobs[sample.response_start - 1 :].sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}  # tied weights appear once
    return loss.item(), per_expert(gradients)


def _measure(cases: list[tuple[Case, tuple[Path, tuple[float, dict[str, torch.Tensor]]]]]) -> list[dict[str, Any]]:
    """Runs on every rank: the rows of `cases`, complete on rank 0."""
    from megarl.learner.learner import sft_objective

    rows = []
    for case, (folder, (loss, gradients)) in cases:
        learner = new_learner(settings(folder, case.parallel))
        world = learner.world
        batch = split(samples(), world.dp_size, 2 if case.packed else 1) if world.is_controller else None
        metrics = learner.accumulate(batch, sft_objective)
        found = {name: tensor.clone() for name, tensor in learner.named_gradients()}
        world.release()
        if not world.is_controller:
            continue
        assert found.keys() == gradients.keys(), sorted(found.keys() ^ gradients.keys())
        errors = {name: (found[name] - wanted).abs().max().item() for name, wanted in gradients.items()}
        exact = torch.stack([g.norm() for g in gradients.values()]).norm().item()
        rows.append(
            {
                "layout": case.layout,
                "ranks": case.ranks,
                "family": case.family,
                "tied": case.tied,
                "packed": case.packed,
                "dloss": abs(metrics["loss"] - loss),
                "dgrad": max(errors.values()),
                "relgrad": max(errors[name] / wanted.abs().max().item() for name, wanted in gradients.items()),
                "dnorm": abs(metrics["grad_norm"] / exact - 1),
                "gradient": max(wanted.abs().max().item() for wanted in gradients.values()),
            }
        )
    return rows
