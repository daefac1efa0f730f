"""The model runner: every forward pass of the engine, on one decoder and its KV cache."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from megarl.errors import RunError, nearest
from megarl.rollout.local.decoder import Decoder, Piece
from megarl.rollout.local.slots import SlotTable
from megarl.rollout.weights.verify import checksum

_PREFILL_TOKENS = 4096  # tokens of one prefill pass, padding included
_PREFILL_SCORES = 2**25  # attention scores (one layer, all heads) of one prefill pass
_PIGGYBACK = 8  # a sequence that lacks no more tokens than this needs no prefill: they join the next decode pass


class ModelRunner:
    """Feeds the slot table's tokens to the decoder: prefill of many tokens, decode of one token a sequence."""

    def __init__(self, decoder: Decoder, slots: SlotTable) -> None:
        """`decoder` has one slot more than the table, for `score`."""
        self._decoder, self._slots = decoder, slots

    @property
    def keeps_experts(self) -> bool:
        return self._decoder.cache.experts.shape[-1] > 0

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, int]:
        """Replace all weights in place; their checksums by name. RunError if one is missing, unknown or mis-shaped."""
        weights = self._decoder.weights()
        sums: dict[str, int] = {}
        with torch.no_grad():
            for name, tensor in tensors:
                if (target := _target(weights, name, tuple(tensor.shape))) is not None:
                    target.copy_(tensor)
                    sums[name] = checksum(target)
            _check_complete(weights, sums)
            self._decoder.refresh()
        return sums

    def checksums(self) -> Mapping[str, int]:
        """Of all weights as they are now, by name."""
        return {name: checksum(tensor) for name, tensor in self._decoder.weights().items()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """RunError if `load` would refuse tensors of these names and shapes. Changes nothing."""
        weights = self._decoder.weights()
        for name, shape in shapes.items():
            _target(weights, name, shape)
        _check_complete(weights, shapes)

    def copy(self, source: int, target: int, end: int) -> None:
        """Copy columns [0, end) of one slot's cache to another slot."""
        self._decoder.cache.copy(source, target, end)

    def prefill(self, slots: Sequence[int], piggyback: bool = True) -> None:
        """Feed all but the newest token of these slots' sequences. `piggyback`: leave short rests to `decode`."""
        table, rows = self._slots, np.array(slots, np.int64)
        late = rows[table.end[rows] - 1 - table.fed[rows] > (_PIGGYBACK if piggyback else 0)]
        for _ in self._feed(late, [table.unfed(s) for s in late], table.fed[late], table.gaps(late)):
            pass
        table.fed[late] = table.end[late] - 1

    def decode(self) -> torch.Tensor:
        """Feed every active slot its newest token, and those before it that it lacks; the logits of the next, float32
        [width of the slot table, V]."""
        slots = self._slots
        n = slots.width
        active, end = slots.active[:n], slots.end[:n]
        columns = np.where(active, end - 1, self._decoder.cache.spare)
        newest = slots.tokens[np.arange(n), np.minimum(columns, slots.columns - 1)].astype(np.int64)
        gaps = slots.gaps(slice(n))
        late = np.flatnonzero(active & (slots.fed[:n] < end - 1))
        unfed = [slots.unfed(s) for s in late]
        piece = self._piece(late, unfed, slots.fed[late], slots.gaps(late)) if unfed else None
        up, width = self._upload, int(end[active].max())
        return self._decoder.decode(up(newest), up(columns), width, None if gaps is None else up(gaps), piece)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs at temperature 1 of token_ids[1:]."""
        ids = torch.tensor(token_ids, device=self._decoder.device)[None]
        last, logprobs = np.array([self._slots.count]), list[float]()
        for start, hidden in self._feed(last, [np.asarray(token_ids[:-1])], np.zeros(1, np.int64), None):
            targets = ids[0, start + 1 : start + 1 + hidden.shape[1]]
            logits = self._decoder.logits(hidden[0, : len(targets)])
            logprobs += logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
        return logprobs

    def experts(self, slot: int) -> np.ndarray:
        """The experts that each fed token of the slot's sequence passed through, int16 [tokens, layers, top_k]."""
        slots = self._slots
        gap, fed = int(slots.gap[slot]), int(slots.fed[slot])
        fork = int(slots.trunk_end[slot]) - gap
        kept = self._decoder.cache.experts[slot]
        return (torch.cat([kept[:fork], kept[fork + gap : fed]]) if gap else kept[:fed]).cpu().numpy().copy()

    def _feed(
        self, slots: np.ndarray, pieces: Sequence[np.ndarray], starts: np.ndarray, gaps: np.ndarray | None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Feed each slot's piece of tokens from its start column on, many slots and tokens a pass. `gaps` are those of
        `SlotTable.gaps`.

        Yields (tokens of the pieces fed before this pass, hidden states [R, T, h]).
        """
        heads = self._decoder.shape.heads
        order = sorted((i for i, piece in enumerate(pieces) if len(piece)), key=lambda i: len(pieces[i]))
        while order:
            longest = len(pieces[order[-1]])
            rows = max(1, min(len(order), _PREFILL_TOKENS // longest))
            chosen, order = order[-rows:], order[:-rows]
            width = int(starts[chosen].max()) + longest
            most = max(1, min(_PREFILL_TOKENS // rows, _PREFILL_SCORES // (rows * heads * width)))
            for done in range(0, longest, most):
                parts = [pieces[i][done : done + most] for i in chosen]
                hidden = None if gaps is None else gaps[chosen]
                yield done, self._decoder.extend(self._piece(slots[chosen], parts, starts[chosen] + done, hidden))

    def _piece(
        self, slots: np.ndarray, parts: Sequence[np.ndarray], starts: np.ndarray, gaps: np.ndarray | None
    ) -> Piece:
        """For each slot the tokens to feed, and the column of the first."""
        counts = np.array([len(part) for part in parts])
        tokens = np.zeros((len(parts), counts.max()), np.int64)
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = part
        in_a_row = np.array_equal(slots, np.arange(slots[0], slots[0] + len(parts)))
        first, up = int(slots[0]) if in_a_row else None, self._upload
        return Piece(up(tokens), up(slots), up(starts), up(counts), None if gaps is None else up(gaps), first)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._decoder.device)


def _target(weights: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """The weight that a tensor replaces. None for a tied output layer, which is the embedding."""
    if name == "lm_head.weight" and name not in weights:
        return None
    if name not in weights:
        raise RunError(f"local engine: no tensor {name!r} in this model{nearest(name, weights)}")
    if shape != (wanted := tuple(weights[name].shape)):
        raise RunError(f"local engine: {name} has shape {shape}, not {wanted}")
    return weights[name]


def _check_complete(weights: Iterable[str], given: Container[str]) -> None:
    if missing := [name for name in weights if name not in given]:
        raise RunError(f"local engine: {len(missing)} tensors did not arrive, among them {missing[0]}")
