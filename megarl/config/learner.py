"""Settings of the learner: model, layout, precision, optimizer, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Fraction, Natural, Place, Positive, Rate, Section


class Model(Section):
    """The policy."""

    path: Place
    """Folder in Hugging Face's layout (config.json, tokenizer files, *.safetensors), or a Hub id such as
    `Qwen/Qwen3-4B`."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` reads the weight files. `random` draws weights from the seed and needs no files."""


class Parallel(Section):
    """Megatron's layout. Data parallelism is derived: ranks / (tp * pp * cp)."""

    tp: Positive = 1
    """Tensor-parallel size. It must divide the attention heads and the key/value groups."""
    pp: Positive = 1
    """Pipeline stages, on the 1F1B schedule."""
    vpp: Positive = 1
    """Model chunks per pipeline stage (interleaved schedule). pp * vpp must divide the layers."""
    cp: Positive = 1
    """Context-parallel size: each sequence is split over this many ranks. Raise it for long responses."""
    ep: Positive = 1
    """Expert-parallel size, for mixture-of-experts models only."""
    etp: Positive | None = None
    """Tensor-parallel size inside the experts. Default: tp, as in Megatron."""
    sequence_parallel: bool | None = None
    """Split the norms' activations over tensor-parallel ranks. Default: on when tp > 1."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with compute. With the distributed optimizer, parameter gathering overlaps too."""
    overlap_tp: bool = False
    """Overlap tensor-parallel communication with matrix products through Transformer Engine's user buffers. CUDA only,
    with sequence parallelism and cp 1. Every row is padded to `batch.tokens_per_row`."""
    overlap_p2p: bool = True
    """Overlap communication between pipeline stages with compute. Only the interleaved schedule does this."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute activations to save memory: of every layer (`full`), or of `recompute_modules` (`selective`)."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] = ["core_attn"]
    """What `recompute: selective` recomputes. `layernorm` and `moe_act` need Transformer Engine."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the float32 gradient inside the matrix product. CUDA only. Default: on with Transformer
    Engine."""
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """How context-parallel ranks exchange keys and values on Transformer Engine: in a ring (`p2p`), or all-to-all over
    heads (`a2a`, version 2.10 or newer)."""
    offload_optimizer: Fraction = 0.0
    """Share of the optimizer state kept and updated in host memory. CUDA only."""
    offload_layers: Natural = 0
    """Number of layers whose activations wait for the backward pass in host memory. CUDA only, with pp 1 and no
    recomputation."""

    @property
    def model_ranks(self) -> int:
        """Ranks of one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def recomputed(self) -> list[str]:
        """Modules that selective recomputation recomputes."""
        return list(self.recompute_modules) if self.recompute == "selective" else []

    @property
    def uses_sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel


class Experts(Section):
    """Training of mixture-of-experts models, by Megatron's names (`moe_…`)."""

    router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Loss that balances the experts' load, per packed row (`aux_loss`) or per sequence (`seq_aux_loss`). Padding does
    not count."""
    aux_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of that loss, summed over layers and averaged over input tokens. The metric `load_balance` is its mean
    over layers; 1 is balanced."""
    z_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the squared log-sum-exp of the router's logits. 0 turns it off."""
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Type in which the learner's router computes. Use fp64 for models with very many experts."""

    @property
    def auxiliary(self) -> bool:
        """Whether there is a loss besides the policy's."""
        return self.aux_loss_coeff > 0 or self.z_loss_coeff > 0


class Precision(Section):
    """Numeric types of the learner."""

    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Compute type of the learner. `fp8` uses Transformer Engine on a GPU; a CPU emulates it slowly."""
    recipe: Literal["auto", "delayed", "tensorwise", "blockwise", "mxfp8"] = "auto"
    """FP8 scaling recipe. Only read with `dtype: fp8`. `auto` is mxfp8 on Blackwell GPUs, blockwise on Hopper, and
    tensorwise where Transformer Engine supports neither, and on a CPU."""
    high_precision_layers: Natural = 0
    """Number of first and of last layers that stay in bf16, at most a pipeline stage's; not with recipe `delayed`. Only
    read with `dtype: fp8`."""


class Optimizer(Section):
    """AdamW and its learning rate."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Learning rate after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Learning rate at the end of `decay`. At most `lr`."""
    warmup_steps: Natural = 0
    """Updates of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes from `lr` to `min_lr` after the warm-up."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Weight decay of matrices. Norms and biases have none."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm. 0 turns clipping off."""


class Checkpoint(Section):
    """What is saved for --resume."""

    every: Natural = 20
    """Steps between checkpoints. With 0, only the last step is saved."""
    keep: Positive = 2
    """Checkpoints to keep; older ones are deleted."""
    optimizer: bool = True
    """Save the optimizer state too. Without it, a resumed run starts Adam from zero."""
    asynchronous: bool = False
    """Write a copy of the state while training continues. This hides the disk's time and needs host memory for the
    copy."""
