"""Weights through a folder that the trainer and the engines can read: for any engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megarl.errors import RunError
from megarl.rollout.weights.transport import BUCKET, Named, Outcome, Receiver, buckets
from megarl.rollout.weights.verify import checksum


class DiskTransport:
    """Writes `folder/weights-VERSION` in Hugging Face's layout, one file per bucket, and has the engines load it.

    Keeps the newest complete folder for restarted engines, and removes the one before it.
    """

    def __init__(self, folder: Path, model: Path, dtype: torch.dtype, *, bucket: int = BUCKET) -> None:
        """`model`: the folder whose config and tokenizer files are copied beside the weights."""
        self._folder = folder.resolve()
        self._model = model
        self._dtype = dtype
        self._bucket = bucket
        self._current: tuple[int, Path] | None = None

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        digests = [engine.digests() for engine in engines]
        folder = self._folder / f"weights-{version}"
        partial = self._folder / f"weights-{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written: dict[str, str] = {}
        size = 0
        for number, bucket in enumerate(buckets(tensors, self._dtype, self._bucket)):
            file = f"model-{number:05d}.safetensors"
            for name, tensor in bucket:
                written[name] = file
                size += tensor.nbytes
                for sent in filter(None, digests):
                    sent.add(name, tensor)
            # Copied: safetensors refuses tensors that share storage, as tied or sliced ones do.
            owned = {name: tensor.cpu().contiguous().clone() for name, tensor in bucket}
            await asyncio.to_thread(save_file, owned, partial / file, {"format": "pt"})
        index = {"metadata": {"total_size": size}, "weight_map": written}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        for source in self._model.iterdir():
            if source.suffix in (".json", ".txt", ".model", ".jinja") and not source.name.endswith(".index.json"):
                shutil.copy2(source, partial / source.name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        previous, self._current = self._current, (version, folder)
        arrived = await asyncio.to_thread(read_back, folder, written)
        outcome = Outcome(arrived, sent_bytes=size)
        results = await asyncio.gather(*(self._load(engine) for engine in engines), return_exceptions=True)
        for engine, digest, result in zip(engines, digests, results, strict=True):
            if isinstance(result, Exception):
                outcome.failures[engine] = result
            elif digest is not None:
                await engine.verify(digest)
        if previous is not None and previous[1] != folder:
            shutil.rmtree(previous[1], ignore_errors=True)
        return outcome

    async def resend(self, engine: Receiver) -> bool:
        if self._current is None:
            return False
        await self._load(engine)
        return True

    async def close(self) -> None:
        if self._current is not None:
            await asyncio.to_thread(shutil.rmtree, self._current[1], True)

    async def _load(self, engine: Receiver) -> None:
        assert self._current is not None
        version, folder = self._current
        async with engine.pause():
            await engine.load_folder(version, folder)


def read_back(folder: Path, files: dict[str, str]) -> dict[str, int]:
    """Checksums of the tensors in `files` (name → file) as read from `folder`, by name. Raises RunError."""
    found: dict[str, int] = {}
    for file in sorted(set(files.values())):
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    found[name] = checksum(handle.get_tensor(name))
        except Exception as e:  # safetensors' own error type is not public
            raise RunError(f"weights written to {folder / file} cannot be read back: {e}") from None
    for name in files:
        if name not in found:
            raise RunError(f"weights written to {folder}: {name} is missing")
    return found
