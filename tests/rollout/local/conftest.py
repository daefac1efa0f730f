"""Fixtures of the embedded engine's tests."""

import pytest

from megarl.rollout.local.decoder import Decoder, Piece


@pytest.fixture
def prefilled(monkeypatch) -> list[int]:
    """Grows by the number of tokens of every piece that is fed before a slot's newest token."""
    counts: list[int] = []

    def counting(feed):
        def fed(self, *given):
            counts.extend(int(piece.counts.sum()) for piece in given if isinstance(piece, Piece))
            return feed(self, *given)

        return fed

    for name in ("extend", "decode"):
        monkeypatch.setattr(Decoder, name, counting(getattr(Decoder, name)))
    return counts
