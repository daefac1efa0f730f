"""A transformer's sizes, as far as memory and time depend on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. `ffn` is the dense layers' width; expert layers come last."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    qk_norm: bool = False  # norms of queries and keys
    experts: int = 0
    topk: int = 0
    moe_ffn: int = 0
    shared_ffn: int = 0
    moe_layers: int = 0
    q_lora: int = 0  # multi-latent attention when kv_lora > 0
    kv_lora: int = 0
    rope_dim: int = 64  # multi-latent attention's extra query/key columns
    mtp: int = 0  # multi-token-prediction layers
    window: int = 0  # sliding window of every other layer; 0 = none

    @property
    def query_width(self) -> int:
        """Columns of all query heads together."""
        return self.heads * (self.head_dim + (self.rope_dim if self.kv_lora else 0))

    @property
    def value_width(self) -> int:
        """Columns of all attention outputs together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of keys and values together, as attention reads them."""
        if self.kv_lora:
            return self.query_width + self.value_width
        return 2 * self.kv_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated else 2

    def attention_matmuls(self, tp: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of one rank's attention projections."""
        h = self.hidden
        if not self.kv_lora:
            return [(h, (self.value_width + self.kv_width) // tp), (self.value_width // tp, h)]
        up = self.heads * 2 * self.head_dim // tp
        q = [(h, self.q_lora), (self.q_lora, self.query_width // tp)] if self.q_lora else [(h, self.query_width // tp)]
        return [*q, (h, self.kv_lora + self.rope_dim), (self.kv_lora, up), (self.value_width // tp, h)]

    def mlp_matmuls(self, width: int, tp: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of one rank's share of an MLP of `width`."""
        return [(self.hidden, (self.mlp_matrices - 1) * width // tp), (width // tp, self.hidden)]

    def attention_parameters(self, tp: int = 1) -> int:
        return sum(k * n for k, n in self.attention_matmuls(tp))

    def dense_parameters(self, tp: int = 1) -> int:
        """Of one layer's dense MLP on one rank."""
        return sum(k * n for k, n in self.mlp_matmuls(self.ffn, tp))

    def expert_parameters(self) -> int:
        """Of one expert."""
        return self.mlp_matrices * self.hidden * self.moe_ffn

    def shared_parameters(self, tp: int = 1) -> int:
        """Of one expert layer outside the experts: router and shared expert."""
        return self.hidden * self.experts + self.mlp_matrices * self.hidden * self.shared_ffn // tp

    def embedding_parameters(self, tp: int = 1) -> int:
        return self.vocab * self.hidden // tp

    def parameters(self) -> int:
        """All of them, norms included."""
        moe = self.moe_layers
        layers = self.layers + self.mtp
        total = layers * (self.attention_parameters() + 2 * self.hidden)
        total += (self.layers - moe) * self.dense_parameters() if self.ffn else 0
        total += (moe + (self.mtp if moe else 0)) * (self.experts * self.expert_parameters() + self.shared_parameters())
        return total + (1 if self.tied else 2) * self.embedding_parameters() + self.hidden
