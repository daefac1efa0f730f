"""This rank's rollout engine, if it drives one, and keeping its weights the learner's."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megarl.config import Settings
from megarl.event_loop import EventLoop
from megarl.exchange import broadcast
from megarl.learner.learner import Learner
from megarl.learner.parallel import World
from megarl.rollout import early_exit, fleet, weight_sync
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.engine import Engine
from megarl.rollout.local import LocalEngine
from megarl.trajectory import Batch, Sample, derive_seed
from megarl.watchdog import waiting

CANARY_TOKENS = 32
COARSE = 3.0
"""Times `rollout.canary_limit` in bf16, for random tokens make large logits. Of 600 canaries of the quick start's model
18 were above 0.1 and none above 0.23; rows of a weight matrix in another order put them above 0.5."""


class Engines:
    """The first `drivers` ranks drive an engine and share the prompts; `engine` is None on the others.

    Embedded: every rank has one. Servers: the controller drives the pool of all of them.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        loop: EventLoop,
        tokenizer: PreTrainedTokenizerBase,
        learner: Learner,
    ) -> None:
        self.settings, self.world, self.loop, self.learner = settings, world, loop, learner
        self.canary_difference = 0.0
        generator = np.random.default_rng(derive_seed(settings.seed, "canary"))
        self._canary = generator.integers(0, learner.shape.vocab, CANARY_TOKENS).astype(np.int32)
        early_exit.check(settings.rollout, tokenizer)
        self.drivers = world.world_size if settings.rollout.embedded else 1
        self.engine: Engine | None = None
        if settings.rollout.embedded:
            self.engine = LocalEngine(
                settings.model.path,
                tokenizer,
                device=world.device,
                dtype=torch.float32 if settings.precision.dtype == "fp32" else torch.bfloat16,
                batch_slots=settings.rollout.local_batch,
                max_length=early_exit.longest_sequence(settings),
            )
        elif world.is_controller:
            pool = fleet.build(settings, Vocabulary(tokenizer))
            self.engine = pool
            try:
                loop.run(pool.start())
            except BaseException:
                self.close()
                raise

    def push(self, version: int) -> None:
        """Give every engine the learner's weights, checked tensor by tensor and by the canary. Collective."""
        expected = self._canary_logprobs()
        tensors = self.learner.named_tensors()
        if self.engine is None:
            for _ in tensors:  # the ranks gather them together
                pass
            return
        canary = weight_sync.Canary(self._canary.tolist(), expected.tolist())
        bound = self.settings.rollout.canary_limit * (1.0 if self.settings.precision.dtype == "fp32" else COARSE)
        with waiting(f"the engines to take the weights of version {version}", self.world.deadline_s):
            self.canary_difference = self.loop.run(weight_sync.sync(self.engine, version, tensors, canary, bound))

    def close(self) -> None:
        """Free the engines; servers that were started for this run end."""
        if self.engine is not None:
            self.loop.run(self.engine.close())

    def _canary_logprobs(self) -> np.ndarray:
        """The learner's log-probs of the canary at temperature 1, in the engines' arithmetic, on every rank.

        Engines do not quantise: what FP8 changes is the step's mismatch, and would hide here a tensor that is wrong.
        """
        batch = None
        if self.world.is_controller:
            rows: list[list[list[int]]] = [[[0]], *([[]] for _ in range(self.world.dp_size - 1))]
            batch = Batch([Sample(self._canary, response_start=1, scale=1.0)], rows, 1.0, float(CANARY_TOKENS))
        scores = self.learner.logprobs(batch, "policy", temperature=1.0, quantised=False)
        return broadcast(scores.get(0), self.world)
