"""Send a batch from the controller to every rank: one message of arrays, without pickle."""

from __future__ import annotations

import io
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist

from megarl.learner.parallel import World
from megarl.types import Batch, Sample

PER_TOKEN = ("sampled", "rollout_logprobs", "old_logprobs", "ref_logprobs")
PER_SAMPLE = ("response_start", "scale", "advantage")


def broadcast(batch: Batch | None, world: World) -> Batch:
    """Rank 0's batch, on every rank. Collective."""
    if world.is_controller:
        assert batch is not None
        if world.world_size > 1:
            payload = torch.from_numpy(np.frombuffer(encode(batch), np.uint8).copy())
            dist.broadcast(torch.tensor([len(payload)]), 0, group=world.control)
            dist.broadcast(payload, 0, group=world.control)
        return batch
    size = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(size, 0, group=world.control)
    payload = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(payload, 0, group=world.control)
    return decode(payload.numpy().tobytes())


def encode(batch: Batch) -> bytes:
    """The batch as an npz archive: token arrays joined end to end, and one entry per sample for the rest."""
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
    routed = [s.experts for s in samples if s.experts is not None]
    arrays["has_experts"] = np.array([s.experts is not None for s in samples], bool)
    arrays["experts"] = _joined(routed, np.int16)
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
    for name, sizes in (*((name, responses) for name in PER_TOKEN), ("experts", lengths - 1)):
        has = arrays[f"has_{name}"]
        parts = iter(np.split(arrays[name], np.cumsum(sizes[has])[:-1]) if has.any() else [])
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
