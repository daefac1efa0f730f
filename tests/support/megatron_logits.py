"""The logits of a model under Megatron, for comparison with transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megarl.config import Parallel, Precision
from megarl.learner.model import PolicyModel, ScoringLayer, build, transformer_config
from megarl.learner.parallel import start
from megarl.learner.rows import Alignment, Row, build_row
from megarl.learner.weights import Weights
from megarl.models.config_json import read_shape
from megarl.models.rope import rotary
from megarl.types import Sample

PRECISION = Precision(dtype="fp32")


class LogitsLayer(ScoringLayer):
    """The learner's output layer, returning logits, float32 [n, vocab], instead of log-probs."""

    def forward(
        self, hidden: Tensor, scored: Tensor, targets: Tensor, temperature: float, vocab: int, weight: Tensor | None
    ) -> Tensor:
        weight = self.weight if weight is None else weight
        shard = hidden.squeeze(1).index_select(0, scored) @ weight.T
        return gather_from_tensor_model_parallel_region(shard, group=self.tp_group)[:, :vocab]


def logits(cases: dict[str, tuple[Path, Parallel]], ids: list[int]) -> dict[str, Tensor]:
    """Run by every rank: for each case the logits after ids[0], ids[1] … ids[-2], from rank 0 of the last stage.

    A case is a folder and a layout. A Megatron checkpoint is read by Megatron's own loader, a Hugging Face folder by
    the trainer's.
    """
    found = {}
    for name, (folder, parallel) in cases.items():
        world = start(parallel, PRECISION, seed=0, deadline_s=120)
        shape = read_shape(folder)
        [chunk] = build(shape, transformer_config(shape, parallel, PRECISION), PRECISION)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)  # a load that does nothing must not pass
        if (folder / "release").is_dir():
            state = dist_checkpointing.load({"model": chunk.sharded_state_dict()}, str(folder / "release"))
            chunk.load_state_dict(state["model"], strict=True)
        else:
            Weights(shape, [chunk], world).read(folder)
        if chunk.post_process:
            chunk.output_layer.__class__ = LogitsLayer
        # A prompt of one token: every position after it is scored.
        sample = Sample(np.array(ids, dtype=np.int32), 1, 1.0)
        alignment = Alignment.of(parallel, PRECISION, len(ids))
        length = alignment.row_length([sample])
        row = build_row([0], [sample], length, alignment, rotary(shape).frequencies, device=world.device)
        output = _forward(chunk, row, length)
        if world.last_stage and world.tp_rank == 0:
            found[name] = output
        world.release()
    return found


@torch.no_grad()
def _forward(chunk: PolicyModel, row: Row, length: int) -> Tensor | None:
    """One row through all pipeline stages; None on all but the last."""

    def step(rows: Iterator[Row], model: PolicyModel) -> tuple[Tensor, partial]:
        row = next(rows)
        micro, targets = row.micro, row.micro.labels[row.scored]
        output = model(micro.tokens, micro.positions, row.packed, targets, row.scored, temperature=1.0)
        return output, partial(lambda output, non_loss_data: output)

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([row]),
        model=chunk,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs[0] if outputs else None
