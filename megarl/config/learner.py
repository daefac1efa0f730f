"""Settings of the learner: model, layout, precision, optimizer, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Fraction, Natural, Positive, Section


class Model(Section):
    path: Path
    """Folder in Hugging Face's layout: config.json, tokenizer files, *.safetensors."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises from the seed and needs no weight files."""


class Parallel(Section):
    """Megatron's layout. Data parallelism is derived: world size / (tp * pp * cp)."""

    tp: Positive = 1
    """Tensor-parallel size; must divide the attention heads and the key/value groups."""
    pp: Positive = 1
    """Pipeline stages; 1F1B schedule."""
    vpp: Positive = 1
    """Model chunks per pipeline stage (interleaved schedule); layers must be divisible by pp * vpp."""
    cp: Positive = 1
    """Context-parallel size: each sequence is split over this many ranks."""
    ep: Positive = 1
    """Expert-parallel size (mixture-of-experts models only)."""
    etp: Positive | None = None
    """Tensor-parallel size inside the experts; default: tp, as in Megatron."""
    sequence_parallel: bool | None = None
    """Sequence parallelism of the norms; default: on when tp > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with compute."""
    overlap_tp: bool = False
    """Overlap tensor-parallel communication with matrix products, by Transformer Engine's user buffers (CUDA only).
    Their size is fixed: every row is padded to tokens_per_row. Needs sequence parallelism and cp 1."""
    overlap_p2p: bool = True
    """Overlap the exchange between pipeline stages with compute (interleaved schedule only)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: of every layer, or of `recompute_modules`."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] = ["core_attn"]
    """What `selective` recomputes; `layernorm` and `moe_act` on Transformer Engine only."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the float32 gradient inside the matrix product (CUDA only); default: on where
    Transformer Engine and apex's kernel for it are installed."""
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """How context-parallel ranks exchange keys and values on Transformer Engine: a ring, or all-to-all over heads.
    Its other two ways refuse packed rows, and before version 2.10 so did all-to-all."""
    offload_optimizer: Fraction = 0.0
    """Share of the optimizer state kept, and updated, in host memory (CUDA only)."""
    offload_layers: Natural = 0
    """Layers whose activations wait for the backward pass in host memory (CUDA only; pp 1, no recomputation)."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def recomputed(self) -> list[str]:
        """Modules that selective recomputation is for."""
        return list(self.recompute_modules) if self.recompute == "selective" else []

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel


class Experts(Section):
    """Of a mixture of experts, by Megatron's names (`moe_…`)."""

    router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Loss that evens out the experts' load: of every packed row, or of every sequence, whatever row it is in. Each
    counts by its input tokens, padding does not count."""
    aux_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of that loss, summed over layers, a mean over the update's input tokens. Metrics report its mean over
    layers as `load_balance`: 1 = balanced."""
    z_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of the squared log-sum-exp of the router's logits, likewise; 0 = off."""
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    """What the learner's router computes in."""

    @property
    def auxiliary(self) -> bool:
        """Whether there is a loss beside the policy's."""
        return self.aux_loss_coeff > 0 or self.z_loss_coeff > 0


class Precision(Section):
    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Compute type of the learner. `fp8` is Transformer Engine's on a GPU and emulated, slowly, on a CPU."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling recipe; read only when dtype is fp8."""
    high_precision_layers: Natural = 0
    """So many of the first and of the last layers stay in bf16; read only when dtype is fp8."""


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Learning rate of AdamW, after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Where `decay` ends; at most `lr`."""
    warmup_steps: Natural = 0
    """Updates of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """From `lr` to `min_lr` over the run, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's, added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW's, of matrices; norms and biases have none."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class Checkpoint(Section):
    every: Natural = 20
    """Steps between checkpoints; 0 = only after the last step."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    optimizer: bool = True
    """Save what is needed to resume, not the weights alone."""
    asynchronous: bool = False
    """Write a copy of the state while training goes on: takes that much more host memory, and hides the disk's time."""
