"""Prompts in columns: ten million problems cost their bytes, not one object each."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megarl.types import Prompt


@dataclass(slots=True)
class _Ragged:
    """Items of different lengths, one after another in one flat array."""

    flat: array | bytearray
    ends: array = field(default_factory=lambda: array("q"))

    def append(self, item: Sequence[int]) -> None:
        self.flat.extend(item)
        self.ends.append(len(self.flat))

    def __getitem__(self, i: int) -> array | bytearray:
        return self.flat[self.ends[i - 1] if i else 0 : self.ends[i]]


class PromptTable(Sequence[Prompt]):
    """An append-only sequence of prompts; `table[i]` builds the `Prompt` on access."""

    def __init__(self, identity: str = "") -> None:
        """`identity`: what the prompts' texts depend on besides files and model (`Renderer.identity`)."""
        self._identity = identity.encode()
        self._uids = bytearray()  # 16 bytes each
        self._tokens = _Ragged(array("i"))
        self._texts = _Ragged(bytearray())
        self._answers = _Ragged(bytearray())
        self._files: list[str] = []
        self._file = array("H")
        self._row = array("q")

    def append(self, uid: bytes, token_ids: Sequence[int], text: str, answer: str, file: str, row: int) -> None:
        """Add one prompt. `file` ends in the mark that joins it to `row` in messages: `a.jsonl:` or `a.parquet#`."""
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        self._uids += uid
        self._tokens.append(token_ids)
        self._texts.append(text.encode())
        self._answers.append(answer.encode())
        self._file.append(len(self._files) - 1)
        self._row.append(row)

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, i: int) -> Prompt:  # type: ignore[override]  # no slices
        i = range(len(self))[i]
        return Prompt(
            uid=self.uid(i),
            token_ids=tuple(self._tokens[i]),
            text=bytes(self._texts[i]).decode(),
            answer=bytes(self._answers[i]).decode(),
            source=f"{self._files[self._file[i]]}{self._row[i]}",
        )

    def uid(self, i: int) -> str:
        """The uid of prompt `i`, 32 hexadecimal digits."""
        return self._uids[16 * i : 16 * i + 16].hex()

    @property
    def fingerprint(self) -> str:
        """Identifies the prompts, their order and how they are rendered. A resumed run must find the same."""
        return hashlib.blake2b(self._uids + self._identity, digest_size=16).hexdigest()

    def shared_with(self, other: PromptTable) -> int:
        """How many of the prompts are in `other` too, compared by their texts without regard to spaces and case."""
        mine = Counter(self._digest(i) for i in range(len(self)))
        theirs = {digest for i in range(len(other)) if (digest := other._digest(i)) in mine}
        return sum(mine[digest] for digest in theirs)

    def _digest(self, i: int) -> bytes:
        text = b"".join(bytes(self._texts[i]).lower().split())
        return hashlib.blake2b(text, digest_size=16).digest()
