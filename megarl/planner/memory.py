"""Peak memory of every pipeline stage of a layout, by part.

Persistent parts (weights, gradients, optimizer state) follow from a rank's parameters. Activations are the tensors that
each module keeps for its backward pass, times the micro-batches in flight (Korthikanti et al., arXiv 2205.05198, with
gated MLPs, grouped-query and latent attention, experts and FP8 inputs added).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megarl.models.shape import Experts, ModelShape
from megarl.planner.hardware import GIB, Gpu
from megarl.planner.layout import Layout, Software

PERSISTENT = ("weights", "fp8_weights", "gradients", "optimizer", "reference", "engine_weights", "kv_cache")
CONTEXT = 1.5  # GiB: CUDA context, libraries
COLLECTIVES = 0.35  # GiB of communicator buffers per kind of parallelism in use
FRAGMENTATION = 0.10  # of the activations: blocks that the caching allocator cannot reuse
LOSS_CHUNK = {"cpu": 2.0**26, "cuda": 2.0**30}  # bytes of float32 logits at a time (megarl/learner/logprobs.py)
LOSS_KEPT = 2.0**26  # bytes of float32 logits that are kept for the backward pass
LIBRARIES = 40.0 * 2**20  # bytes of torch's and Megatron's libraries after their first use on a CPU
EAGER = 6.0  # bytes per entry that unfused norms and rotary embedding keep in fp32


@dataclass(frozen=True, slots=True)
class Holding:
    """Parameters of one rank: those shared by its data-parallel group, and its experts."""

    shared: int
    experts: int


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Peak bytes on one rank of a pipeline stage, by part."""

    stage: int
    parts: dict[str, float]

    @property
    def allocated(self) -> float:
        """GiB of tensors."""
        return sum(self.parts.values()) / GIB

    def reserved(self) -> float:
        """GiB of the allocator: tensors and what fragmentation adds."""
        return self.allocated + FRAGMENTATION * (self.allocated - sum(self.parts.get(p, 0.0) for p in PERSISTENT) / GIB)

    def driver(self, layout: Layout) -> float:
        """GiB that the driver reports: reserved memory, the context and the communicators."""
        kinds = sum(size > 1 for size in (layout.tp, layout.pp, layout.cp, layout.dp, layout.ep))
        return self.reserved() + CONTEXT + COLLECTIVES * kinds

    @property
    def largest(self) -> str:
        """The largest part."""
        return max(self.parts, key=self.parts.__getitem__)


def plan_memory(
    shape: ModelShape, layout: Layout, software: Software, holdings: list[Holding] | None = None
) -> list[StageMemory]:
    """Memory of each stage. `holdings` from the real model replace the counted parameters."""
    held = holdings or stage_holdings(shape, layout)
    return [
        StageMemory(stage, _stage(shape, layout, software, layers, held[stage], stage))
        for stage, layers in enumerate(layout.stages(shape))
    ]


def fits(stages: list[StageMemory], layout: Layout, gpu: Gpu) -> bool:
    return max(stage.driver(layout) for stage in stages) <= gpu.memory


def stage_holdings(shape: ModelShape, layout: Layout) -> list[Holding]:
    """Parameters per rank of each stage, counted from the sizes."""
    held, first = [], 0
    for stage, layers in enumerate(layout.stage_layers(shape)):
        dense, moe = _kinds(shape, first, layers)
        tp = layout.tp
        shared = layers * (shape.attention_parameters(tp) + 2 * shape.hidden)
        shared += dense * shape.dense_parameters(tp) + moe * shape.shared_parameters(tp)
        if stage == 0:
            shared += shape.embedding_parameters(tp)
        if stage == layout.pp - 1:
            shared += shape.hidden
            if not shape.tied or layout.pp > 1:
                shared += shape.embedding_parameters(tp)
            if shape.mtp and layout.pp > 1:
                shared += shape.embedding_parameters(tp)
        experts = moe * expert_count(shape, layout) * shape.expert_parameters() // layout.etp
        held.append(Holding(shared, experts))
        first += layers
    return held


def expert_count(shape: ModelShape, layout: Layout) -> int:
    """Experts of each expert layer on one rank, whole or split."""
    return shape.moe.count // layout.ep if shape.moe else 0


def _kinds(shape: ModelShape, first: int, layers: int) -> tuple[int, int]:
    """(dense, expert) layers among `layers` that begin with layer `first`."""
    dense = max(0, min(layers, shape.layers - shape.moe_layers - first))
    return dense, layers - dense


def _products(shape: ModelShape, layout: Layout, dense: int, moe: int) -> float:
    """Weights of the matrix products of one rank's layers; a router is not quantised."""
    tp, total = layout.tp, dense * shape.dense_parameters(layout.tp)
    if shape.moe:
        shared = shape.shared_parameters(tp) - shape.hidden * shape.moe.count
        total += moe * (shared + expert_count(shape, layout) * shape.expert_parameters() // layout.etp)
    return total + (dense + moe) * shape.attention_parameters(tp)


def _stage(
    shape: ModelShape, layout: Layout, software: Software, layers: range, held: Holding, stage: int
) -> dict[str, float]:
    dense, moe = _kinds(shape, layers.start, len(layers))
    parts = _state(layout, software, held)
    wide = software.wide_layers(shape, layers) / max(1, len(layers))
    if software.weight_copies:
        parts["fp8_weights"] = software.weight_copies * (1 - wide) * _products(shape, layout, dense, moe)
    flight = in_flight(layout, stage)
    bf16 = replace(software, dtype="bf16") if wide else software
    kept_dense, kept_moe = (
        (1 - wide) * layer_bytes(shape, layout, software, kind) + wide * layer_bytes(shape, layout, bf16, kind)
        for kind in (False, True)
    )
    if software.recompute == "full":
        shard = layout.tp if software.sequence_parallel else 1
        saved = _wide(software) * layout.tokens * shape.hidden / shard * len(layers)
        parts["activations"] = flight * saved
        parts["recomputed"] = kept_moe if moe else kept_dense
    else:
        whole = flight * (dense * kept_dense + moe * kept_moe)
        # Megatron keeps two layers on the GPU while offloaded ones move.
        away = max(0, min(software.offload_layers, len(layers)) - 2) / max(1, len(layers))
        parts["activations"] = whole * (1 - away)
    shard = layout.tp if software.sequence_parallel else 1
    t, h = layout.tokens, shape.hidden
    if stage == 0 and not software.cpu:  # on a CPU no operator keeps it
        parts["embedding"] = min(flight, layout.pp) * 2.0 * t * h / shard
    # The peak of the backward pass: gathered inputs and the gradients of the MLP's or the attention's tensors.
    routed = shape.moe.ffn * shape.moe.top_k if moe and shape.moe else 0
    width = max(shape.ffn if dense else 0, routed) * shape.mlp_matrices
    workspace = _wide(software) * t * (2 * h + max(width, shape.query_width + shape.kv_width) / layout.tp)
    if stage == layout.pp - 1:
        if software.chunked_loss:  # it is freed before the layers' backward pass
            parts["logits"] = _chunked_loss(shape, layout, software)
            # Also kept: the last norm's two tensors, and the scored positions of its output.
            parts["logits"] += _wide(software) * t * h * (2 / shard + 1) if software.cpu else 0.0
            workspace = max(0.0, workspace - parts["logits"])
        else:
            parts["logits"] = 2.0 * t * h + (1 + shape.mtp) * t * shape.vocab * _logit_bytes(layout, software)
    parts["workspace"] = workspace
    if software.cpu:
        parts["libraries"] = LIBRARIES
    return parts


def _wide(software: Software) -> float:
    """Bytes of an activation."""
    return 4.0 if software.dtype == "fp32" else 2.0


def _chunked_loss(shape: ModelShape, layout: Layout, software: Software) -> float:
    """Bytes at the larger of two peaks: a chunk's forward pass (logits, their softmax, a product of both), or its
    backward pass with the gradients of the hidden states and, in float32 and as one product, of the output layer."""
    rows, wide = shape.vocab / layout.tp, _wide(software)
    whole = 4.0 * layout.tokens * rows
    chunk = min(whole, LOSS_CHUNK["cpu" if software.cpu else "cuda"])
    kept = whole if whole <= LOSS_KEPT else 0.0
    rounded = chunk * wide / 4 if wide < 4 else 0.0  # logits before, and gradients after, the float32 ones
    backward = (kept or chunk) + chunk + wide * layout.tokens * shape.hidden + (4.0 + wide) * rows * shape.hidden
    return rounded + max(3 * chunk, backward)


def _logit_bytes(layout: Layout, software: Software) -> float:
    """Bytes per token and vocabulary entry around the loss."""
    if software.parallel_loss:
        return 8.0 / layout.tp  # bf16 logits, their fp32 softmax in place, bf16 gradient
    # All logits on every rank: bf16, fp32 copy, log-softmax, both gradients, and the shards and copies of a gather.
    return 16.0 if layout.tp == 1 else 28.0


def _state(layout: Layout, software: Software, held: Holding) -> dict[str, float]:
    dense_ranks = layout.dp * layout.cp
    both = held.shared + held.experts
    trained = software.trainable
    sharded = held.shared / dense_ranks + held.experts / layout.expert_dp
    # FP8 alone keeps a row- and a column-wise byte per weight, nvfp4 about half of that, next to nothing in bf16.
    weight = {"fp32": 4.0, "bf16": 2.0, "fp8": 2.0, "fp4": 2.0}[software.dtype]
    if software.fsdp:
        return {
            "weights": weight * sharded,
            "gradients": software.gradient_bytes * sharded,
            "optimizer": 12.0 * sharded,
        }
    # Adam: two fp32 moments, and an fp32 master copy of weights that are not fp32 themselves.
    adam = 8.0 if software.dtype == "fp32" else 12.0
    optimizer = adam * (sharded if software.distributed_optimizer else both)
    return {
        "weights": weight * both,
        "gradients": software.gradient_bytes * both * trained,
        "optimizer": optimizer * trained * (1 - software.offload_optimizer),
    }


def in_flight(layout: Layout, stage: int) -> float:
    """Most micro-batches whose activations stage `stage` keeps at once, in units of a whole stage's layers."""
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(min(layout.micro_batches, layout.pp - stage))
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, layout.micro_batches * layout.vpp) / layout.vpp


@lru_cache(maxsize=4096)
def layer_bytes(shape: ModelShape, layout: Layout, software: Software, moe: bool) -> float:
    """Bytes that one layer keeps for one micro-batch until its backward pass."""
    experts, latent = shape.moe if moe else None, shape.latent
    if moe and not experts:
        return 0.0
    t, h, tp = layout.tokens, shape.hidden, layout.tp
    shard = t / tp if software.sequence_parallel else t
    wide = _wide(software)
    if software.cpu:
        return _cpu_layer(shape, layout, software, experts)
    # Inputs of matrix products are kept in the product's type: FP8 keeps two quantised copies instead.
    operand = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 1.0}[software.dtype]
    recomputed = software.recompute in ("selective", "moe")
    norms = 2 * shard * h * (wide + (0.0 if recomputed else operand))  # input and output of both norms
    if not software.fused:
        norms += EAGER * (2 * shard * h + t / tp * (shape.query_width + shape.kv_width) / 2)
    attention = t / tp * (wide * (shape.query_width + shape.kv_width) + (wide + operand) * shape.value_width)
    if recomputed and latent:  # the up-projections are recomputed from the latents
        attention = t / tp * (wide + operand) * shape.value_width
    attention += shard * (latent.q_rank + latent.kv_rank) * (wide + operand) if latent else 0.0
    if software.attention in ("flash", "flash1"):
        attention += 4.0 * t * shape.heads / tp
    elif software.recompute != "attention":
        scores = t * layout.sequence * shape.heads / tp
        attention += scores * (5.0 if software.attention == "fused_softmax" else 8.0)
    up = shape.mlp_matrices - 1

    def mlp(rows: float, width: float) -> float:
        return rows * width * (wide * up + (0.0 if recomputed else operand))

    if not experts:
        kept = 0.0 if software.recompute == "moe" else mlp(t / tp, shape.ffn)
        return norms + attention + kept
    routed = t / tp * experts.top_k
    expert = routed * (wide * h) + mlp(routed, experts.ffn) + routed * wide * h + 8.0 * shard * experts.count
    if software.recompute == "moe":
        expert = routed * wide * h
    return norms + attention + expert + mlp(t / tp, experts.shared_ffn)


def _cpu_layer(shape: ModelShape, layout: Layout, software: Software, experts: Experts | None) -> float:
    """The same without fused kernels, in float32: every storage that torch's operators keep."""
    t, tp, wide = layout.tokens, layout.tp, _wide(software)
    shard = t / tp if software.sequence_parallel else t
    query, kv = shape.query_width, shape.kv_width
    norms = 2 * 2 * wide * shard * shape.hidden  # normalised, output
    # The fused projection, rotated queries and keys, the output and its statistics.
    attention = t / tp * (wide * ((query + kv) + (query + kv / 2) + shape.value_width) + 4.0 * shape.heads)
    if shape.qk_norm:  # both normalised
        attention += t / tp * wide * (query + kv / 2)
    copies = 5 if shape.gated else 2  # gate and up, activation, a shifted copy of up, their product

    def mlp(rows: float, width: float) -> float:
        return rows * wide * copies * width

    if not experts:
        return norms + attention + mlp(t / tp, shape.ffn)
    routed = t / tp * experts.top_k * layout.etp
    expert = 2 * wide * routed * shape.hidden + mlp(routed / layout.etp, experts.ffn)
    return norms + attention + expert + mlp(t / tp, experts.shared_ffn)
