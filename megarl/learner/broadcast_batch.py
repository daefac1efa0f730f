"""Send a batch from the controller to every rank, without pickle: one message of arrays, the same for all.

Recorded routing (`Sample.experts`) is much larger than all the rest. Each rank gets only that of its rows.
"""

from __future__ import annotations

import io
from dataclasses import fields, replace

import numpy as np
import torch
import torch.distributed as dist

from megarl.learner.parallel import World
from megarl.types import Batch, Sample

PER_TOKEN = ("sampled", "rollout_logprobs", "old_logprobs", "ref_logprobs")
PER_SAMPLE = ("response_start", "scale", "advantage")


def broadcast(batch: Batch | None, world: World) -> Batch:
    """Rank 0's batch, on every rank. Elsewhere, samples outside the rank's rows come without `experts`. Collective."""
    if world.is_controller:
        assert batch is not None
        if world.world_size > 1:
            payload = torch.from_numpy(np.frombuffer(encode(batch), np.uint8).copy())
            dist.broadcast(torch.tensor([len(payload)]), 0, group=world.control)
            dist.broadcast(payload, 0, group=world.control)
            _send_routing(batch, world)
        return batch
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0, group=world.control)
    payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, 0, group=world.control)
    batch = decode(payload.numpy().tobytes())
    return replace(batch, samples=_receive_routing(batch, world))


def _send_routing(batch: Batch, world: World) -> None:
    """Each rank's part of the recorded routing, one data-parallel rank's at a time."""
    shapes = [s.experts.shape[1:] if s.experts is not None else (0, 0) for s in batch.samples]
    header = torch.tensor(shapes, dtype=torch.int64).reshape(len(shapes), 2)
    dist.broadcast(header, 0, group=world.control)
    if not header.any():
        return
    replicas = _replicas(world)
    for replica in range(world.dp_size):
        ranks = [rank for rank, its in enumerate(replicas) if its == replica and rank > 0]
        parts = [batch.samples[i].experts for i in _routed(batch, replica, header)]
        if ranks and parts:
            data = torch.from_numpy(np.concatenate([part.ravel() for part in parts if part is not None]).view(np.uint8))
            for rank in ranks:
                dist.send(data, rank, group=world.control)


def _receive_routing(batch: Batch, world: World) -> list[Sample]:
    """The samples, with the recorded routing of those in this rank's rows."""
    header = torch.zeros(len(batch.samples), 2, dtype=torch.int64)
    dist.broadcast(header, 0, group=world.control)
    samples = list(batch.samples)
    if not header.any():
        return samples
    indices = _routed(batch, _replicas(world)[world.rank], header)
    shapes = [(samples[i].input_length, *header[i].tolist()) for i in indices]
    ends = np.cumsum([np.prod(shape) for shape in shapes], dtype=np.int64)
    if indices:
        data = torch.empty(2 * int(ends[-1]), dtype=torch.uint8)
        dist.recv(data, 0, group=world.control)
        parts = np.split(data.numpy().view(np.int16), ends[:-1])
        for i, part, shape in zip(indices, parts, shapes, strict=True):
            samples[i] = replace(samples[i], experts=part.reshape(shape))
    return samples


def _replicas(world: World) -> list[int]:
    """The data-parallel rank of every rank. Collective."""
    found = [torch.zeros(1, dtype=torch.int64) for _ in range(world.world_size)]
    dist.all_gather(found, torch.tensor([world.dp_rank]), group=world.control)
    return [int(each) for each in found]


def _routed(batch: Batch, replica: int, header: torch.Tensor) -> list[int]:
    """The samples in this data-parallel rank's rows that have a recorded routing."""
    return [i for i in sorted({i for row in batch.rows[replica] for i in row}) if header[i].any()]


def encode(batch: Batch) -> bytes:
    """The batch as an npz archive, without routing: token arrays joined end to end, one entry a sample for the rest."""
    assert {f.name for f in fields(Sample)} == {"token_ids", "experts", *PER_SAMPLE, *PER_TOKEN}
    samples = batch.samples
    arrays = {
        "lengths": np.array([len(s.token_ids) for s in samples], np.int64),
        "token_ids": _joined([s.token_ids for s in samples], np.int32),
        "totals": np.array([batch.total_sequences, batch.total_tokens]),
        "ranks": np.array([len(rank) for rank in batch.rows], np.int64),
        "rows": np.array([len(row) for rank in batch.rows for row in rank], np.int64),
        "order": np.array([i for rank in batch.rows for row in rank for i in row], np.int64),
    }
    for name in PER_SAMPLE:
        arrays[name] = np.array([getattr(s, name) for s in samples])
    for name in PER_TOKEN:
        values = [getattr(s, name) for s in samples]
        arrays[f"has_{name}"] = np.array([v is not None for v in values], bool)
        arrays[name] = _joined([v for v in values if v is not None], bool if name == "sampled" else np.float32)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def decode(data: bytes) -> Batch:
    """The batch that `encode` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        arrays = dict(archive)
    lengths = arrays["lengths"]
    tokens = np.split(arrays["token_ids"], np.cumsum(lengths)[:-1]) if len(lengths) else []
    columns = {name: arrays[name].tolist() for name in PER_SAMPLE}
    responses = lengths - arrays["response_start"] if len(lengths) else lengths
    for name in PER_TOKEN:
        has = arrays[f"has_{name}"]
        parts = iter(np.split(arrays[name], np.cumsum(responses[has])[:-1]) if has.any() else [])
        columns[name] = [next(parts) if present else None for present in has]
    samples = [
        Sample(token_ids=ids, **{name: column[i] for name, column in columns.items()}) for i, ids in enumerate(tokens)
    ]
    order = iter(arrays["order"].tolist())
    sizes = iter(arrays["rows"].tolist())
    rows = [[[next(order) for _ in range(next(sizes))] for _ in range(count)] for count in arrays["ranks"].tolist()]
    return Batch(samples, rows, *arrays["totals"].tolist())


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
