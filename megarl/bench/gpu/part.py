"""A part of the GPU benchmark: what it runs, how long that may take, and the sizes it runs at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # it imports transformers, which a process needs only for some parts
    from megarl.bench.common.models import Sizes

Layers = Literal["local", "te"]
"""Megarl's layers from Megatron alone, or Transformer Engine's."""


class Unsupported(Exception):
    """Raised by a part that this machine cannot run; the message says why. The part is then skipped, not failed."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the models and of the work."""

    rehearsal: bool
    small: Sizes  # fused attention needs a head size of at least 64
    medium: Sizes
    engine: Sizes
    tokens: int  # of a row in the speed measurements
    rows: int  # of an update there
    repeats: int  # timed updates
    curve: int  # updates of a loss curve
    vocabulary: int  # of the log-probs alone
    scored: int  # tokens there
    slots: int  # sequences that the local engine decodes at a time
    new_tokens: int  # that it makes for each
    megabytes: int  # of a tensor that is summed, reduced or gathered


FULL = Scale(
    rehearsal=False,
    small={"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    medium={  # 1.4 billion parameters
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "initializer_range": 0.02,
        "max_position_embeddings": 16_384,
    },
    engine={  # Qwen3-0.6B
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960,
    },
    tokens=8192, rows=4, repeats=4, curve=50, vocabulary=151_936, scored=8192, slots=64, new_tokens=128, megabytes=256,
)  # fmt: skip
TINY = Scale(
    rehearsal=True,
    small={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    medium={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512, "initializer_range": 0.02,
    },
    engine={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 512,
    },
    tokens=128, rows=2, repeats=1, curve=3, vocabulary=1024, scored=64, slots=4, new_tokens=8, megabytes=1,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One row of the results."""

    name: str
    function: str
    """`module:function`. Called as `function(scale, folder, **arguments)` with an empty folder; returns the metrics."""
    seconds: float
    """Expected on one H100, imports left out. An estimate: it was never measured."""
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: Layers = "local"
    cuda: bool = False
    """Needs a CUDA device, and with `layers="te"` Transformer Engine, in the rehearsal too."""
    devices: int = 1
