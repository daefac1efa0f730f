"""A mixture of experts in the decoder: a router and experts in the place of a layer's MLP (Qwen3-MoE)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from megarl.errors import UserError


@dataclass(frozen=True, slots=True)
class Experts:
    """What of a model's config.json the mixture needs."""

    count: int
    top_k: int
    ffn: int  # width of one expert
    normalise: bool  # the chosen experts' probabilities are scaled to sum to 1

    @classmethod
    def of(cls, config: PretrainedConfig) -> Experts:
        """From a transformers configuration; UserError when some layers have no experts."""
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            raise UserError("model.path: the local engine needs experts in every layer; use rollout.engine=sglang")
        return cls(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)


class Mixture:
    """The weights of one layer's router and experts."""

    def __init__(self, experts: Experts, hidden: int, device: torch.device, dtype: torch.dtype) -> None:
        def new(*size: int) -> torch.Tensor:
            return torch.zeros(*size, device=device, dtype=dtype)

        self.experts = experts
        self.router = new(experts.count, hidden)
        self.gate_up = new(experts.count, 2 * experts.ffn, hidden)
        self.down = new(experts.count, hidden, experts.ffn)

    def named(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the weights by their Hugging Face names."""
        yield f"{prefix}.gate.weight", self.router
        for i, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                yield f"{prefix}.experts.{i}.{name}_proj.weight", part
            yield f"{prefix}.experts.{i}.down_proj.weight", down

    def add(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + the experts' output for h, both [n, hidden]; and the experts chosen, int64 [n, top_k].

        The router works in float32, as the learner's does.
        """
        experts = self.experts
        share, chosen = F.linear(h.float(), self.router.float()).softmax(-1).topk(experts.top_k, -1)  # [n, top_k]
        if experts.normalise:
            share = share / share.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)  # by expert
        tokens = order // experts.top_k
        counts = chosen.flatten().bincount(minlength=experts.count).tolist()
        outputs = []
        for i, part in enumerate(h[tokens].split(counts)):
            if len(part):
                gate, up = F.linear(part, self.gate_up[i]).chunk(2, -1)
                outputs.append(F.linear(F.silu(gate) * up, self.down[i]))
        weighted = torch.cat(outputs) * share.to(h.dtype).flatten()[order, None]
        return x.index_add(0, tokens, weighted), chosen
