"""Where a generation stops: token ids, token sequences, stand-alone words and texts, found token by token.

Matching works on bytes: tokens may cut a character or a word in two. ASCII letters never occur inside a multi-byte
UTF-8 character, so the stand-alone rule needs no decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Sampling

_LETTERS = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, slots=True)
class Match:
    """A stop that was found, and the index of the token in which it begins."""

    what: int | tuple[int, ...] | str
    start: int


class Stops:
    """The stops of one kind of request.

    Call `check` for every token with `stop_candidates[token]`, and for the one after a check that left a word pending.
    Other tokens cannot complete a stop, so the decoding loop has no work per token and row.
    """

    def __init__(self, sampling: Sampling, vocabulary: Vocabulary, vocabulary_size: int) -> None:
        self._vocabulary = vocabulary
        self._ids = frozenset(sampling.stop_token_ids)
        self._sequences = sampling.stop_sequences
        words = {word.encode(): word for word in sampling.stop_words}
        texts = {text.encode(): text for text in sampling.stop_texts}
        self._strings = [(b, s, True) for b, s in words.items()] + [(b, s, False) for b, s in texts.items()]
        self._reach = max((len(b) for b, _, _ in self._strings), default=0) + 1
        self.stop_candidates = np.zeros(vocabulary_size, dtype=bool)  # by id: whether it may complete a stop
        self.stop_candidates[list(self._ids)] = True
        self.stop_candidates[[sequence[-1] for sequence in self._sequences]] = True
        if self._strings:
            whole = [b for b, _, _ in self._strings]
            tails = {b[-k:] for b in whole for k in range(1, len(b))}
            for i, piece in enumerate(vocabulary.pieces[:vocabulary_size]):
                if any(piece[:k] in tails for k in range(1, len(piece) + 1)) or any(b in piece for b in whole):
                    self.stop_candidates[i] = True

    @staticmethod
    def key(sampling: Sampling) -> tuple:
        """Requests with equal keys share one `Stops`."""
        return (sampling.stop_token_ids, sampling.stop_sequences, sampling.stop_words, sampling.stop_texts)

    def check(self, tokens: Sequence[int] | np.ndarray, first: int, end: int) -> tuple[Match | None, bool]:
        """The stop that the newest token, `tokens[end - 1]`, completes, and whether a word awaits the next character.

        `tokens[first:end]` is the response so far.
        """
        newest = int(tokens[end - 1])
        if newest in self._ids:
            return Match(newest, end - 1), False
        for sequence in self._sequences:
            n = len(sequence)
            if end - n >= first and tuple(tokens[end - n : end]) == sequence:
                return Match(sequence, end - n), False
        return self._check_text(tokens, first, end) if self._strings else (None, False)

    def awaits(self, tokens: Sequence[int] | np.ndarray, first: int, end: int) -> bool:
        """Whether the response `tokens[first:end]` ends with a word whose next character will decide."""
        return bool(self._strings) and self._unconfirmed(self._tail(tokens, first, end)[0])

    def _unconfirmed(self, tail: bytes) -> bool:
        return any(
            alone and tail.endswith(word) and not (len(tail) > len(word) and tail[-len(word) - 1] in _LETTERS)
            for word, _, alone in self._strings
        )

    def _tail(self, tokens: Sequence[int] | np.ndarray, first: int, end: int) -> tuple[bytes, list[tuple[int, int]]]:
        """The last bytes of the response, enough to find a stop, and their tokens from the last to the first: (bytes
        from the token's beginning to the end of the text, index of the token)."""
        at = end - 1
        tail = self._vocabulary.bytes_of(tokens[at:end])
        needed = len(tail) + self._reach
        begins = [(len(tail), at)]
        while at > first and len(tail) < needed:
            at -= 1
            tail = self._vocabulary.bytes_of(tokens[at : at + 1]) + tail
            begins.append((len(tail), at))
        return tail, begins

    def _check_text(self, tokens: Sequence[int] | np.ndarray, first: int, end: int) -> tuple[Match | None, bool]:
        tail, begins = self._tail(tokens, first, end)
        old = len(tail) - begins[0][0]  # where the newest token's bytes begin
        found: tuple[int, str] | None = None
        for string, name, alone in self._strings:
            # An occurrence counts once: when its last byte (for a word, the byte after it) came with the newest token.
            position = tail.find(string, max(0, old - len(string)))
            while position >= 0 and (found is None or position < found[0]):
                after = position + len(string)
                if alone:
                    bounded = not (position > 0 and tail[position - 1] in _LETTERS)
                    hit = bounded and old <= after < len(tail) and tail[after] not in _LETTERS
                else:
                    hit = after > old
                if hit:
                    found = (position, name)
                position = tail.find(string, position + 1)
        if found is None:
            return None, self._unconfirmed(tail)
        return Match(found[1], next(token for size, token in begins if size >= len(tail) - found[0])), False
