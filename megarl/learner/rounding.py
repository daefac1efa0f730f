"""Moves a model's input by one rounding error, which shows how far rounding alone moves the model's log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor

from megarl.learner.model import unwrap


@contextmanager
def nudged(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """A context in which every forward pass starts from embeddings that are moved by up to half their last digit.

    One such move makes all later roundings fall differently, as they do in another program. Each pass is moved in its
    own way, the same on all tensor-parallel ranks, and the same in every context. Forward passes only.
    """
    passes = count()

    def nudge(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        draws = torch.rand(output.shape, generator=torch.Generator().manual_seed(next(passes))).to(output.device)
        return (output.double() * (1 + torch.finfo(output.dtype).eps * (draws.double() - 0.5))).to(output.dtype)

    with ExitStack() as stack:
        for chunk in chunks:
            embedding = getattr(unwrap(chunk), "embedding", None)  # the first pipeline stage has it
            if embedding is not None:
                stack.callback(embedding.register_forward_hook(nudge).remove)
        yield
