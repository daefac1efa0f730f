"""Time of one optimizer step of a layout, by part.

Every part is a volume divided by a rate: FLOPs by the reachable peak, bytes by the reachable bandwidth. Matrix products
take both (an additive roofline, so small ones are slow). A pipeline of p stages and m micro-batches takes
m·t_slowest + (p-1)/v·t (Narayanan et al., arXiv 2104.04473, with v interleaved chunks).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log2

from megarl.models.shape import Experts, ModelShape
from megarl.planner.hardware import HOST, LAWS, Dtype, Gpu, Laws
from megarl.planner.layout import Layout, Software
from megarl.planner.memory import expert_count, layer_bytes

PARTS = (
    "matmul", "attention", "elementwise", "launch", "tensor_parallel", "context_parallel", "expert_parallel",
    "bubble", "pipeline", "data_parallel", "optimizer", "offload", "straggler",
)  # fmt: skip
Parts = dict[str, float]


@dataclass(slots=True)
class StepTime:
    """Seconds of one optimizer step, by part, and its model FLOPs."""

    parts: Parts
    flops: float = 0.0  # of the whole model and batch, without recomputation

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def mfu(self, gpus: int, gpu: Gpu, dtype: Dtype = "bf16") -> float:
        """Model FLOPs utilisation against the peak of `dtype`."""
        return self.flops / self.seconds / gpus / gpu.peak(dtype)


class Clock:
    """Rates of one GPU under one software stack. Every method but `link` returns seconds."""

    def __init__(self, gpu: Gpu, software: Software, laws: Laws) -> None:
        self.gpu, self.software, self.laws = gpu, software, laws
        self.reached = laws.efficiency(gpu.architecture)
        self.hbm = gpu.hbm * 1e12 * self.reached.hbm

    def matmul(self, m: float, k: int, n: int, count: int = 1, dtype: Dtype | None = None, out: float = 2.0) -> float:
        """`count` products [m, k] x [k, n]; each result entry moves `out` bytes."""
        dtype = dtype or self.software.dtype
        rate = self.gpu.peak(dtype) * self.reached.matmul(dtype)
        if k % 64 or n % 64:
            rate *= self.laws.misaligned
        operand = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "fp4": 0.56}[dtype]
        traffic = operand * (m * k + k * n) + out * m * n
        if dtype in ("fp8", "fp4"):
            traffic += (2 + 2 * operand) * m * k  # read high precision, write the row- and the column-wise copy
        return count * (2.0 * m * k * n / rate + traffic / self.hbm)

    def forward_backward(
        self, m: float, k: int, n: int, count: int = 1, dtype: Dtype | None = None
    ) -> tuple[float, float]:
        """A linear layer: (forward, backward). The backward pass adds the weight gradient to an fp32 buffer."""
        backward = self.matmul(m, n, k, count, dtype)
        if self.software.trainable > 0.5:
            out = 2 * self.software.gradient_bytes + (0.0 if self.software.gradient_fusion else 4.0)
            backward += self.matmul(k, int(m) or 1, n, count, dtype, out=out)
        return self.matmul(m, k, n, count, dtype), backward

    def attention(self, tokens: float, span: float, heads: float, qk: float, v: float) -> tuple[float, float]:
        """Causal attention of `tokens` queries, each over `span` keys on average."""
        flops = 2.0 * tokens * span * heads * (qk + v)
        kind = self.software.attention
        if kind in ("flash", "flash1"):
            rate = self.gpu.peak("bf16") * self.reached.attention * (self.laws.flash1 if kind == "flash1" else 1.0)
            return flops / rate, 2.5 * flops / rate
        # Scores in memory: the full square is computed, and each pass over it moves two bytes per entry.
        rate = self.gpu.peak("bf16") * self.reached.bf16 * 0.7
        if qk % 8:
            rate *= self.laws.unaligned_heads
        passes = 5 if kind == "fused_softmax" else 14
        scores = 2.0 * tokens * 2 * span * heads * passes / self.hbm
        return 2 * flops / rate + scores, 4 * flops / rate + 1.5 * scores

    def elementwise(self, volume: float) -> float:
        """Kernels that move `volume` bytes and do little arithmetic."""
        return volume / self.hbm * (1.0 if self.software.fused else self.laws.eager)

    def link(self, ranks: int, stride: int = 1, fraction: float | None = None) -> float:
        """Bytes/s per rank of a ring over `ranks` ranks at distance `stride`."""
        if ranks * stride <= self.gpu.domain:
            return self.gpu.nvlink * 1e9 * (fraction or self.laws.nvlink)
        local = max(1, self.gpu.domain // stride)  # ranks of the ring in one domain: each has its network card
        rate = min(
            self.gpu.nvlink * self.laws.nvlink, min(local, 8) * self.gpu.network * (fraction or self.laws.network)
        )
        return rate * 1e9

    def ring(self, volume: float, ranks: int, stride: int = 1) -> float:
        """One all-gather or reduce-scatter of `volume` bytes (an all-reduce is two)."""
        if ranks == 1:
            return 0.0
        return volume * (ranks - 1) / ranks / self.link(ranks, stride) + self.laws.latency * 1e-6

    def all_to_all(self, volume: float, ranks: int, stride: int, topk: int) -> float:
        """Every rank sends `volume` bytes, evenly to `ranks` ranks at distance `stride`."""
        if ranks == 1:
            return 0.0
        laws, gpu = self.laws, self.gpu
        inside = min(ranks, max(1, gpu.domain // stride))
        seconds = volume * (inside - 1) / ranks / (gpu.nvlink * 1e9 * laws.all_to_all)
        if ranks > inside:
            outside = volume * (1 - inside / ranks)
            if self.software.node_dispatch:
                domains = ranks / inside
                outside = volume / topk * (domains * (1 - (1 - 1 / domains) ** topk)) * (1 - 1 / domains)
            seconds = max(seconds, outside / (gpu.network * 1e9 * laws.all_to_all))
        return seconds + laws.latency * 1e-6


def step_time(shape: ModelShape, layout: Layout, software: Software, gpu: Gpu, laws: Laws = LAWS) -> StepTime:
    """Predict one optimizer step."""
    clock = Clock(gpu, software, laws)
    stages = layout.stage_layers(shape)
    loads: list[Parts] = []
    for index, layers in enumerate(layout.stages(shape)):
        load = _layers(shape, layout, clock, layers)
        if index == layout.pp - 1:
            load = _add(load, _times(_head(shape, layout, clock), 1 + shape.mtp))
        if index == 0:
            load = _add(load, _embedding(shape, layout, clock))
        loads.append(load)
    slowest = max(loads, key=lambda load: sum(load.values()))
    m = layout.micro_batches
    mean = sum(sum(load.values()) for load in loads) / layout.pp
    parts = dict.fromkeys(PARTS, 0.0)
    parts.update(_times(slowest, m))
    if layout.pp > 1:
        parts["bubble"] = (layout.pp - 1) / layout.vpp * mean
        volume = 2.0 * layout.tokens * shape.hidden / (layout.tp if software.sequence_parallel else 1)
        send = volume / clock.link(2, layout.gpus // layout.pp) + laws.latency * 1e-6
        exposed = 0.3 if layout.vpp > 1 and software.p2p_overlap else 1.0  # interleaving overlaps all but the warm-up
        parts["pipeline"] = 2 * send * layout.vpp * exposed * m
    parts["data_parallel"] = _data_parallel(shape, layout, clock, stages, sum(slowest.values()))
    parts["optimizer"] = _optimizer(shape, layout, clock, stages)
    parts["offload"] = _offload(shape, layout, clock, stages, sum(slowest.values()))
    total = sum(parts.values())
    parts["straggler"] = total * laws.straggler * log2(max(1.0, layout.gpus / 8))
    return StepTime(parts, model_flops(shape, layout))


def _layers(shape: ModelShape, layout: Layout, clock: Clock, layers: range) -> Parts:
    """Forward and backward of a stage's layers for one micro-batch. Those that stay in bf16 are like the others but for
    the type."""
    dense = len(range(layers.start, min(layers.stop, shape.layers - shape.moe_layers)))
    wide = clock.software.wide_layers(shape, layers) / max(1, len(layers))
    bf16 = Clock(clock.gpu, replace(clock.software, dtype="bf16"), clock.laws)
    total: Parts = {}
    for each, share in ((clock, 1 - wide), (bf16, wide)) if wide else ((clock, 1.0),):
        total = _add(total, _times(_layer(shape, layout, each, None), share * dense))
        if shape.moe:
            total = _add(total, _times(_layer(shape, layout, each, shape.moe), share * (len(layers) - dense)))
    return total


def model_flops(shape: ModelShape, layout: Layout) -> float:
    """FLOPs of one step as Megatron counts them: causal attention halved, logits included, no recomputation."""
    tokens = layout.global_batch * layout.sequence
    span = _span(shape, layout.attended or layout.sequence)
    scores = (shape.layers + shape.mtp) * span * (shape.query_width + shape.value_width)
    return 6.0 * tokens * (shape.active_parameters() + scores)


def _span(shape: ModelShape, sequence: int) -> float:
    """Keys that a query sees on average."""
    full = sequence / 2
    return full if not shape.window else (full + min(full, shape.window)) / 2


def _layer(shape: ModelShape, layout: Layout, clock: Clock, experts: Experts | None) -> Parts:
    """Forward and backward of one layer for one micro-batch, recomputation included. `experts`: None = dense."""
    software, laws = clock.software, clock.laws
    tp, t, h = layout.tp, layout.tokens, shape.hidden
    shard = t / tp if software.sequence_parallel else t
    matmul = [clock.forward_backward(t, k, n) for k, n in shape.attention_matmuls(tp)]
    attention = clock.attention(
        t,
        _span(shape, layout.attended or layout.sequence),
        shape.heads / tp,
        shape.query_width / shape.heads,
        shape.head_dim,
    )
    # Norms and residual additions: 2 x (read, write, add) of the hidden state; rotary embedding; activation.
    volume = 2 * (12 * shard * h + 4 * t * (shape.query_width + shape.kv_width) / tp)
    mlp = 0.0  # seconds of the dense MLP's matrix products, forward
    if not experts:
        pairs = [clock.forward_backward(t, k, n) for k, n in shape.mlp_matmuls(shape.ffn, tp)]
        mlp = sum(f for f, _ in pairs)
        matmul += pairs
        volume += 2 * shape.mlp_matrices * t * shape.ffn / tp
        expert = moe_traffic = (0.0, 0.0)
    else:
        routed = t / tp * experts.top_k * layout.etp  # tokens through this rank's experts, whole or split
        local = max(1, expert_count(shape, layout))
        parts = shape.mlp_matmuls(experts.ffn, layout.etp)
        pairs = [clock.forward_backward(routed / local, k, n, local) for k, n in parts]
        if experts.shared_ffn:
            matmul += [clock.forward_backward(t, k, n) for k, n in shape.mlp_matmuls(experts.shared_ffn, tp)]
            volume += 2 * shape.mlp_matrices * t * experts.shared_ffn / tp
        expert = (sum(f for f, _ in pairs), sum(b for _, b in pairs))
        # Permute and un-permute each read and write every routed copy. Applying the scores is another pass.
        copies = 2 if software.fused_experts else 6
        volume += 2 * routed * (copies * h + shape.mlp_matrices * experts.ffn / layout.etp) + 8 * shard * experts.count
        dispatch = clock.all_to_all(2.0 * t / tp * experts.top_k * h, layout.ep, layout.etp, experts.top_k)
        gather = 2 * clock.ring(2.0 * routed * h, layout.etp)
        exposed = (laws.ep_overlapped if software.ep_overlap else laws.ep_exposed) * (2 * dispatch + gather)
        moe_traffic = (exposed, exposed)
    forward_matmul = sum(f for f, _ in matmul) + expert[0]
    backward_matmul = sum(b for _, b in matmul) + expert[1]
    moved = clock.elementwise(volume)
    collective = clock.ring(2.0 * t * h, tp)
    tp_exposed = laws.tp_exposed if software.tp_overlap else 1.0
    blocks = 2 if not experts or experts.shared_ffn else 1
    tensor = 2 * blocks * collective * tp_exposed  # a gather and a scatter around each block
    if software.cp_all_to_all:  # queries, keys, values and outputs change from tokens to heads; it is not hidden
        ring = clock.all_to_all(
            2.0 * t * (shape.query_width + shape.kv_width + shape.value_width) / tp, layout.cp, tp, 1
        )
    else:
        ring = clock.ring(2.0 * t * layout.cp * shape.kv_width / tp, layout.cp, tp) * laws.cp_exposed
    gap = laws.dense_gap + (laws.moe_gap if experts and not software.fused_experts else 0.0)
    gap = gap * 1e-6 * (0.3 if software.graphs else 1.0)
    forward = {
        "matmul": forward_matmul, "attention": attention[0], "elementwise": moved, "launch": gap,
        "tensor_parallel": tensor, "context_parallel": ring, "expert_parallel": moe_traffic[0],
    }  # fmt: skip
    backward = {
        "matmul": backward_matmul, "attention": attention[1], "elementwise": 1.5 * moved, "launch": 1.5 * gap,
        "tensor_parallel": 1.5 * tensor if software.sequence_parallel else tensor,
        "context_parallel": 2 * ring, "expert_parallel": moe_traffic[1],
    }  # fmt: skip
    total = _add(forward, backward)
    if software.recompute == "full":
        total = _add(total, forward)
    elif software.recompute == "attention":
        total["attention"] += attention[0]
    elif software.recompute in ("selective", "moe"):
        total["elementwise"] += 0.5 * moved
        if software.recompute == "moe":
            total["matmul"] += expert[0] + mlp
            total["expert_parallel"] += moe_traffic[0]
    if software.fsdp:
        weights = shape.attention_parameters(tp)
        weights += 0 if experts else shape.dense_parameters(tp)
        comm = 3 * clock.ring(2.0 * weights, layout.dp, tp)
        if experts:
            size = expert_count(shape, layout) * shape.expert_parameters() // layout.etp
            comm += 3 * clock.ring(2.0 * size, layout.expert_dp, layout.ep * layout.etp)
        total["data_parallel"] = max(0.0, comm - 0.8 * sum(total.values()))
    return total


def _head(shape: ModelShape, layout: Layout, clock: Clock) -> Parts:
    """Logits and cross-entropy of one micro-batch, forward and backward."""
    t, columns = layout.tokens, shape.vocab // layout.tp
    forward, backward = clock.forward_backward(t, shape.hidden, columns, dtype="bf16")
    return {"matmul": forward + backward, "elementwise": clock.elementwise(20.0 * t * columns)}


def _embedding(shape: ModelShape, layout: Layout, clock: Clock) -> Parts:
    return {"elementwise": clock.elementwise(12.0 * layout.tokens * shape.hidden)}


def _rank_parameters(shape: ModelShape, layout: Layout, stages: list[int]) -> tuple[float, float]:
    """(shared, expert) parameters of the largest rank."""
    layers = max(stages)
    moe = min(layers, shape.moe_layers)
    dense = layers * shape.attention_parameters(layout.tp) + (layers - moe) * shape.dense_parameters(layout.tp)
    dense += moe * shape.shared_parameters(layout.tp) + shape.embedding_parameters(layout.tp)
    if layout.pp == 1 and not shape.tied:
        dense += shape.embedding_parameters(layout.tp)
    experts = moe * expert_count(shape, layout) * shape.expert_parameters() // layout.etp
    return dense, experts


def _data_parallel(shape: ModelShape, layout: Layout, clock: Clock, stages: list[int], micro: float) -> float:
    """Exposed gradient reduction and parameter gathering."""
    software = clock.software
    if software.trainable < 0.5 or software.fsdp:
        return 0.0
    dense, experts = _rank_parameters(shape, layout, stages)
    width = software.gradient_bytes + 2.0
    seconds = clock.ring(width * dense, layout.dp * layout.cp, layout.tp)
    seconds += clock.ring(width * experts, layout.expert_dp, layout.ep * layout.etp)
    if not software.dp_overlap:
        return seconds
    return clock.laws.dp_exposed * seconds + max(0.0, (1 - clock.laws.dp_exposed) * seconds - micro)


def _optimizer(shape: ModelShape, layout: Layout, clock: Clock, stages: list[int]) -> float:
    """Adam reads gradient, master weight and both moments, and writes three of them and the weight; plus the norm."""
    dense, experts = _rank_parameters(shape, layout, stages)
    if clock.software.distributed_optimizer or clock.software.fsdp:
        dense, experts = dense / (layout.dp * layout.cp), experts / layout.expert_dp
    on_card = 1 - clock.software.offload_optimizer
    return 34.0 * (dense + experts) * clock.software.trainable * on_card / clock.hbm


def _offload(shape: ModelShape, layout: Layout, clock: Clock, stages: list[int], micro: float) -> float:
    """Adam on the host, with gradients and weights moved there and back; activations that move more slowly than the
    layers compute."""
    software, seconds = clock.software, 0.0
    if software.offload_optimizer:
        dense, experts = _rank_parameters(shape, layout, stages)
        share = dense / (layout.dp * layout.cp) + experts / layout.expert_dp
        seconds += (34.0 + 6.0) * share * software.offload_optimizer / (HOST * 1e9)
    if software.offload_layers:
        kept = layer_bytes(shape, layout, software, shape.moe is not None) * min(software.offload_layers, max(stages))
        seconds += layout.micro_batches * max(0.0, 2 * kept / (HOST * 1e9) - micro)
    return seconds


def _add(*loads: Parts) -> Parts:
    total: Parts = {}
    for load in loads:
        for name, seconds in load.items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def _times(load: Parts, factor: float) -> Parts:
    return {name: factor * seconds for name, seconds in load.items()}
