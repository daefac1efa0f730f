"""Parameters per rank and stage of the real Megatron model, built on the meta device in a fake world of full size.

A separate process without CUDA builds it, because a fake process group must not meet a real one. Every stage has the
same number of layers, so those between the first and the last are equal, and at most three are built.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

from megarl.config import Parallel
from megarl.errors import DeadlineExceeded, RunError
from megarl.models.shape import ModelShape
from megarl.planner.memory import Holding


def count(shape: ModelShape, parallel: Parallel, gpus: int, deadline_s: float = 300.0) -> list[Holding]:
    """Parameters of one rank of each pipeline stage. Raises RunError when Megatron refuses to build it."""
    order = pickle.dumps((shape, parallel, gpus))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "megarl.planner.count"]
    try:
        done = subprocess.run(
            command, input=order, capture_output=True, timeout=deadline_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded("Megatron to build the model on the meta device", deadline_s) from None
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise RunError(f"Megatron could not build the model on the meta device: {last}")
    return [Holding(*pair) for pair in json.loads(done.stdout.splitlines()[-1])]


def build_stages(shape: ModelShape, parallel: Parallel, gpus: int) -> list[Holding]:
    """`count` in this process, which must not have a process group. None is left behind."""
    from megarl.learner import cpu

    cpu.install()
    kinds = {0: 0, parallel.pp - 1: parallel.pp - 1, min(1, parallel.pp - 1): min(1, parallel.pp - 1)}
    held = {stage: _build(shape, parallel, gpus, stage) for stage in kinds}
    middle = held[min(1, parallel.pp - 1)]
    return [held.get(stage, middle) for stage in range(parallel.pp)]


def _build(shape: ModelShape, parallel: Parallel, gpus: int, stage: int) -> Holding:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megarl.config import Precision
    from megarl.learner import model
    from megarl.learner.parallel import CUDA_ONLY, make_groups

    # Megatron orders ranks tp, cp, ep, dp, pp: the first rank of stage s is s times the ranks of a stage.
    dist.init_process_group("fake", store=FakeStore(), rank=stage * (gpus // parallel.pp), world_size=gpus)
    try:
        make_groups(parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        with torch.device("meta"):
            precision = Precision(dtype="bf16")
            placed = parallel.model_copy(update=CUDA_ONLY)
            chunks = model.build(shape, model.transformer_config(shape, placed, precision), precision)
        shared = experts = 0
        for chunk in chunks:
            for parameter in chunk.parameters():
                # Megatron marks what the expert-data-parallel group reduces, not the whole data-parallel group.
                if getattr(parameter, "allreduce", True):
                    shared += parameter.numel()
                else:
                    experts += parameter.numel()
        return Holding(shared, experts)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps([[held.shared, held.experts] for held in build_stages(*pickle.load(sys.stdin.buffer))]))
