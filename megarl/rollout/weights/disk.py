"""Weights through a folder that the trainer and the engines can read: for any engine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megarl.errors import RunError
from megarl.rollout.weights.transport import BUCKET, Digests, Named, NotAsSent, Outcome, Receiver, buckets, verify
from megarl.rollout.weights.verify import checksum


class DiskTransport:
    """Writes `folder/weights-VERSION` in Hugging Face's layout, one file per bucket, and has the engines load it.

    Reads the folder back if an engine does not report what it read there.
    Keeps the newest complete folder for restarted engines, and removes the one before it.
    """

    def __init__(self, folder: Path, model: Path, dtype: torch.dtype, *, bucket: int = BUCKET) -> None:
        """`model`: the folder whose config and tokenizer files are copied beside the weights."""
        self._folder = folder.resolve()
        self._model = model
        self._dtype = dtype
        self._bucket = bucket
        self._current: tuple[int, Path] | None = None
        self._files: dict[str, str] = {}  # tensor → its file in the current folder
        self._sums: Mapping[str, int] = {}  # checksums of its tensors, as they were sent

    async def send(self, version: int, tensors: Iterable[Named], engines: Sequence[Receiver]) -> Outcome:
        digests = [engine.digests() for engine in engines]
        told = list(filter(None, digests))  # of the engines that report what they read
        folder = self._folder / f"weights-{version}"
        partial = self._folder / f"weights-{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written: dict[str, str] = {}
        sums: dict[str, int] = {}
        size = 0
        for number, bucket in enumerate(buckets(tensors, self._dtype, self._bucket)):
            file = f"model-{number:05d}.safetensors"
            for name, tensor in bucket:
                written[name] = file
                size += tensor.nbytes
                sums[name] = checksum(tensor)
                for sent in told:
                    sent.add(name, tensor, sums[name])
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
        self._files, self._sums = written, sums
        outcome = Outcome(sent_bytes=size)
        if not told or len(told) < len(digests):
            outcome.arrived = await asyncio.to_thread(read_back, folder, written)
        results = await asyncio.gather(*(self._load(engine) for engine in engines), return_exceptions=True)
        for engine, result in zip(engines, results, strict=True):
            if isinstance(result, Exception):
                outcome.failures[engine] = result
        pairs = zip(engines, digests, strict=True)
        await verify({engine: digest for engine, digest in pairs if digest is not None}, outcome)
        if previous is not None and previous[1] != folder:
            shutil.rmtree(previous[1], ignore_errors=True)
        return outcome

    async def resend(self, engine: Receiver) -> bool:
        if self._current is None:
            return False
        version, folder = self._current
        digest = engine.digests()
        await asyncio.to_thread(self._check_folder, version, folder, digest)
        await self._load(engine)
        if digest is not None:
            await engine.verify(digest)
        return True

    def _check_folder(self, version: int, folder: Path, digest: Digests | None) -> None:
        """Raises NotAsSent if the folder is not as it was sent. Adds its tensors to `digest`."""
        try:
            for name, tensor in read(folder, self._files):
                if checksum(tensor) != self._sums[name]:
                    raise NotAsSent(f"weights {version}: {folder} does not have what was sent: {name}")
                if digest is not None:
                    digest.add(name, tensor)
        except NotAsSent:
            raise
        except RunError as e:
            raise NotAsSent(f"weights {version}: {e}") from None

    async def close(self) -> None:
        if self._current is not None:
            await asyncio.to_thread(shutil.rmtree, self._current[1], True)

    async def _load(self, engine: Receiver) -> None:
        assert self._current is not None
        version, folder = self._current
        async with engine.pause():
            await engine.load_folder(version, folder)


def read_back(folder: Path, files: Mapping[str, str]) -> dict[str, int]:
    """Checksums of the tensors in `files` (name → file) as read from `folder`, by name. Raises RunError."""
    return {name: checksum(tensor) for name, tensor in read(folder, files)}


def read(folder: Path, files: Mapping[str, str]) -> Iterator[Named]:
    """The tensors in `files` (name → file) as they are in `folder`. Raises RunError naming what cannot be read."""
    for file in sorted(set(files.values())):
        try:
            with safe_open(folder / file, framework="pt") as handle:
                present = set(handle.keys())
                for name in (name for name in files if files[name] == file):
                    if name not in present:
                        raise RunError(f"{name} is missing")
                    yield name, handle.get_tensor(name)
        except GeneratorExit:
            raise
        except Exception as e:  # safetensors' own error type is not public
            raise RunError(f"weights written to {folder / file} cannot be read back: {e}") from None
