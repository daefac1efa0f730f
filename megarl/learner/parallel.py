"""Process groups: which rank this is, which layouts are possible, and waiting with a deadline."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megarl.config import Parallel, Precision
from megarl.errors import DeadlineExceeded, RanksLost, RunError, UserError
from megarl.learner import cpu
from megarl.learner import precision as precisions
from megarl.models.layout import Layout
from megarl.models.shape import ModelShape
from megarl.runtime import device
from megarl.runtime.launched import under_launcher
from megarl.runtime.store import connect
from megarl.runtime.watchdog import Watchdog, waiting

CUDA_ONLY = {
    "overlap_tp": False, "gradient_accumulation_fusion": False, "cp_comm": "p2p", "offload_optimizer": 0.0,
    "offload_layers": 0,
}  # fmt: skip
"""Settings of `parallel` that need a CUDA device with Transformer Engine → the value that needs none."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How this process was started."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def devices_here(world_size: int) -> int:
    """CUDA devices of this machine, from 0, that the learner's ranks use: of a job of `world_size` ranks in all."""
    if not device.on_cuda():
        return 0
    return launch_info().local_world_size if under_launcher() else world_size


def launch_info() -> Launch:
    """This process's place, from torchrun's or srun's environment. Without either: the only rank."""
    env = os.environ
    if "RANK" in env:
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
        return Launch(*(int(env.get(name, default)) for name, default in zip(names, "0101", strict=True)))
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        tasks = int(env["SLURM_STEP_NUM_TASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        return Launch(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", "0")), -(-tasks // nodes))
    return Launch()


@dataclass(frozen=True, slots=True)
class World:
    """This rank among the others."""

    rank: int
    world_size: int
    device: torch.device
    parallel: Parallel
    deadline_s: float
    control: dist.ProcessGroup  # all ranks, gloo: small messages from CPU memory

    @property
    def is_controller(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    @property
    def dp_size(self) -> int:
        return self.world_size // self.parallel.model_ranks

    @property
    def tp_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    @property
    def pp_rank(self) -> int:
        return parallel_state.get_pipeline_model_parallel_rank()

    @property
    def cp_rank(self) -> int:
        return parallel_state.get_context_parallel_rank()

    @property
    def last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.parallel.pp - 1

    @property
    def layout(self) -> Layout:
        """The sizes that the model map needs."""
        return layout_of(self.parallel)

    def barrier(self, name: str) -> None:
        """Wait for every rank. Raises DeadlineExceeded, naming `name` and the missing ranks."""
        timeout = datetime.timedelta(seconds=self.deadline_s)
        try:
            with waiting(f"the other ranks: {name}", self.deadline_s):
                dist.monitored_barrier(self.control, timeout, wait_all_ranks=True)
        except RuntimeError as e:
            if "closed" in str(e) or "reset" in str(e):
                raise RanksLost(f"{name}: another rank has left ({e})") from None
            raise DeadlineExceeded(f"{name} ({' '.join(str(e).split())})", self.deadline_s) from None

    def aside(self) -> World:
        """The same ranks in a separate group, for a thread that runs beside the main thread's collectives."""
        if self.world_size == 1:
            return self
        timeout = datetime.timedelta(seconds=self.deadline_s)
        return replace(self, control=dist.new_group(backend="gloo", timeout=timeout))

    def watchdog(self, deadline: float, folder: Path) -> Watchdog:
        """This rank's watchdog. It has a separate connection to the rendezvous store, so no wait delays its pulse."""
        store = None
        if self.world_size > 1:
            timeout = datetime.timedelta(seconds=deadline)
            own = connect(self.world_size)
            if own is None:
                address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                own = dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False)
            store = dist.PrefixStore("watchdog", own)
            store.set_timeout(timeout)
        return Watchdog(
            self.rank, self.world_size, store, deadline, folder, join=lambda: self.barrier("every rank's first pulse")
        )

    def release(self) -> None:
        """End the model-parallel groups. `start` can then lay out the same ranks again."""
        parallel_state.destroy_model_parallel()
        # Megatron only forgets its groups. Each gloo group keeps threads, and a few hundred of them stall the machine.
        for group in [g for g in dist.distributed_c10d._world.pg_map if g not in (dist.group.WORLD, self.control)]:
            dist.destroy_process_group(group)

    def close(self) -> None:
        """End this rank's part in the group."""
        self.release()
        dist.destroy_process_group()


def start(
    parallel: Parallel, precision: Precision, seed: int, deadline_s: float, rollout_timeout_s: float = 0.0
) -> World:
    """Join the process group and build the model-parallel groups.

    A collective of the model fails after `deadline_s` seconds. Messages between all ranks, in `World.control`, may also
    wait for another rank's rollout: they fail after `deadline_s` + `rollout_timeout_s`.

    Raises UserError if the ranks do not divide like this, if they need more devices than there are, or if this device
    does not support the precision.
    """
    launch = launch_info()
    check_ranks(parallel, launch.world_size)
    if cpu.installed() == device.on_cuda():  # too late to change: Megatron has been imported
        raise UserError(
            f"device: {device.chosen()} was chosen after megarl.learner had been imported for "
            f"{'the CPU' if cpu.installed() else 'CUDA'}; set {device.VARIABLE}={device.chosen()} in the environment"
        )
    precisions.check(precision)
    check_device(parallel)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron overlaps communication in issue order
    waits = datetime.timedelta(seconds=deadline_s + rollout_timeout_s)
    here = device.claim(launch.local_rank, launch.local_world_size)
    if not dist.is_initialized():
        # On a CPU this group is also the one for messages.
        _join(launch, datetime.timedelta(seconds=deadline_s) if device.on_cuda() else waits)
    control = dist.group.WORLD if not device.on_cuda() else dist.new_group(backend="gloo", timeout=waits)
    assert control is not None  # this rank has joined and is in every group
    if device.on_cuda():
        _check_shared(launch, here)
    make_groups(parallel, distributed_timeout_minutes=deadline_s / 60)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return World(launch.rank, launch.world_size, here, parallel, waits.total_seconds(), control)


def make_groups(parallel: Parallel, **options: Any) -> None:
    """Megatron's groups of a layout, within the default process group. Collective."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
        **options,
    )


def check(parallel: Parallel, shape: ModelShape) -> None:
    """Raise UserError, naming the setting and the nearest valid value, if the model does not divide like this.

    Needs no process group.
    """
    try:
        layout_of(parallel).check(shape)
    except UserError as e:
        raise UserError(f"parallel.{e}") from None
    if parallel.sequence_parallel and parallel.tp == 1:
        raise UserError("parallel.sequence_parallel: true needs parallel.tp > 1; nearest valid value: false")
    if parallel.etp and not shape.moe:
        raise UserError(f"parallel.etp: {parallel.etp}: the model has no experts; leave it unset")
    if parallel.overlap_tp and (parallel.cp > 1 or not parallel.uses_sequence_parallel):
        raise UserError("parallel.overlap_tp: true needs sequence parallelism and cp 1; nearest valid value: false")
    heads = shape.kv_groups // parallel.tp
    if parallel.cp_comm == "a2a" and heads % parallel.cp:
        raise UserError(
            f"parallel.cp_comm: a2a: cp {parallel.cp} does not divide the {heads} key/value groups of a "
            "tensor-parallel rank; nearest valid value: p2p"
        )
    if parallel.offload_layers and (parallel.pp > 1 or parallel.recompute != "none"):
        raise UserError(
            f"parallel.offload_layers: {parallel.offload_layers} needs pp 1 and recompute none; nearest valid value: 0"
        )
    if parallel.offload_layers >= shape.layers:
        raise UserError(
            f"parallel.offload_layers: {parallel.offload_layers} of {shape.layers} layers; "
            f"nearest valid value: {shape.layers - 1}"
        )
    if parallel.recompute == "selective" and not shape.moe:
        for module in sorted({"moe", "moe_act"} & set(parallel.recompute_modules)):
            raise UserError(f"parallel.recompute_modules: {module}: the model has no experts; nearest valid value: mlp")
    if parallel.offload_optimizer and not parallel.distributed_optimizer:
        raise UserError("parallel.offload_optimizer: needs parallel.distributed_optimizer; nearest valid value: 0")


def check_device(parallel: Parallel) -> None:
    """Raise UserError for a setting that has no effect, or fails, without CUDA and Transformer Engine."""
    for name, neutral in CUDA_ONLY.items():
        value = getattr(parallel, name)
        if value and value != neutral and not device.transformer_engine():
            raise UserError(
                f"parallel.{name}: {value} needs a CUDA device with Transformer Engine; "
                f"nearest valid value: {str(neutral).lower()}"
            )
    fine = {"core_attn", "mlp", "moe"}
    if parallel.recompute == "selective" and not device.transformer_engine():
        for module in parallel.recompute_modules:
            if module not in fine:  # recomputing without keeping the output needs the engine's FP8 state
                raise UserError(
                    f"parallel.recompute_modules: {module} needs a CUDA device with Transformer Engine; "
                    f"valid values here: {', '.join(sorted(fine))}"
                )


def check_ranks(parallel: Parallel, world_size: int) -> None:
    """Raise UserError unless `world_size` ranks make a whole number of models."""
    if world_size % parallel.model_ranks:
        sizes = f"tp {parallel.tp} * pp {parallel.pp} * cp {parallel.cp} = {parallel.model_ranks}"
        nearest = max(1, round(world_size / parallel.model_ranks)) * parallel.model_ranks
        raise UserError(f"parallel: {world_size} ranks are not a multiple of {sizes}; nearest valid number: {nearest}")
    stage, etp = world_size // parallel.pp, parallel.etp or parallel.tp
    if stage % etp:
        best = max(d for d in range(1, etp) if stage % d == 0)
        raise UserError(
            f"parallel.etp: {etp} does not divide the {stage} ranks of a pipeline stage; nearest valid value: {best}"
        )
    if (replicas := stage // etp) % parallel.ep:
        best = max(d for d in range(1, parallel.ep) if replicas % d == 0)
        raise UserError(
            f"parallel.ep: {parallel.ep} does not divide the {replicas} ranks of each tensor- and pipeline-parallel "
            f"part; nearest valid value: {best}"
        )


def layout_of(parallel: Parallel) -> Layout:
    """Model-parallel sizes as the model map needs them."""
    return Layout(tp=parallel.tp, pp=parallel.pp, vpp=parallel.vpp, ep=parallel.ep, etp=parallel.etp)


def _join(launch: Launch, timeout: datetime.timedelta) -> None:
    # Without `device_id`. It would make torch split every group off this one, by a call of all its ranks: one at a time
    # at start, and never returning where weights are sent, because the engines' ranks are in no such group.
    if launch == Launch():
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(
            device.backend(),
            store=connect(launch.world_size),  # None: torchrun's or srun's
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except dist.DistNetworkError as e:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {launch.rank} could not reach the rendezvous at {where}: {e}") from None
    except dist.DistStoreError:
        raise DeadlineExceeded(f"{launch.world_size} ranks to join", timeout.total_seconds()) from None


def _check_shared(launch: Launch, here: torch.device) -> None:
    """Raise UserError if another rank has this rank's device: NCCL would fail at the first collective.

    That can be only where a rank sees fewer devices than there are ranks beside it.
    """
    if torch.cuda.device_count() >= launch.local_world_size:
        return
    store = dist.PrefixStore("devices", dist.distributed_c10d._get_default_store())
    name, rank = device.identity(here), str(launch.rank)
    first = store.compare_set(name, "", rank).decode()
    if first != rank:
        raise UserError(
            f"device: ranks {first} and {rank} both use CUDA device {name}; give each task another device "
            "(srun --gpus-per-task=1), or let every task see all devices of its node (srun --gpus-per-node)"
        )
