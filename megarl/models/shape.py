"""The sizes of a model, as learner, embedded engine, planner, packing and conversion read them.

`config_json.read_shape` makes one from a config.json and refuses what cannot be trained. The planner also makes them by
hand, for published runs: parts marked "planner only" do not come from a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding; `rope.rotary` computes its frequencies."""

    theta: float = 10000.0
    kind: str = "default"  # transformers' `rope_type`, a key of `rope.KINDS`
    parameters: tuple[tuple[str, float], ...] = ()  # of the kind, by transformers' names


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts, in every layer after the first `dense_layers`."""

    count: int
    top_k: int
    ffn: int  # width of one expert
    normalise: bool = True  # whether the chosen experts' probabilities are scaled to sum to 1
    shared_ffn: int = 0  # planner only: width of the expert that sees every token; 0 = none
    dense_layers: int = 0  # planner only


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Planner only. Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one small vector."""

    kv_rank: int
    q_rank: int = 0  # 0: queries are not compressed
    rope_dim: int = 64  # rotated columns of each query and key, beside `head_dim`


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer and the switches that change its tensors or its arithmetic."""

    layers: int
    hidden: int
    heads: int  # query heads
    kv_groups: int  # key/value heads
    head_dim: int
    ffn: int  # width of the dense MLP
    vocab: int  # unpadded
    family: str = ""  # key of `families.FAMILIES`; empty for a shape made by hand
    tied: bool = False  # the output layer is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    max_positions: int = 4096
    moe: Experts | None = None
    initial_std: float = 0.02  # of random weights (`initializer_range`; transformers' default)
    gated: bool = True  # False is planner only: an MLP of two matrices
    latent: LatentAttention | None = None
    mtp: int = 0  # planner only: multi-token-prediction layers
    window: int = 0  # planner only: sliding window of every other layer; 0 = none

    @property
    def moe_layers(self) -> int:
        """Layers with experts, without multi-token prediction's."""
        return self.layers - self.moe.dense_layers if self.moe else 0

    @property
    def query_width(self) -> int:
        """Columns of all query heads together."""
        return self.heads * (self.head_dim + (self.latent.rope_dim if self.latent else 0))

    @property
    def value_width(self) -> int:
        """Columns of all attention outputs together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of keys and values together, as attention reads them."""
        return self.query_width + self.value_width if self.latent else 2 * self.kv_groups * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated else 2

    def cache_bytes(self, sequences: int, tokens: int, width: int, experts: bool = False) -> int:
        """Bytes of the embedded engine's whole KV cache: room for `sequences` sequences of `tokens` tokens, with one
        more of each for scoring and padding. A number takes `width` bytes; `experts`: those of each token are kept."""
        position = self.layers * (self.kv_width * width + (2 * self.moe.top_k if experts and self.moe else 0))
        return (sequences + 1) * (tokens + 1) * position

    def attention_matmuls(self, tp: int = 1) -> list[tuple[int, int]]:
        """(inputs, outputs) of one rank's attention projections."""
        h, out, latent = self.hidden, (self.value_width // tp, self.hidden), self.latent
        if not latent:
            return [(h, (self.value_width + self.kv_width) // tp), out]
        queries = self.query_width // tp
        q = [(h, latent.q_rank), (latent.q_rank, queries)] if latent.q_rank else [(h, queries)]
        up = (latent.kv_rank, 2 * self.value_width // tp)
        return [*q, (h, latent.kv_rank + latent.rope_dim), up, out]

    def mlp_matmuls(self, width: int, tp: int = 1) -> list[tuple[int, int]]:
        """(inputs, outputs) of one rank's share of an MLP of `width`."""
        return [(self.hidden, (self.mlp_matrices - 1) * width // tp), (width // tp, self.hidden)]

    def attention_parameters(self, tp: int = 1) -> int:
        """Weights of one layer's projections on one rank."""
        return sum(k * n for k, n in self.attention_matmuls(tp))

    def dense_parameters(self, tp: int = 1) -> int:
        """Weights of one layer's dense MLP on one rank."""
        return sum(k * n for k, n in self.mlp_matmuls(self.ffn, tp))

    def expert_parameters(self) -> int:
        """Weights of one expert; 0 when there are none."""
        return self.mlp_matrices * self.hidden * self.moe.ffn if self.moe else 0

    def shared_parameters(self, tp: int = 1) -> int:
        """Weights of one expert layer outside the experts, on one rank: router and shared expert."""
        if not self.moe:
            return 0
        return self.hidden * self.moe.count + self.mlp_matrices * self.hidden * self.moe.shared_ffn // tp

    def embedding_parameters(self, tp: int = 1) -> int:
        return self.vocab * self.hidden // tp

    def parameters(self) -> int:
        """All of them, tied embeddings once. Exact for every family of `families`."""
        small = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)  # norms and biases of a layer
        small += self.heads * self.head_dim + self.kv_width if self.qkv_bias else 0
        total = self._weights(self.moe.count if self.moe else 0) + (self.layers + self.mtp) * small + self.hidden
        return total + (1 if self.tied else 2) * self.embedding_parameters()

    def active_parameters(self) -> int:
        """Weights that each token is multiplied with: attention, MLP or chosen experts, output layer."""
        return self._weights(self.moe.top_k if self.moe else 0) + (1 + self.mtp) * self.embedding_parameters()

    def _weights(self, experts: int) -> int:
        """Matrices of all layers, `experts` of each expert layer's; multi-token prediction's are like the last."""
        moe = self.moe_layers + (self.mtp if self.moe else 0)
        dense = self.layers + self.mtp - moe
        total = (self.layers + self.mtp) * self.attention_parameters() + dense * self.dense_parameters()
        return total + moe * (experts * self.expert_parameters() + self.shared_parameters())
