"""The ledger: what became of every prompt drawn from the data, step by step. Append-only, checked line by line.

It is committed inside the checkpoint's folder, so it says exactly what the weights beside it have seen. Each step is
one JSON line with columns over the step's prompts, and a checksum over that line and all before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megarl.errors import RunError

FILE = "ledger.jsonl"


class Fate(StrEnum):
    """What became of a prompt that was drawn from the data."""

    PRUNED = "p"  # not rolled out, because of its history
    REPLACED = "r"  # rolled out, but its group was replaced (dynamic sampling)
    DROPPED = "d"  # rolled out, and every completion dropped before training
    TRAINED = "t"  # rolled out, and at least one completion trained on


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt of a step."""

    index: int  # position in the data
    epoch: int
    fate: Fate
    completions: int = 0  # rolled out
    trained: int = 0  # of these, not dropped


@dataclass(frozen=True, slots=True)
class Step:
    """One training step. `version`: of the weights that rolled out."""

    step: int
    version: int
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Audit:
    """A ledger compared with the loader's order. Exactly-once data has nothing lost, repeated or missing."""

    num_drawn: int
    lost: int  # drawn by the loader, not in the ledger
    repeated: int  # in the ledger more often than drawn
    missing_steps: int

    @property
    def clean(self) -> bool:
        return not (self.lost or self.repeated or self.missing_steps)


class Ledger:
    """An append-only record of steps."""

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._digest = b""

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Step]:
        return map(_decode, self._lines)

    def record_step(self, step: int, version: int, entries: Iterable[Entry]) -> None:
        """Append one step. Steps come in order."""
        self._append(_encode(Step(step, version, list(entries))))

    def commit(self, folder: Path) -> None:
        """Write the whole ledger into a checkpoint's folder. The caller's rename makes it visible."""
        with (folder / FILE).open("wb") as file:
            digest = b""
            for line in self._lines:
                digest = _chain(digest, line)
                file.write(line + b"\t" + digest + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Ledger:
        """Read a committed ledger. Lines that a crash cut off at its end are skipped.

        Any other damage, and a missing file, raises RunError.
        """
        path, ledger = folder / FILE, cls()
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as e:
            raise RunError(f"{path}: cannot be read: {e.strerror}") from None
        for number, line in enumerate(lines, start=1):
            text, _, digest = line.rpartition(b"\t")
            if digest != _chain(ledger._digest, text):
                if any(map(_is_whole, lines[number - 1 :])):
                    raise RunError(f"{path}:{number}: damaged: the checksum is wrong")
                break
            ledger._append(text)
        return ledger

    def audit(self, order: Callable[[int], np.ndarray], position: int) -> Audit:
        """Compare with the first `position` prompts of `order(0)`, `order(1)`, …: `Loader.order`, `Loader.position`."""
        recorded: dict[int, list[int]] = {}
        missing_steps, last = 0, 0
        for step in self:
            missing_steps += abs(step.step - last - 1)
            last = step.step
            for entry in step.entries:
                recorded.setdefault(entry.epoch, []).append(entry.index)
        lost = repeated = 0
        prompts = len(order(0))
        for epoch in sorted({*recorded, *range(-(-position // prompts))}):
            surplus = np.bincount(np.array(recorded.get(epoch, []), dtype=np.int64), minlength=prompts)
            surplus[order(epoch)[: max(position - epoch * prompts, 0)]] -= 1
            lost -= int(surplus[surplus < 0].sum())
            repeated += int(surplus[surplus > 0].sum())
        return Audit(position, lost, repeated, missing_steps)

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._digest = _chain(self._digest, line)


def _encode(step: Step) -> bytes:
    rolled_out = [entry for entry in step.entries if entry.fate is not Fate.PRUNED]
    columns: dict[str, Any] = {
        "step": step.step,
        "version": step.version,
        "epochs": [[epoch, len(list(run))] for epoch, run in groupby(entry.epoch for entry in step.entries)],
        "prompts": [entry.index for entry in step.entries],
        "fates": "".join(entry.fate for entry in step.entries),
        "completions": [entry.completions for entry in rolled_out],
        "trained": [entry.trained for entry in rolled_out],
    }
    return json.dumps(columns, separators=(",", ":")).encode()


def _decode(line: bytes) -> Step:
    columns = json.loads(line)
    epochs = [epoch for epoch, count in columns["epochs"] for _ in range(count)]
    counts = iter(zip(columns["completions"], columns["trained"], strict=True))
    entries = [
        Entry(index, epoch, Fate(fate), *((0, 0) if fate == Fate.PRUNED else next(counts)))
        for index, epoch, fate in zip(columns["prompts"], epochs, columns["fates"], strict=True)
    ]
    return Step(columns["step"], columns["version"], entries)


def _chain(digest: bytes, line: bytes) -> bytes:
    """The checksum of a line and all before it."""
    return hashlib.blake2b(digest + line, digest_size=8).hexdigest().encode()


def _is_whole(line: bytes) -> bool:
    """Whether a line has all its parts, though the chain of checksums up to it is broken."""
    text, _, digest = line.rpartition(b"\t")
    try:
        json.loads(text)
    except ValueError:
        return False
    return len(digest) == 16
