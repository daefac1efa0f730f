"""A compact decoder for every family in `models/families`: the forward pass of the `local` engine.

Weights have their Hugging Face names. Query, key and value are stored as one matrix, and so are gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megarl.models.rope import rotary
from megarl.models.shape import ModelShape
from megarl.rollout.local.kv_cache import KVCache
from megarl.rollout.local.moe import Mixture


class _Layer:
    """The weights of one transformer layer. `q_norm` and `k_norm` are unused where the model has none."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        def new(*size: int) -> torch.Tensor:
            return torch.zeros(*size, device=device, dtype=dtype)

        q, kv = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
        self.norm1 = new(shape.hidden)
        self.qkv = new(q + 2 * kv, shape.hidden)
        self.qkv_bias = new(q + 2 * kv) if shape.qkv_bias else None
        self.q_norm = new(shape.head_dim)
        self.k_norm = new(shape.head_dim)
        self.qk_norm = new(shape.heads + shape.kv_groups, shape.head_dim)  # both, one row per head; see Decoder.refresh
        self.out = new(shape.hidden, q)
        self.norm2 = new(shape.hidden)
        self.mixture = Mixture(shape.moe, shape.hidden, device, dtype) if shape.moe else None
        if self.mixture:
            return
        self.gate_up = new(2 * shape.ffn, shape.hidden)
        self.down = new(shape.hidden, shape.ffn)

    def named(self, shape: ModelShape, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the weights by their Hugging Face names."""
        q, kv = shape.heads * shape.head_dim, shape.kv_groups * shape.head_dim
        yield f"{prefix}.input_layernorm.weight", self.norm1
        yield f"{prefix}.post_attention_layernorm.weight", self.norm2
        for name, part in zip("qkv", self.qkv.split([q, kv, kv]), strict=True):
            yield f"{prefix}.self_attn.{name}_proj.weight", part
        if self.qkv_bias is not None:
            for name, part in zip("qkv", self.qkv_bias.split([q, kv, kv]), strict=True):
                yield f"{prefix}.self_attn.{name}_proj.bias", part
        if shape.qk_norm:
            yield f"{prefix}.self_attn.q_norm.weight", self.q_norm
            yield f"{prefix}.self_attn.k_norm.weight", self.k_norm
        yield f"{prefix}.self_attn.o_proj.weight", self.out
        if self.mixture:
            yield from self.mixture.named(f"{prefix}.mlp")
            return
        for name, part in zip(("gate", "up"), self.gate_up.chunk(2), strict=True):
            yield f"{prefix}.mlp.{name}_proj.weight", part
        yield f"{prefix}.mlp.down_proj.weight", self.down


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens for some slots: `counts[r]` of them for slot `slots[r]`, in the columns from `starts[r]` on.

    `tokens` int64 [R, T], with any padding. `slots`, `starts` and `counts` int64 [R]. `gaps` int64 [R, 2], if given:
    the columns [first, second) of the slot are not part of its sequence. `first`, if given: the slots are this one and
    the R - 1 after it, so their cache can be read in place.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    gaps: torch.Tensor | None = None
    first: int | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """T tokens of each of R sequences in a forward pass."""

    tokens: torch.Tensor  # int64 [R, T]
    rows: torch.Tensor  # int64 [R, T], slots to write to
    columns: torch.Tensor  # int64 [R, T]
    positions: torch.Tensor  # int64 [R, T]
    bias: torch.Tensor  # [R, T, width], added to the scores: 0 for a column that the token sees, else -inf
    slots: torch.Tensor | slice  # int64 [R], or R neighbours that are read in place

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """Queries [R T, heads, head_dim] over one layer's cache → [R, T, heads, head_dim]."""
        (R, T), H, D = self.tokens.shape, *q.shape[1:]
        KV, width = keys.shape[1], self.bias.shape[-1]
        k, v = keys[self.slots, :, :, :width].flatten(0, 1), values[self.slots, :, :width].flatten(0, 1)
        q = q.view(R, T, KV, H // KV, D).permute(0, 2, 3, 1, 4).reshape(R * KV, H // KV * T, D)
        scores = torch.baddbmm(self.bias.new_zeros(1), q, k, beta=0, alpha=scale).view(R, KV, H // KV, T, width)
        scores.add_(self.bias[:, None, None])
        share = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(R * KV, H // KV * T, width)
        return torch.bmm(share, v).view(R, KV, H // KV, T, D).permute(0, 3, 1, 2, 4)


class Decoder:
    """The model and its KV cache. Tensors [R, T] contain T new tokens of each of R sequences."""

    def __init__(
        self,
        shape: ModelShape,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        columns: int,
        keep_experts: bool = False,
    ) -> None:
        """`keep_experts`: remember in the cache which experts each token passes through."""
        self.shape, self.device, self.dtype = shape, device, dtype
        self._top_k = shape.moe.top_k if keep_experts and shape.moe else 0
        self.cache = KVCache(shape.layers, slots, shape.kv_groups, shape.head_dim, columns, device, dtype, self._top_k)
        self._layers = [_Layer(shape, device, dtype) for _ in range(shape.layers)]
        self._embedding = torch.zeros(shape.vocab, shape.hidden, device=device, dtype=dtype)
        self._norm = torch.zeros(shape.hidden, device=device, dtype=dtype)
        self._head = self._embedding if shape.tied else torch.zeros_like(self._embedding)
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(columns + 1, device=device)
        self._seen, self._unseen = (torch.tensor(bias, device=device, dtype=dtype) for bias in (0.0, float("-inf")))
        # Rotation of (a, b) by t: a' = a cos t - b sin t, b' = b cos t + a sin t. `_sin` contains the signs, so it is
        # enough to swap the halves. The table includes the spare column's position.
        frequencies, self._softmax_scale = rotary(shape)
        angles = torch.outer(torch.arange(columns + 1.0), frequencies)
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat([cos, cos], -1).to(device, dtype)[:, None]  # [columns + 1, 1, head_dim]
        self._sin = torch.cat([-sin, sin], -1).to(device, dtype)[:, None]

    def weights(self) -> dict[str, torch.Tensor]:
        """Views of all weights by their Hugging Face names. Call `refresh` after writing to them."""
        named = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._norm}
        for i, layer in enumerate(self._layers):
            named |= dict(layer.named(self.shape, f"model.layers.{i}"))
        return named if self.shape.tied else named | {"lm_head.weight": self._head}

    def refresh(self) -> None:
        """Recompute what depends on the weights."""
        for layer in self._layers:
            layer.qk_norm[: self.shape.heads] = layer.q_norm
            layer.qk_norm[self.shape.heads :] = layer.k_norm

    @torch.inference_mode()
    def decode(
        self,
        tokens: torch.Tensor,
        columns: torch.Tensor,
        width: int,
        gaps: torch.Tensor | None = None,
        late: Piece | None = None,
    ) -> torch.Tensor:
        """Feed one token to each of the first B slots → float32 [B, V], the logits of the next.

        `tokens` and the `columns` that they are written to are int64 [B]. No slot sees a column from `width` on. Idle
        slots write to the spare column. `gaps` int64 [B, 2] as in `Piece`. `late`: earlier tokens of some of these
        slots, fed in the same pass.
        """
        before = [] if late is None else [self._block(late)]
        rows, read = self._rows[: len(tokens), None], slice(len(tokens))
        block = self._sighted(tokens[:, None], rows, columns[:, None], gaps, width, read)
        return self.logits(self._forward([block, *before]))

    @torch.inference_mode()
    def extend(self, piece: Piece) -> torch.Tensor:
        """Feed several tokens to each slot → hidden states [R, T, h]."""
        return self._forward([self._block(piece)]).view(*piece.tokens.shape, -1)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., h] → float32 [..., V]."""
        return F.linear(hidden, self._head).float()

    def _block(self, piece: Piece) -> _Block:
        """The piece's tokens."""
        tokens = piece.tokens
        steps = self._columns[: tokens.shape[1]]
        columns = torch.where(steps < piece.counts[:, None], piece.starts[:, None] + steps, self.cache.spare)
        width = int((piece.starts + piece.counts).max())
        read = piece.slots if piece.first is None else slice(piece.first, piece.first + len(tokens))
        return self._sighted(tokens, piece.slots[:, None].expand_as(tokens), columns, piece.gaps, width, read)

    def _sighted(
        self,
        tokens: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        gaps: torch.Tensor | None,
        width: int,
        read: torch.Tensor | slice,
    ) -> _Block:
        """The block of these tokens. Each sees its own column and those before it, but not its slot's gap."""
        others = self._columns[:width]
        unseen = others > columns[:, :, None]
        positions = columns
        if gaps is not None:
            first, end = gaps[:, None, :1], gaps[:, None, 1:]
            unseen |= (others >= first) & (others < end)
            positions = (columns - (end - first)[:, 0]).clamp_(min=0)
        return _Block(tokens, rows, columns, positions, torch.where(unseen, self._unseen, self._seen), read)

    def _forward(self, blocks: list[_Block]) -> torch.Tensor:
        """Hidden states [N, h] of the first block's N tokens; the others only fill the cache."""
        shape, H = self.shape, self.shape.heads
        sizes = [block.tokens.numel() for block in blocks]
        tokens = _flat([block.tokens for block in blocks])
        rows, columns = _flat([block.rows for block in blocks]), _flat([block.columns for block in blocks])
        positions = _flat([block.positions for block in blocks])
        cos, sin = self._cos[positions], self._sin[positions]
        x = self._embedding[tokens]
        for i, (layer, keys, values) in enumerate(zip(self._layers, self.cache.keys, self.cache.values, strict=True)):
            h = _rms_norm(x, layer.norm1, shape.norm_eps)
            qkv = F.linear(h, layer.qkv, layer.qkv_bias).view(len(x), -1, shape.head_dim)
            qk = qkv[:, : H + shape.kv_groups]
            if shape.qk_norm:
                qk = _rms_norm(qk, layer.qk_norm, shape.norm_eps)
            qk = torch.addcmul(qk * cos, qk.roll(shape.head_dim // 2, -1), sin)
            keys[rows, :, :, columns] = qk[:, H:]
            values[rows, :, columns] = qkv[:, H + shape.kv_groups :]
            if i == shape.layers - 1 and not self._top_k:  # nothing of the other blocks is needed any more
                blocks, sizes = blocks[:1], sizes[:1]
                x, qk = x[: sizes[0]], qk[: sizes[0]]
            parts = zip(qk[:, :H].split(sizes), blocks, strict=True)
            mixed = _flat([block.attend(q, keys, values, self._softmax_scale) for q, block in parts])
            x = torch.addmm(x, mixed.view(len(x), -1), layer.out.t())
            h = _rms_norm(x, layer.norm2, shape.norm_eps)
            if layer.mixture:
                x, chosen = layer.mixture.add(x, h)
                if self._top_k:
                    self.cache.experts[rows, columns, i] = chosen.to(torch.int16)
                continue
            gate, up = F.linear(h, layer.gate_up).chunk(2, -1)
            x = torch.addmm(x, F.silu(gate) * up, layer.down.t())
        return _rms_norm(x[: sizes[0]], self._norm, shape.norm_eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """F.rms_norm with any weights that broadcast; on a CPU in float32 with half the kernels."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return (x * (x * x).mean(-1, True).add_(eps).rsqrt_()).mul_(weight)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors' entries in one row, [N]; no copy of a single tensor."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
