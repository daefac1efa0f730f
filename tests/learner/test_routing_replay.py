"""The learner takes the experts that samples name, under every layout, against transformers forced to the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megarl.bench.common.learners import TIMEOUT, per_expert, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.runtime.spawn import spawn
from megarl.types import Sample

pytestmark = pytest.mark.slow

LAYOUTS = {
    "tp1": (1, {}),
    "tp1 full recompute": (1, {"recompute": "full"}),
    "tp2+sp": (2, {"tp": 2}),
    "ep2": (2, {"ep": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2 full recompute": (2, {"pp": 2, "recompute": "full"}),
    "pp2·vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
}
LAYERS, EXPERTS, TOP_K = 4, 4, 2


def routed() -> list[Sample]:
    """Samples whose tokens pass through random experts; a few tokens' are left open, and one sample's all."""
    rng = np.random.default_rng(7)
    drawn = samples()
    for sample in drawn[:-1]:
        order = rng.random((sample.input_length, LAYERS, EXPERTS)).argsort(-1)
        sample.experts = order[..., :TOP_K].astype(np.int16)
        sample.experts[rng.random(sample.input_length) < 0.1] = -1
    return drawn


def reference(model: Any, forced: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Every sample's response log-probs and, of their likelihood, every gradient, by transformers."""
    plain = Qwen3MoeTopKRouter.forward
    experts: np.ndarray | None = None

    def route(self: Any, hidden: torch.Tensor) -> Any:
        logits, _, chosen = plain(self, hidden)
        if experts is not None:
            wanted = torch.from_numpy(experts[:, routers.index(self)]).long()
            chosen = torch.where(wanted >= 0, wanted, chosen)
        scores = logits.softmax(-1).gather(1, chosen)
        return logits, scores / scores.sum(-1, keepdim=True), chosen

    routers = [layer.mlp.gate for layer in model.model.layers]
    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", route)
    loss, found = torch.zeros(()), []
    for sample in routed():
        experts = sample.experts if forced else None
        ids = torch.from_numpy(sample.token_ids).long()
        logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        found.append(logprobs[sample.response_start - 1 :].detach().numpy())
        loss = loss - sample.scale * logprobs[sample.response_start - 1 :].sum()
    loss.backward()
    return found, per_expert({name: parameter.grad for name, parameter in model.named_parameters()})


def measure(folder: Path, layouts: list[str], replayed: bool) -> list[Any]:
    """On every rank: (layout, log-probs by sample, of the reference model too, gradients), complete on rank 0."""
    from megarl.learner.learner import Learner, sft_objective
    from megarl.learner.parallel import start

    found = []
    for layout in layouts:
        more = {"rollout": {"replay_routing": replayed}, "algorithm": {"kl": {"coef": 0.1}}}
        chosen = settings(folder, LAYOUTS[layout][1], **more)
        world = start(chosen.parallel, chosen.precision, chosen.seed, TIMEOUT)
        learner = Learner(chosen, world, total_updates=1)
        batch = split(routed(), world.dp_size, 2) if world.is_controller else None
        policy, frozen = learner.logprobs(batch, "policy"), learner.logprobs(batch, "reference")
        learner.accumulate(batch, sft_objective)
        gradients = {name: tensor.clone() for name, tensor in learner.named_gradients()}
        world.release()
        found.append((layout, policy, frozen, gradients if world.is_controller else {}))
    return found


@pytest.mark.parallel
@pytest.mark.parametrize("ranks", [1, 2])
def test_replayed_routing_is_the_rollouts_under_every_layout(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and every gradient with the named experts, which are not the routers' own; the frozen reference goes by
    its own routers. With the switch off the policy does too, and the log-probs are far away. fp32."""
    forced, wanted = reference(write_model(tmp_path, "qwen3_moe"), True, monkeypatch)
    free, _ = reference(write_model(tmp_path, "qwen3_moe"), False, monkeypatch)
    layouts = [name for name, (n, _) in LAYOUTS.items() if n == ranks]
    rows = spawn(measure, ranks, (tmp_path, layouts, True), TIMEOUT)[0]
    assert [row[0] for row in rows] == layouts
    for layout, policy, frozen, gradients in rows:
        for i in range(len(forced)):
            np.testing.assert_allclose(policy[i], forced[i], rtol=0, atol=2e-5, err_msg=layout)
            np.testing.assert_allclose(frozen[i], free[i], rtol=0, atol=2e-5, err_msg=layout)
        for name, gradient in gradients.items():
            error = (gradient - wanted[name]).abs().max() / wanted[name].abs().max()
            assert error < 2e-5, (layout, name, error)
    for _, policy, _, _ in spawn(measure, ranks, (tmp_path, layouts[:1], False), TIMEOUT)[0]:
        for i in range(len(forced)):
            np.testing.assert_allclose(policy[i], free[i], rtol=0, atol=2e-5)
        assert max(abs(policy[i] - forced[i]).max() for i in range(len(forced) - 1)) > 0.1
