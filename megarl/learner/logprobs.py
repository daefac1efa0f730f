"""Log-probabilities and entropies straight from hidden states, over a vocabulary split among tensor-parallel ranks.

The output layer is part of the function. Logits exist for one chunk of positions and this rank's rows of the vocabulary
at a time. The backward pass computes them again unless all of them together are small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Of float32 logits at a time. On CUDA every chunk costs one pass over the weight's whole gradient; on a CPU a chunk
should stay near the caches."""
KEEP_BYTES = 1 << 26  # logits up to this size are kept for the backward


def logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, vocab: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden @ weight.T / temperature)[labels] and the entropy of that distribution, float32 [n] each.

    hidden: [n, h], equal on the ranks of `group`; its gradient is this rank's part of a sum over them.
    weight: [rows, h], this rank's equal part of the padded vocabulary. labels: int64 [n], below `vocab`.
    """
    return _LogProbs.apply(hidden, weight, labels, temperature, vocab, group)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        vocab: int,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        rows = len(weight)
        first = group.rank() * rows
        real = min(max(vocab - first, 0), rows)  # the rows after these are padding
        weight = weight[:real]
        local = labels - first
        owned = (local >= 0) & (local < real)
        local = local.where(owned, 0)
        n = len(hidden)
        # Of this rank's rows: log-sum-exp, mean logit under their softmax, the label's logit (0 if elsewhere).
        stats = hidden.new_zeros(3, n, dtype=torch.float32)
        stats[0] = -torch.inf
        chunk = max(1, CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (4 * max(real, 1)))
        keep = any(ctx.needs_input_grad) and 4 * n * real <= KEEP_BYTES
        kept = []
        for start in range(0, n if real else 0, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature)
            peak = logits.amax(-1, keepdim=True)
            weights = (logits - peak).exp_()
            sums = weights.sum(-1)
            stats[0, part] = sums.log().add_(peak[:, 0])
            stats[1, part] = torch.linalg.vecdot(weights, logits).div_(sums)
            stats[2, part] = logits.gather(-1, local[part, None]).squeeze(-1).where(owned[part], 0.0)
            if keep:
                kept.append(logits)
        total, mean, label = _combine(stats, group)
        ctx.save_for_backward(hidden, weight, local, owned, total, mean, *kept)
        ctx.temperature, ctx.chunk, ctx.rows = temperature, chunk, rows
        ctx.set_materialize_grads(False)
        return label - total, total - mean

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, local, owned, total, mean, *kept = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        rows = torch.zeros(ctx.rows, hidden.shape[1], dtype=torch.float32, device=hidden.device)
        grad_weight = rows[: len(weight)]
        for i, start in enumerate(range(0, len(hidden) if len(weight) else 0, ctx.chunk)):
            part = slice(start, start + ctx.chunk)
            logits = kept[i] if kept else _logits(hidden[part], weight, ctx.temperature)
            p = (logits - total[part, None]).exp_()
            # d logp / d z = onehot - p;   d H / d z = -p * (z - mean z)
            factor = torch.zeros_like(total[part, None]) if grad_logprobs is None else -grad_logprobs[part, None]
            if grad_entropy is not None:
                factor = factor - grad_entropy[part, None] * (logits - mean[part, None])
            grad = p.mul_(factor)
            if grad_logprobs is not None:
                grad.scatter_add_(-1, local[part, None], grad_logprobs[part].where(owned[part], 0.0)[:, None])
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[part])
            _add_product(grad_weight, grad.t(), hidden[part])
        return grad_hidden, rows.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """float32 [n, rows]. On CUDA the product is not rounded to the operands' type; a CPU has no such product."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.t()).float()
    return logits.div_(temperature) if temperature != 1.0 else logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for a float32 `total`. On CUDA within the product, which is not rounded."""
    if not total.is_cuda:
        total += a @ b
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _combine(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[3, n] of each rank's rows → log-sum-exp, mean logit and label logit over the whole vocabulary."""
    if group.size() == 1:
        return stats
    every = stats.new_empty(group.size(), *stats.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), stats, group=group)
    total = every[:, 0].logsumexp(0)
    share = (every[:, 0] - total).exp_()
    return torch.stack([total, (share * every[:, 1]).sum(0), every[:, 2].sum(0)])
