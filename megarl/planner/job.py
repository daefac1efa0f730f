"""One step of a run on given GPUs: memory of every stage, and the time of rollout, log-probs, training and sync."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarl.config import Parallel, Precision, Settings
from megarl.errors import UserError
from megarl.models.shape import ModelShape
from megarl.planner.hardware import LAWS, Architecture, Dtype, Gpu
from megarl.planner.layout import Layout, Recompute, Software
from megarl.planner.memory import Holding, StageMemory, plan_memory, stage_holdings
from megarl.planner.steptime import StepTime, step_time

DENSITY = 0.95  # of rows under dense packing
ENGINE_TP_FLAGS = ("--tp-size", "--tp", "--tensor-parallel-size", "-tp")
ENGINE_MEMORY_FLAGS = ("--mem-fraction-static", "--gpu-memory-utilization")
RECIPES: dict[Architecture, str] = {"hopper": "blockwise", "blackwell": "mxfp8"}
"""What `precision.recipe: auto` is on each architecture with FP8."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of the rollout side that cost memory or time."""

    engines: int
    tp: int
    concurrency: int
    embedded: bool  # one on each of the learner's GPUs; servers have GPUs of their own


@dataclass(slots=True)
class Plan:
    """Memory and time of one step."""

    gpu: Gpu
    shape: ModelShape
    layout: Layout
    software: Software
    engine: Engine
    precision: str  # the compute type, with FP8's recipe
    stages: list[StageMemory]
    train: StepTime  # one optimizer update
    seconds: dict[str, float]  # rollout, logprobs, train, sync
    tokens: float  # trained per step
    exact: bool  # parameters were counted on the real model

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def gpu_hours(self) -> float:
        """Of 100 steps."""
        return 100 * self.step_seconds * self.layout.gpus / 3600

    @property
    def mfu(self) -> float:
        """Of the training phase, against the bf16 peak."""
        return self.train.mfu(self.layout.gpus, self.gpu)

    @property
    def peak(self) -> StageMemory:
        """The fullest stage."""
        return max(self.stages, key=lambda stage: stage.driver(self.layout))

    @property
    def fits(self) -> bool:
        return self.peak.driver(self.layout) <= self.gpu.memory


def runnable(precision: Precision, gpu: Gpu) -> str:
    """The compute type, with FP8's recipe on this GPU. Raises UserError where the GPU has none."""
    if precision.dtype != "fp8":
        return precision.dtype
    best, recipe = RECIPES.get(gpu.architecture), str(precision.recipe)
    if best is None:
        raise UserError(f"precision.dtype: fp8 does not run on {gpu.name}; nearest valid value: bf16")
    if recipe == "mxfp8" != best:
        raise UserError(f"precision.recipe: mxfp8 does not run on {gpu.name}; nearest valid value: {best}")
    return f"fp8 {best if recipe == 'auto' else recipe}"


def software(settings: Settings) -> Software:
    """The learner's software under these settings on a GPU with Transformer Engine."""
    parallel, precision = settings.parallel, settings.precision
    dtype: Dtype = precision.dtype
    narrow = dtype == "fp8"
    return Software(
        dtype=dtype,
        bf16_layers=precision.high_precision_layers if narrow else 0,
        # Parameters stay in bf16. Transformer Engine caches a row- and a column-wise FP8 copy over the micro-batches.
        weight_copies=2.0 if narrow else 0.0,
        sequence_parallel=parallel.uses_sequence_parallel,
        tp_overlap=parallel.overlap_tp,
        dp_overlap=parallel.overlap_grad_reduce,
        distributed_optimizer=parallel.distributed_optimizer,
        recompute=recomputed(parallel),
        p2p_overlap=parallel.overlap_p2p,
        gradient_fusion=parallel.gradient_accumulation_fusion is not False,
        cp_all_to_all=parallel.cp_comm == "a2a",
        offload_optimizer=parallel.offload_optimizer,
        offload_layers=parallel.offload_layers,
        chunked_loss=True,
    )


def recomputed(parallel: Parallel) -> Recompute:
    """The planner's term for what is recomputed."""
    if parallel.recompute != "selective":
        return parallel.recompute
    modules = set(parallel.recompute_modules)
    if modules & {"moe", "mlp"}:
        return "moe"
    return "selective" if modules & {"layernorm", "moe_act"} else "attention"


def layout(settings: Settings, gpus: int, response_tokens: float) -> Layout:
    """The layout of one optimizer update. Raises UserError unless `gpus` make a whole number of models."""
    parallel, batch = settings.parallel, settings.batch
    if gpus % parallel.model_ranks or gpus < parallel.model_ranks:
        near = max(1, round(gpus / parallel.model_ranks)) * parallel.model_ranks
        raise UserError(
            f"gpus: {gpus} is not a multiple of tp {parallel.tp} * pp {parallel.pp} * cp {parallel.cp}; "
            f"nearest valid number: {near}"
        )
    replicas = gpus // ((parallel.etp or parallel.tp) * parallel.pp)
    if replicas % parallel.ep:
        near = max(d for d in range(1, parallel.ep + 1) if replicas % d == 0)
        raise UserError(
            f"parallel.ep: {parallel.ep} does not divide the {replicas} ranks of a stage; nearest valid value: {near}"
        )
    sample = response_tokens + settings.data.max_prompt_tokens / 2
    prompts = batch.prompts_per_update or batch.prompts_per_step
    rows = prompts * batch.completions_per_prompt * sample / (DENSITY * batch.tokens_per_row)
    data_parallel = gpus // parallel.model_ranks
    return Layout(
        gpus=gpus,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        etp=parallel.etp or parallel.tp,
        micro_batch=1,
        global_batch=max(1, -(-int(rows) // data_parallel)) * data_parallel,
        sequence=batch.tokens_per_row,
        attended=min(int(sample), batch.tokens_per_row),
    )


def plan(
    settings: Settings,
    shape: ModelShape,
    gpu: Gpu,
    gpus: int,
    response_tokens: float | None = None,
    holdings: list[Holding] | None = None,
) -> Plan:
    """Memory and time of one step. `response_tokens`: mean length of a response; default: half of the maximum."""
    response = response_tokens or settings.rollout.max_response_tokens / 2
    precision = runnable(settings.precision, gpu)
    place, stack = layout(settings, gpus, response), software(settings)
    engine = _engine(settings, gpus)
    held = holdings or stage_holdings(shape, place)
    stages = plan_memory(shape, place, stack, held)
    if settings.algorithm.kl.coef > 0:  # a frozen copy of the weights, in the model's own type
        wide = 4.0 if stack.dtype == "fp32" else 2.0
        stages = [
            replace(s, parts={**s.parts, "reference": wide * (h.shared + h.experts)})
            for s, h in zip(stages, held, strict=True)
        ]
    if engine.embedded:
        stages = [replace(s, parts={**s.parts, **embedded_bytes(settings, shape)}) for s in stages]
    train = step_time(shape, place, stack, gpu)
    updates = settings.batch.updates_per_step
    algorithm = settings.algorithm
    passes = int(algorithm.old_logprobs == "recompute" or (algorithm.old_logprobs == "auto" and updates > 1))
    passes += int(algorithm.kl.coef > 0)
    plain = step_time(shape, place, replace(stack, recompute="none"), gpu).seconds
    sequences = settings.batch.prompts_per_step * settings.batch.completions_per_prompt
    seconds = {
        "rollout": rollout_seconds(settings, shape, engine, gpu, sequences, response),
        "logprobs": passes * updates * plain / 3,
        "train": updates * train.seconds,
        "sync": _sync_seconds(shape, gpu),
    }
    tokens = sequences * (response + settings.data.max_prompt_tokens / 2)
    return Plan(gpu, shape, place, stack, engine, precision, stages, train, seconds, tokens, holdings is not None)


def rollout_seconds(
    settings: Settings, shape: ModelShape, engine: Engine, gpu: Gpu, sequences: int, response: float
) -> float:
    """Memory limits decoding: each pass reads the active weights and every running sequence's keys and values."""
    share = sequences / engine.engines
    running = max(1.0, min(share, engine.concurrency))
    context = settings.data.max_prompt_tokens / 2 + response / 2
    active = float(shape.parameters() - shape.embedding_parameters())
    if shape.moe:
        touched = 1 - (1 - shape.moe.top_k / shape.moe.count) ** running
        active -= shape.moe_layers * shape.moe.count * shape.expert_parameters() * (1 - touched)
    volume = 2 * (active + running * context * shape.layers * shape.kv_width) / engine.tp
    one_pass = volume / (gpu.hbm * 1e12 * LAWS.efficiency(gpu.architecture).hbm)
    one_pass += shape.layers * 2 * LAWS.latency * 1e-6 * (1 if engine.tp > 1 else 0.25)
    passes = max(share * response / running, settings.rollout.max_response_tokens if share <= running else 0)
    return passes * one_pass


def _engine(settings: Settings, gpus: int) -> Engine:
    """Without addresses, the servers have as many GPUs as the learner."""
    rollout, servers = settings.rollout, settings.rollout.servers
    if rollout.embedded:
        return Engine(gpus, 1, rollout.local_max_sequences, True)
    tp = int(_flag(servers.flags, ENGINE_TP_FLAGS) or 1)
    return Engine(len(servers.addresses) or max(servers.count, gpus // tp), tp, servers.concurrency, False)


def check_engine_flags(settings: Settings, shape: ModelShape) -> None:
    """Raise UserError for a tensor-parallel size or a share of memory with which no server can start."""
    flags = settings.rollout.servers.flags
    if settings.rollout.engine == "local":
        return
    tp = _flag(flags, ENGINE_TP_FLAGS) or "1"
    if not tp.isdecimal() or int(tp) < 1 or shape.heads % int(tp):
        limit = int(tp) if tp.isdecimal() else 1
        near = max((d for d in range(1, min(limit, shape.heads) + 1) if shape.heads % d == 0), default=1)
        raise UserError(
            f"rollout.servers.flags: tensor-parallel size {tp} does not divide the model's {shape.heads} heads; "
            f"nearest valid value: {near}"
        )
    pool = _flag(flags, ENGINE_MEMORY_FLAGS)
    try:
        share = 0.5 if pool is None else float(pool)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"rollout.servers.flags: share of memory {pool} is not between 0 and 1; try 0.85")


def _flag(flags: list[str], names: tuple[str, ...]) -> str | None:
    """The value of a server flag, written `--name value` or `--name=value`, also within one string."""
    words = " ".join(flags).replace("=", " ").split()
    return next((words[i + 1] for i, word in enumerate(words[:-1]) if word in names), None)


def embedded_bytes(settings: Settings, shape: ModelShape) -> dict[str, float]:
    """Bytes of the embedded engine on each GPU: all weights and the whole cache, which it allocates at its start."""
    rollout, width = settings.rollout, 4 if settings.precision.dtype == "fp32" else 2
    cache = shape.cache_bytes(rollout.local_max_sequences, settings.longest_sequence, width, rollout.replay_routing)
    return {"engine_weights": width * shape.parameters(), "kv_cache": cache}


def _sync_seconds(shape: ModelShape, gpu: Gpu) -> float:
    """Every engine receives all weights in bf16. The GPUs of a domain share the load, and the copy is pipelined."""
    return 2.0 * shape.parameters() / (min(gpu.nvlink * LAWS.nvlink, 8 * gpu.network * LAWS.network) * 1e9)
