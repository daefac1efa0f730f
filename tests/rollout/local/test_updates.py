"""Weight updates of the embedded engine: between the tokens of running requests, reported, and refused when bad."""

import asyncio

import pytest
import torch

from megarl.errors import RunError
from megarl.rollout.engine import Sampling
from megarl.rollout.weights.verify import checksum
from megarl.types import Span
from tests.support.local_engine import close, prompt, steps
from tests.support.tiny_rollout import teacher_forced


def test_weights_change_under_a_running_generation(make_engine, qwen3):
    """Two spans; each token's log-prob is that of the weights its span names, given the whole prefix: nothing of the
    old weights' cache is left, in running slots or in idle ones. A probe's branch in flight survives too."""
    changed = {name: tensor * 1.1 for name, tensor in qwen3.state_dict().items()}

    async def run():
        engine = await make_engine()
        idle = await engine.generate(prompt(4, 12), Sampling(5, seed=1), "idle")
        first = await engine.generate(prompt(5, 6), Sampling(10, seed=2), "c|0")
        reached = steps(engine, 12)
        long = asyncio.ensure_future(engine.generate(prompt(0, 9), Sampling(40, seed=3), "long"))
        probe = [*prompt(5, 6), *first.token_ids[:7], 11, 12, 13, 14]
        branch = asyncio.ensure_future(engine.generate(probe, Sampling(30, seed=4, offset=7, scratch=True), "c|p"))
        await reached.wait()
        await engine.update_weights(2, changed.items())
        made, trial, after = await asyncio.gather(
            long, branch, engine.generate(prompt(4, 12) + idle.token_ids, Sampling(6, seed=1, offset=5), "after")
        )
        return made, trial, after, probe, idle

    made, trial, after, probe, idle = asyncio.run(run())
    old = [teacher_forced(qwen3, ids, g.token_ids) for ids, g in ((prompt(0, 9), made), (probe, trial))]
    kept = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    qwen3.load_state_dict(changed)
    try:
        new = [teacher_forced(qwen3, ids, g.token_ids) for ids, g in ((prompt(0, 9), made), (probe, trial))]
        close(after.logprobs, teacher_forced(qwen3, prompt(4, 12) + idle.token_ids, after.token_ids))
    finally:
        qwen3.load_state_dict(kept)
    for generation, before, behind in zip((made, trial), old, new, strict=True):
        (one, two) = generation.spans
        assert (one.version, one.start, two.version, two.end) == (1, 0, 2, len(generation.token_ids))
        assert 0 < one.end == two.start
        close(generation.logprobs, torch.cat([before[: one.end], behind[one.end :]]))
    assert after.spans == [Span(2, 0, 6)]


def test_update_reports_what_it_holds(make_engine, qwen3):
    """Checksums of the tensors as stored, fused ones included."""

    async def run():
        engine = await make_engine()
        sums = await engine.update_weights(2, qwen3.state_dict().items())
        assert sums == {n: checksum(t) for n, t in qwen3.state_dict().items() if n != "lm_head.weight"}

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "did not arrive.*layers.1.mlp.up_proj"),
        (lambda s: s.update({"model.layers.1.mlp.upproj.weight": torch.zeros(1)}), "no tensor.*mean '.*up_proj"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\), not \(32,\)"),
    ],
)
def test_a_bad_update_is_named_and_stops_the_engine(make_engine, qwen3, change, message):
    """Missing, unknown, mis-shaped: named; the half-updated engine refuses to serve until a whole update arrives."""
    state = dict(qwen3.state_dict())
    state.pop("lm_head.weight")
    change(state)

    async def run():
        engine = await make_engine()
        with pytest.raises(RunError, match=message):
            await engine.update_weights(2, state.items())
        with pytest.raises(RunError, match="part of the weights"):
            await engine.health()
        await engine.update_weights(3, qwen3.state_dict().items())
        await engine.health()

    asyncio.run(run())


def test_an_idle_slots_prefix_is_computed_anew_after_an_update(make_engine, qwen3):
    """A finished sequence lies in its slot when the weights change. Continued there, it has nothing of the old ones."""
    changed = {name: tensor * 1.1 for name, tensor in qwen3.state_dict().items()}

    async def run():
        engine = await make_engine()
        before = await engine.generate(prompt(4, 12), Sampling(5, seed=1), "c|0")
        await engine.update_weights(2, changed.items())
        ids = prompt(4, 12) + before.token_ids
        return ids, await engine.generate(ids, Sampling(6, seed=1, offset=5), "c|1")

    ids, after = asyncio.run(run())
    kept = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}
    qwen3.load_state_dict(changed)
    try:
        close(after.logprobs, teacher_forced(qwen3, ids, after.token_ids))
    finally:
        qwen3.load_state_dict(kept)
