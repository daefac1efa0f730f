"""How a model is divided over GPUs, and what the software does while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from megarl.models.shape import ModelShape
from megarl.planner.hardware import Dtype

AttentionKernel = Literal["unfused", "fused_softmax", "flash1", "flash"]
Recompute = Literal["none", "attention", "selective", "moe", "full"]
"""Nothing, the scores, cheap parts (norms, activations), these and the MLP or experts, or every layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the parallel groups and of the batch. `dp` ranks have the same non-expert weights."""

    gpus: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1  # sequences of one micro-batch on one data-parallel rank
    global_batch: int = 1  # sequences of one optimizer step
    sequence: int = 4096  # tokens
    attended: int = 0  # mean length of the sequences packed into one; 0 = it is a single sequence

    @property
    def dp(self) -> int:
        return max(1, self.gpus // (self.tp * self.pp * self.cp))

    @property
    def expert_dp(self) -> int:
        """Ranks that have the same experts."""
        return max(1, self.gpus // (self.etp * self.ep * self.pp))

    @property
    def micro_batches(self) -> int:
        return max(1, -(-self.global_batch // (self.micro_batch * self.dp)))

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one rank, before sequence parallelism."""
        return max(1, self.micro_batch * self.sequence // self.cp)

    def stages(self, shape: ModelShape) -> list[range]:
        """The transformer layers of each pipeline stage, multi-token prediction's among the last."""
        ends = list(accumulate(self.stage_layers(shape)))
        return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]

    def stage_layers(self, shape: ModelShape) -> list[int]:
        """Transformer layers of each pipeline stage. When they do not divide, the first and last stage get fewer."""
        total = shape.layers + shape.mtp
        most = -(-total // self.pp)
        stages = [most] * self.pp
        short = most * self.pp - total
        for i in range(short):
            stages[-1 if i % 2 == 0 else 0] -= 1
        while stages[-1] < 0 or stages[0] < 0:  # more stages than layers: spread the layers evenly
            stages = [total // self.pp + (i < total % self.pp) for i in range(self.pp)]
        return stages


@dataclass(frozen=True, slots=True)
class Software:
    """What the training stack does. The defaults are Megatron-Core's recipes."""

    dtype: Dtype = "bf16"
    bf16_layers: int = 0  # first and last layers that stay in bf16 when `dtype` is narrower
    weight_copies: float = 0.0  # bytes per weight of a narrow layer, beside the weight itself: its quantised copies
    attention: AttentionKernel = "flash"
    fused: bool = True  # one kernel each for norms, activations, rotary embedding
    sequence_parallel: bool = True
    tp_overlap: bool = True
    dp_overlap: bool = True
    graphs: bool = False  # CUDA graphs: no launch gaps
    node_dispatch: bool = False  # DeepEP, HybridEP: a token crosses the network once per domain
    ep_overlap: bool = False  # expert traffic runs while another micro-batch computes
    fused_experts: bool = False  # permutation fused into dispatch and matrix products, no wait for the host
    p2p_overlap: bool = True  # stages exchange while they compute (interleaved schedule only)
    gradient_fusion: bool = True  # weight gradients are added in fp32 inside the matrix product
    cp_all_to_all: bool = False  # context parallelism exchanges heads, not a ring of keys and values
    offload_optimizer: float = 0.0  # share of the optimizer state in host memory
    offload_layers: int = 0  # layers whose activations wait in host memory
    distributed_optimizer: bool = True
    fsdp: bool = False
    recompute: Recompute = "none"
    gradient_bytes: float = 4.0  # per parameter, of the main gradient
    trainable: float = 1.0  # fraction of the parameters with gradients (LoRA: about 0)
    parallel_loss: bool = True  # cross-entropy on vocabulary shards; else the logits are gathered
    chunked_loss: bool = False  # this learner's: logits of one chunk of positions at a time
    cpu: bool = False  # the learner without CUDA: each torch operator keeps what its backward pass reads

    def wide_layers(self, shape: ModelShape, layers: range) -> int:
        """How many of these layers stay in bf16."""
        n = self.bf16_layers if self.dtype in ("fp8", "fp4") else 0
        return sum(i < n or i >= shape.layers + shape.mtp - n for i in layers)
