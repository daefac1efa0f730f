"""What the learner does differently on CUDA, as far as a CPU can show it: torch's CUDA calls are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.bench.common.learners import new_learner, samples, settings, split
from megarl.bench.common.models import write_model
from megarl.config import Parallel, Precision
from megarl.errors import UserError
from megarl.learner import learner as learners
from megarl.learner import logprobs, model, parallel
from megarl.learner.learner import sft_objective
from megarl.learner.rows import Alignment, build_row
from megarl.runtime.spawn import spawn
from tests.support.learner_support import Alone, random_samples

DEADLINE = 240.0
VOCAB = 3000


def _mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """torch.mm as on CUDA: with `out_dtype` it takes 16-bit operands and gives float32, not rounded."""
    if out_dtype is None:
        product = a @ b
        return product if out is None else out.copy_(product)
    assert out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
    return a.float() @ b.float()


def _addmm(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    assert total.dtype == out_dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
    return out.copy_(total + a.float() @ b.float())


@pytest.fixture
def cuda_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors that call themselves CUDA's, and the products that CUDA has."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch, "mm", _mm)
    monkeypatch.setattr(torch, "addmm", _addmm)


def _errors() -> tuple[float, float]:
    """Largest error of bf16 operands' log-probs, and the weight gradient's, relative; against float64."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 128).bfloat16()
    weight = (torch.randn(VOCAB, 128) / 4).bfloat16()
    labels = torch.randint(0, VOCAB, (64,))
    ours = weight.clone().requires_grad_()
    found, _ = logprobs.logprobs_and_entropy(hidden, ours, labels, 1.0, VOCAB, Alone())  # type: ignore[arg-type]
    found.sum().backward()
    exact = weight.double().requires_grad_()
    wanted = (hidden.double() @ exact.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted.sum().backward()
    assert ours.grad is not None and exact.grad is not None
    apart = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
    return float((found - wanted).abs().max()), float(apart)


def test_logprobs_come_from_logits_that_are_not_rounded(cuda_products: None) -> None:
    """With bf16 operands they are within float32's rounding of the exact ones."""
    error, _ = _errors()
    assert error < 1e-4


def test_gradients_add_up_unrounded_over_chunks(cuda_products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient is as exact in many chunks as in one."""
    monkeypatch.setattr(logprobs, "KEEP_BYTES", 0)
    _, whole = _errors()
    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cuda", 4 * VOCAB * 5)
    _, parts = _errors()
    assert parts == pytest.approx(whole, rel=1e-2)


def test_a_rows_boundaries_are_one_tensor_on_the_device() -> None:
    """Transformer Engine compares the four in every layer, and waits for the device unless they are one tensor."""
    given = random_samples(0, 3)
    alignment = Alignment(1, 8)
    there = torch.device("meta")
    row = build_row(range(3), given, alignment.row_length(given), alignment, None, device=there)
    packed = row.packed
    shared = [packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded]
    assert all(each is row.micro.cu_seqlens for each in shared)
    assert row.micro.tokens.device == row.scored.device == there
    assert packed.cos is None and packed.sin is None  # Transformer Engine rotates by itself


def _built_at_each_loss(folder: Path) -> list[int]:
    """Runs on the rank: how many rows had been built at the loss of each."""
    learner = new_learner(settings(folder))
    build, built, seen = learners.build_row, [0], list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        built[0] += 1
        return build(*args, **options)

    def objective(*args: Any) -> Any:
        seen.append(built[0])
        return sft_objective(*args)

    learners.build_row = counted
    learner.accumulate(split(samples(), 1, 1), objective)
    learner.world.release()
    return seen


@pytest.mark.parallel
def test_rows_are_built_as_they_are_needed(tmp_path: Path) -> None:
    """Not all of an update before its first micro-batch."""
    write_model(tmp_path)
    assert spawn(_built_at_each_loss, 1, (tmp_path,), DEADLINE)[0] == [1, 2, 3, 4, 5]


def _fused(folder: Path) -> list[bool]:
    """Runs on the rank: whether fusion is asked for, by default and not; and that a model with it can be built."""
    from megarl.models.config_json import read_shape

    chosen = settings(folder)
    world = parallel.start(chosen.parallel, chosen.precision, 0, DEADLINE)
    shape = read_shape(folder)
    config = model.transformer_config(shape, chosen.parallel, chosen.precision)
    config.gradient_accumulation_fusion = True
    assert len(model.build(shape, config, chosen.precision)) == 1
    model.device.transformer_engine = lambda: True
    model.TransformerConfig = SimpleNamespace  # Megatron's refuses fused kernels where they are not
    fusion = [
        model.transformer_config(shape, Parallel(gradient_accumulation_fusion=asked), Precision())
        for asked in (None, True, False)
    ]
    world.release()
    return [each.gradient_accumulation_fusion for each in fusion]


@pytest.mark.parallel
def test_gradients_are_fused_without_apex(tmp_path: Path) -> None:
    """Megatron's output layer would refuse: it asks for apex's kernel, which ours never calls."""
    write_model(tmp_path)
    assert spawn(_fused, 1, (tmp_path,), DEADLINE)[0] == [True, True, False]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `start` asks torch and Megatron for on a machine with CUDA, written down."""
    asked: dict[str, Any] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel.cpu, "installed", lambda: False)
    monkeypatch.setattr(parallel.device, "on_cuda", lambda: True)
    monkeypatch.setattr(parallel.device, "claim", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda *a, **more: asked.update(default=(a, more)))

    def new_group(**more: Any) -> Alone:
        asked["control"] = more
        return Alone()

    monkeypatch.setattr(parallel.dist, "new_group", new_group)
    monkeypatch.setattr(
        parallel.parallel_state, "initialize_model_parallel", lambda **more: asked.update(megatron=more)
    )
    monkeypatch.setattr(parallel.tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None)
    yield asked


def test_the_default_group_is_bound_to_no_device(groups: dict[str, Any]) -> None:
    """Bound, torch would split every later group off it, also the one for weights, and hang."""
    parallel.start(Parallel(), Precision(), 0, 900.0)
    (backend,), options = groups["default"]
    assert backend == "nccl"
    assert options.get("device_id") is None


def test_nccl_waits_no_longer_than_a_collective_may_take(groups: dict[str, Any]) -> None:
    """Only messages over gloo wait for rollouts, so only they have both times."""
    world = parallel.start(Parallel(), Precision(), 0, 900.0, 7200.0)
    assert groups["default"][1]["timeout"].total_seconds() == 900.0
    assert groups["megatron"]["distributed_timeout_minutes"] == 15.0
    assert groups["control"]["backend"] == "gloo"
    assert groups["control"]["timeout"].total_seconds() == world.deadline_s == 8100.0


def test_weights_are_first_waited_for_over_gloo() -> None:
    """An engine may finish rollouts before it takes weights; NCCL's gathering begins when every rank is there."""
    done: list[str] = []
    world = SimpleNamespace(world_size=2, barrier=lambda name: done.append(f"barrier: {name}"))
    weights = SimpleNamespace(stream=lambda read: iter([done.append("stream")]))
    some = SimpleNamespace(world=world, weights=weights, finish_parameter_gather=lambda: done.append("gather"))
    list(learners.Learner.named_tensors(some))  # type: ignore[arg-type]
    assert done == ["barrier: the weights to be asked for", "gather", "stream"]


@pytest.mark.parametrize("devices", [["a", "b"], ["a", "a"]])
def test_two_ranks_on_one_device_are_told_apart(
    groups: dict[str, Any], monkeypatch: pytest.MonkeyPatch, devices: list[str]
) -> None:
    """Each sees one device. Only by their UUIDs can they tell whether it is the same one, which NCCL refuses."""
    store = parallel.dist.HashStore()
    monkeypatch.setattr(parallel.dist.distributed_c10d, "_get_default_store", lambda: store)
    for rank, name in enumerate(devices):
        for variable, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(variable, str(value))
        monkeypatch.setattr(parallel.device, "identity", lambda device, name=name: name)
        if name in devices[:rank]:
            with pytest.raises(UserError, match="device: ranks 0 and 1 both use CUDA device a; .*--gpus-per-task=1"):
                parallel.start(Parallel(), Precision(), 0, 900.0)
        else:
            parallel.start(Parallel(), Precision(), 0, 900.0)
