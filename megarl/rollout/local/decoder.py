"""A compact decoder for Qwen3, Qwen3-MoE, Qwen2(.5) and Llama models: the forward pass of the `local` engine.

Weights go by their Hugging Face names; query, key and value projections, and gate and up, are stored fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.errors import UserError
from megarl.rollout.local.kv_cache import KVCache
from megarl.rollout.local.moe import Experts, Mixture

FAMILIES = ("qwen3", "qwen3_moe", "qwen2", "llama")
_ROPES = ("default", "linear", "yarn", "llama3")  # those whose frequencies do not depend on the sequence's length


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's config.json the forward pass needs."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    groups: int  # key/value heads
    head_dim: int
    ffn: int
    eps: float  # of the RMS norms
    frequencies: tuple[float, ...]  # rotary, [head_dim / 2], radians a token
    rope_scale: float  # of the rotary cosines and sines (YaRN), else 1
    tied: bool  # the output projection is the embedding
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    ffn_bias: bool
    experts: Experts | None = None  # in every layer, in the MLP's place

    @classmethod
    def read(cls, model: Path) -> Shape:
        """From a folder with a config.json; UserError when it is missing or of another family."""
        if not (model / "config.json").is_file():
            raise UserError(f"model.path: {model} has no config.json")
        return cls.of(AutoConfig.from_pretrained(model))

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """From a transformers configuration; UserError when the decoder cannot run it."""
        family = config.model_type
        if family not in FAMILIES:
            raise UserError(f"model.path: the local engine has no {family!r}; it runs {', '.join(FAMILIES)}")
        if getattr(config, "use_sliding_window", False):
            raise UserError("model.path: the local engine has no sliding-window attention; use rollout.engine=sglang")
        rope = config.rope_parameters["rope_type"]
        if rope not in _ROPES:
            raise UserError(f"model.path: the local engine has no {rope!r} rotary scaling; it has {', '.join(_ROPES)}")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if rope == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
            frequencies, rope_scale = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
        else:
            frequencies, rope_scale = ROPE_INIT_FUNCTIONS[rope](config, torch.device("cpu"))
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            vocabulary=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads,
            head_dim=head_dim,
            ffn=config.intermediate_size,
            eps=config.rms_norm_eps,
            frequencies=tuple(frequencies.tolist()),
            rope_scale=float(rope_scale),
            tied=config.tie_word_embeddings,
            qk_norm=family in ("qwen3", "qwen3_moe"),
            qkv_bias=attention_bias or family == "qwen2",
            out_bias=attention_bias and family != "qwen2",
            ffn_bias=bool(getattr(config, "mlp_bias", False)),
            experts=Experts.of(config) if family == "qwen3_moe" else None,
        )


class _Layer:
    """The weights of one transformer layer. Biases are zero vectors where the model has none, and then unused."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        def new(*size: int) -> torch.Tensor:
            return torch.zeros(*size, device=device, dtype=dtype)

        q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        self.norm1 = new(shape.hidden)
        self.qkv = new(q + 2 * kv, shape.hidden)
        self.qkv_bias = new(q + 2 * kv) if shape.qkv_bias else None
        self.q_norm = new(shape.head_dim)
        self.k_norm = new(shape.head_dim)
        self.qk_norm = new(shape.heads + shape.groups, shape.head_dim)  # both, a row a head; see Decoder.refresh
        self.out = new(shape.hidden, q)
        self.out_bias = new(shape.hidden) if shape.out_bias else None
        self.norm2 = new(shape.hidden)
        self.mixture = Mixture(shape.experts, shape.hidden, device, dtype) if shape.experts else None
        if self.mixture:
            return
        self.gate_up = new(2 * shape.ffn, shape.hidden)
        self.gate_up_bias = new(2 * shape.ffn) if shape.ffn_bias else None
        self.down = new(shape.hidden, shape.ffn)
        self.down_bias = new(shape.hidden) if shape.ffn_bias else None

    def named(self, shape: Shape, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the weights by their Hugging Face names."""
        q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
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
        if self.out_bias is not None:
            yield f"{prefix}.self_attn.o_proj.bias", self.out_bias
        if self.mixture:
            yield from self.mixture.named(f"{prefix}.mlp")
            return
        for name, part in zip(("gate", "up"), self.gate_up.chunk(2), strict=True):
            yield f"{prefix}.mlp.{name}_proj.weight", part
        if self.gate_up_bias is not None:
            for name, part in zip(("gate", "up"), self.gate_up_bias.chunk(2), strict=True):
                yield f"{prefix}.mlp.{name}_proj.bias", part
        yield f"{prefix}.mlp.down_proj.weight", self.down
        if self.down_bias is not None:
            yield f"{prefix}.mlp.down_proj.bias", self.down_bias


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens to feed to some slots: `counts[r]` of them to slot `slots[r]`, into the columns from `starts[r]` on.

    `tokens` int64 [R, T], padded at will; `slots`, `starts` and `counts` int64 [R]. `gaps` int64 [R, 2], if given, are
    columns, from the first to the one before the second, that hold nothing of the slot's sequence. `first`, if given:
    the slots are this one and those that follow it, so that their cache can be read in place.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    gaps: torch.Tensor | None = None
    first: int | None = None


@dataclass(frozen=True, slots=True)
class _Block:
    """T tokens of each of R sequences, as they go through a forward pass."""

    tokens: torch.Tensor  # int64 [R, T]
    rows: torch.Tensor  # int64 [R, T], slots to write to
    columns: torch.Tensor  # int64 [R, T]
    positions: torch.Tensor  # int64 [R, T]
    bias: torch.Tensor  # [R, T, width], added to the scores: 0 for a column that the token sees, else -inf
    slots: torch.Tensor | slice  # R of them, int64 or in a row: those are read in place

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Queries [R T, heads, head_dim] over one layer's cache; [R, T, heads, head_dim]."""
        (R, T), H, D = self.tokens.shape, *q.shape[1:]
        KV, width = keys.shape[1], self.bias.shape[-1]
        k, v = keys[self.slots, :, :, :width].flatten(0, 1), values[self.slots, :, :width].flatten(0, 1)
        q = q.view(R, T, KV, H // KV, D).permute(0, 2, 3, 1, 4).reshape(R * KV, H // KV * T, D)
        scores = torch.baddbmm(self.bias.new_zeros(1), q, k, beta=0, alpha=D**-0.5).view(R, KV, H // KV, T, width)
        scores.add_(self.bias[:, None, None])
        share = scores.softmax(-1, dtype=torch.float32).to(v.dtype).view(R * KV, H // KV * T, width)
        return torch.bmm(share, v).view(R, KV, H // KV, T, D).permute(0, 3, 1, 2, 4)


class Decoder:
    """The model and its KV cache. Tensors named [R, T] hold T new tokens for each of R sequences."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        dtype: torch.dtype,
        slots: int,
        columns: int,
        keep_experts: bool = False,
    ) -> None:
        """`keep_experts`: those that each token passes through are kept in the cache."""
        self.shape, self.device, self.dtype = shape, device, dtype
        self._top_k = shape.experts.top_k if keep_experts and shape.experts else 0
        self.cache = KVCache(shape.layers, slots, shape.groups, shape.head_dim, columns, device, dtype, self._top_k)
        self._layers = [_Layer(shape, device, dtype) for _ in range(shape.layers)]
        self._embedding = torch.zeros(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
        self._norm = torch.zeros(shape.hidden, device=device, dtype=dtype)
        self._head = self._embedding if shape.tied else torch.zeros_like(self._embedding)
        self._rows = torch.arange(slots, device=device)
        self._columns = torch.arange(columns + 1, device=device)
        self._seen, self._unseen = (torch.tensor(bias, device=device, dtype=dtype) for bias in (0.0, float("-inf")))
        # Rotation of (a, b) by t: a' = a cos t - b sin t, b' = b cos t + a sin t; `_sin` carries the signs, so that
        # the halves need only be swapped. The spare column's position is in the table too.
        angles = torch.outer(torch.arange(columns + 1.0), torch.tensor(shape.frequencies))
        cos, sin = angles.cos() * shape.rope_scale, angles.sin() * shape.rope_scale
        self._cos = torch.cat([cos, cos], -1).to(device, dtype)[:, None]  # [columns + 1, 1, head_dim]
        self._sin = torch.cat([-sin, sin], -1).to(device, dtype)[:, None]

    def weights(self) -> dict[str, torch.Tensor]:
        """Views of all weights by their Hugging Face names; after writing to them call `refresh`."""
        named = {"model.embed_tokens.weight": self._embedding, "model.norm.weight": self._norm}
        for i, layer in enumerate(self._layers):
            named |= dict(layer.named(self.shape, f"model.layers.{i}"))
        return named if self.shape.tied else named | {"lm_head.weight": self._head}

    def refresh(self) -> None:
        """Recompute what is derived from the weights."""
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
        """Feed one token to each of the first B slots; logits float32 [B, V] of the next.

        Both int64 [B]: the token, and the column it is written to. No slot sees a column from `width` on. Slots with
        nothing to feed write to the spare column. `gaps` int64 [B, 2] are a piece's. `late`: what some of these slots
        have yet to be fed before, in the same pass.
        """
        before = [] if late is None else [self._block(late)]
        rows, read = self._rows[: len(tokens), None], slice(len(tokens))
        block = self._sighted(tokens[:, None], rows, columns[:, None], gaps, width, read)
        return self.logits(self._forward([block, *before]))

    @torch.inference_mode()
    def extend(self, piece: Piece) -> torch.Tensor:
        """Feed tokens to slots, many a slot; hidden states [R, T, h]."""
        return self._forward([self._block(piece)]).view(*piece.tokens.shape, -1)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [..., V] of hidden states [..., h]."""
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
        """The block of these tokens, each of which sees its own column and those before it, but not its slot's gap."""
        others = self._columns[:width]
        unseen = others > columns[:, :, None]
        positions = columns
        if gaps is not None:
            first, end = gaps[:, None, :1], gaps[:, None, 1:]
            unseen |= (others >= first) & (others < end)
            positions = (columns - (end - first)[:, 0]).clamp_(min=0)
        return _Block(tokens, rows, columns, positions, torch.where(unseen, self._unseen, self._seen), read)

    def _forward(self, blocks: list[_Block]) -> torch.Tensor:
        """Hidden states [N, h] of the first block's N tokens. The blocks' tokens go through all but attention together;
        those of the others only fill the cache."""
        shape, H = self.shape, self.shape.heads
        sizes = [block.tokens.numel() for block in blocks]
        tokens = _flat([block.tokens for block in blocks])
        rows, columns = _flat([block.rows for block in blocks]), _flat([block.columns for block in blocks])
        positions = _flat([block.positions for block in blocks])
        cos, sin = self._cos[positions], self._sin[positions]
        x = self._embedding[tokens]
        for i, (layer, keys, values) in enumerate(zip(self._layers, self.cache.keys, self.cache.values, strict=True)):
            h = _rms_norm(x, layer.norm1, shape.eps)
            qkv = F.linear(h, layer.qkv, layer.qkv_bias).view(len(x), -1, shape.head_dim)
            qk = qkv[:, : H + shape.groups]
            if shape.qk_norm:
                qk = _rms_norm(qk, layer.qk_norm, shape.eps)
            qk = torch.addcmul(qk * cos, qk.roll(shape.head_dim // 2, -1), sin)
            keys[rows, :, :, columns] = qk[:, H:]
            values[rows, :, columns] = qkv[:, H + shape.groups :]
            if i == shape.layers - 1 and not self._top_k:  # of the other blocks nothing is needed any more
                blocks, sizes = blocks[:1], sizes[:1]
                x, qk = x[: sizes[0]], qk[: sizes[0]]
            parts = zip(qk[:, :H].split(sizes), blocks, strict=True)
            mixed = _flat([block.attend(q, keys, values) for q, block in parts])
            x = _add_linear(x, mixed.view(len(x), -1), layer.out, layer.out_bias)
            h = _rms_norm(x, layer.norm2, shape.eps)
            if layer.mixture:
                x, chosen = layer.mixture.add(x, h)
                if self._top_k:
                    self.cache.experts[rows, columns, i] = chosen.to(torch.int16)
                continue
            gate, up = F.linear(h, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = _add_linear(x, F.silu(gate) * up, layer.down, layer.down_bias)
        return _rms_norm(x[: sizes[0]], self._norm, shape.eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """F.rms_norm with any weights that broadcast; on a CPU in float32 in half the kernels."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return (x * (x * x).mean(-1, True).add_(eps).rsqrt_()).mul_(weight)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The tensors' entries in a row, [N]; without a copy where it can be."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def _add_linear(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x + y @ weight.T (+ bias), in one kernel where there is no bias."""
    return torch.addmm(x, y, weight.t()) if bias is None else x + F.linear(y, weight, bias)
