"""A mixture of experts in the decoder: a router and experts instead of a layer's MLP (Qwen3-MoE)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from megarl.models.shape import Experts


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
        """x + the experts' output for h, both [n, hidden]; and the chosen experts, int64 [n, top_k].

        The router computes in float32, as the learner's does.
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
