"""Random samples, and a process group of one rank, for the tests of this folder."""

from __future__ import annotations

import numpy as np

from megarl.types import Sample


class Alone:
    """A process group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def random_samples(seed: int, count: int, vocab: int = 50) -> list[Sample]:
    """`count` samples of random lengths, each optional array there or not."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        prompt, n = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        logprobs = [rng.normal(size=n).astype(np.float32) if rng.random() < 0.6 else None for _ in range(3)]
        if logprobs[0] is not None:
            logprobs[0][rng.random(n) < 0.3] = np.nan
        samples.append(
            Sample(
                rng.integers(0, vocab, prompt + n).astype(np.int32),
                prompt,
                float(rng.uniform(0.1, 1.0)),
                float(rng.normal()),
                rng.random(n) < 0.7 if rng.random() < 0.5 else None,
                *logprobs,
                experts=rng.integers(-1, 300, (prompt + n - 1, 3, 2)).astype(np.int16) if rng.random() < 0.5 else None,
            )
        )
    return samples
