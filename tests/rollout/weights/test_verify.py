"""Weight sync: what a checksum sees, and that a sync that went wrong says which tensor, or that none did."""

import asyncio
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.errors import RunError
from megarl.models.config_json import read_shape
from megarl.rollout.local.decoder import Decoder
from megarl.rollout.local.runner import ModelRunner
from megarl.rollout.local.slots import SlotTable
from megarl.rollout.weights.verify import LIKELY, Canary, check, checksum, send
from tests.support.tiny_rollout import teacher_forced

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "reasoner"
IDS = [3, 9, 4, 60, 22, 7, 7, 31]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_checksum_sees_any_change_and_any_exchange(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
    size = data.draw(st.integers(2, 40))
    tensor = (torch.randn(size) * 50).to(dtype)
    i, j = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    changed, swapped = tensor.clone(), tensor.clone()
    changed[i] = changed[i] + 1 if dtype == torch.int8 else changed[i] * 2 + 1
    swapped[i], swapped[j] = tensor[j], tensor[i]
    assert (checksum(changed) == checksum(tensor)) == torch.equal(changed, tensor)
    assert (checksum(swapped) == checksum(tensor)) == torch.equal(swapped, tensor)


def test_a_checksum_sees_an_exchange_whose_differences_cancel():
    """13.0 is 0x4150 and 51.75 is 0x424f: one byte goes up by 1, the other down. 39 values are summed byte by byte."""
    tensor = torch.zeros(39, dtype=torch.bfloat16)
    tensor[25], tensor[13] = 13.0, 51.75
    swapped = tensor.clone()
    swapped[25], swapped[13] = 51.75, 13.0
    assert checksum(swapped) != checksum(tensor)


def test_a_checksum_is_of_the_bytes_in_order():
    """Over the chunk size, and for a view that is not contiguous."""
    tensor = torch.randn(3, 700_001)
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)
    other = tensor.clone()
    other[2, -1] += 1
    assert checksum(other) != checksum(tensor)


async def sync(engine, version, tensors, canary, bound) -> float:
    """As the run does after every step."""
    await send(engine, version, tensors)
    return await check(engine, version, canary, bound)


async def check_scores(scores, expected, **limits) -> float:
    """`check` of an engine that gives these log-probs, without weights."""

    class Scorer:
        async def score(self, token_ids):
            return scores

    return await check(Scorer(), 2, expected, **limits)


def canary(model) -> Canary:
    return Canary(IDS, teacher_forced(model, IDS[:1], IDS[1:]).tolist())


def test_sync_moves_the_weights(make_engine, qwen3):
    """A learner with other weights: after the sync the engine scores as it does, to 1e-4; the version is new."""
    torch.manual_seed(3)
    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in qwen3.state_dict().items()}
    state.pop("lm_head.weight")
    kept = {name: tensor.clone() for name, tensor in qwen3.state_dict().items()}

    async def run():
        engine = await make_engine()
        worst = await sync(engine, 7, state.items(), expected, bound=1e-3)
        assert engine.version == 7 and worst < 1e-4

    qwen3.load_state_dict(state, strict=False)
    try:
        expected = canary(qwen3)
        asyncio.run(run())
    finally:
        qwen3.load_state_dict(kept)


def test_weights_must_have_the_engines_precision(make_engine, qwen3):
    """bfloat16 weights sync with a bfloat16 engine, within the coarser bound of the canary. float32 weights do not."""

    async def run():
        engine = await make_engine(dtype=torch.bfloat16)
        rounded = [(name, tensor.bfloat16()) for name, tensor in qwen3.state_dict().items()]
        await sync(engine, 1, rounded, canary(qwen3), bound=0.5)
        with pytest.raises(RunError, match="is not at the engine as it was sent"):
            await sync(engine, 1, qwen3.state_dict().items(), canary(qwen3), bound=0.5)

    asyncio.run(run())


def test_a_tensor_damaged_on_the_way_is_named(make_engine, qwen3):
    async def run():
        engine = await make_engine()
        update = engine.update_weights

        async def damaging(version, tensors):
            def damaged():
                for name, tensor in tensors:
                    yield name, tensor * (1 + 1e-6) if name.endswith("0.mlp.down_proj.weight") else tensor

            return await update(version, damaged())

        engine.update_weights = damaging
        with pytest.raises(RunError, match="model.layers.0.mlp.down_proj.weight is not at the engine as it was sent"):
            await sync(engine, 2, qwen3.state_dict().items(), canary(qwen3), bound=1.0)

    asyncio.run(run())


@pytest.mark.parametrize("shift", [0.01, float("nan")])
def test_a_canary_that_differs_says_that_all_tensors_arrived(make_engine, qwen3, shift):
    async def run():
        engine = await make_engine()
        expected = canary(qwen3)
        logprobs = [x + (shift if i == 4 else 0) for i, x in enumerate(expected.logprobs)]
        with pytest.raises(RunError, match="the tensors arrived.*at token 5"):
            await sync(engine, 2, qwen3.state_dict().items(), Canary(IDS, logprobs), bound=1e-3)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("logprob", "difference", "stops"),
    [
        (-0.5 * LIKELY, 0.09, False),
        (-0.5 * LIKELY, 0.11, True),
        (-LIKELY, 0.11, True),
        (-4 * LIKELY, 0.39, False),
        (-4 * LIKELY, 0.41, True),
        (-4 * LIKELY, float("nan"), True),
        (-4 * LIKELY, float("-inf"), True),
        (float("-inf"), float("inf"), True),
        (float("-inf"), 0.0, True),
    ],
)
def test_the_bound_of_an_unlikely_token_grows_with_its_log_prob(make_engine, qwen3, logprob, difference, stops):
    """Bound 0.1: as it is for likely tokens, four times that at four times LIKELY. The other tokens are exact."""

    async def run():
        engine = await make_engine()
        expected = [-1.0] * (len(IDS) - 2) + [logprob]

        async def score(token_ids):
            return [*expected[:-1], -5.0 if difference == float("inf") else logprob + difference]

        engine.score = score
        if stops:
            with pytest.raises(RunError, match=f"at token {len(IDS) - 1}"):
                await sync(engine, 2, qwen3.state_dict().items(), Canary(IDS, expected), bound=0.1)
        else:
            worst = await sync(engine, 2, qwen3.state_dict().items(), Canary(IDS, expected), bound=0.1)
            assert worst == pytest.approx(difference)

    asyncio.run(run())


ROUNDING = [0.03, 0.0, 0.06, 0.01, 0.03, 0.02, 0.05]
LOGPROBS = [-0.5, -1e-6, -1.0, -0.05, -0.7, -0.1, -2.0]


@pytest.mark.parametrize(("times", "stops"), [(1.5, False), (3.9, True), (float("nan"), True), (float("inf"), True)])
def test_without_a_limit_the_measured_rounding_is_the_bound(times, stops):
    """Differences of one and a half times the learner's own rounding pass, of four times stop, whatever their size."""
    for size in (1e-1, 1.0, 10.0):
        expected = Canary(IDS, LOGPROBS, [size * x for x in ROUNDING])
        scores = [x + times * y for x, y in zip(LOGPROBS, expected.scale(), strict=True)]
        if stops:
            with pytest.raises(RunError, match="the tensors arrived.* times what rounding explains.*passes disagree"):
                asyncio.run(check_scores(scores, expected))
        else:
            worst = asyncio.run(check_scores(scores, expected))
            assert worst == pytest.approx(times * max(expected.scale()))


def test_one_token_far_off_stops_though_the_mean_is_small():
    n = 40
    expected = Canary(list(range(n + 1)), [-0.7] * n, [0.03] * n)
    for far, stops in ((14.0, False), (16.0, True)):
        scores = [-0.7] * (n - 1) + [-0.7 + far * float(expected.scale()[0])]
        assert far / n**0.5 < 3  # the mean alone would pass
        if stops:
            with pytest.raises(RunError, match=f"at token {n}, 16 times"):
                asyncio.run(check_scores(scores, expected))
        else:
            asyncio.run(check_scores(scores, expected))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_learner_that_is_not_finite_never_passes(broken):
    for logprobs, rounding in (([broken, -1.0], [0.1, 0.1]), ([-1.0, -1.0], [0.1, broken])):
        with pytest.raises(RunError, match="the two forward passes disagree"):
            asyncio.run(check_scores([-1.0, -1.0], Canary([1, 2, 3], [*logprobs], rounding)))


def test_float32_differs_by_more_than_its_own_rounding():
    """Rotations and sums are computed otherwise: 1e-5 where the learner's own rounding is 2e-6 (SmolLM2-135M)."""
    expected = Canary(IDS, LOGPROBS, [2e-6] * 7)
    asyncio.run(check_scores([x + 1e-5 for x in LOGPROBS], expected))
    with pytest.raises(RunError, match="passes disagree"):
        asyncio.run(check_scores([x + 1e-2 for x in LOGPROBS], expected))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_tensor_that_changes_after_it_arrived_is_named(make_engine, qwen3, name):
    """The weights that count are those that the engine has when the canary is scored."""

    async def run():
        engine = await make_engine()
        sent = await send(engine, 2, qwen3.state_dict().items())
        await check(engine, 2, canary(qwen3), 1e-3, sent)
        now = {**await engine.checksums(), name: checksum(qwen3.state_dict()[name].flip(0) * 1.01)}

        async def checksums():
            return now

        engine.checksums = checksums
        with pytest.raises(RunError, match=f"{name} is not at the engine as it was sent"):
            await check(engine, 2, canary(qwen3), 1e9, sent)

    asyncio.run(run())


def test_the_local_engines_checksums_are_of_the_weights_it_has_now():
    """Two rows exchanged in the decoder itself change the checksum of that tensor and of no other."""
    decoder = Decoder(read_shape(QUICKSTART), torch.device("cpu"), torch.bfloat16, slots=2, columns=8)
    weights = decoder.weights()
    torch.manual_seed(0)
    for tensor in weights.values():
        tensor.normal_()
    runner = ModelRunner(decoder, SlotTable(1, 8))
    before = dict(runner.checksums())
    assert before.keys() == weights.keys()
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            tensor[[0, 1]] = tensor[[1, 0]]
            after = dict(runner.checksums())
            assert [each for each in after if after[each] != before[each]] == [name]
            before = after


def test_the_sender_is_drained_when_the_engine_refuses(make_engine, qwen3):
    """Ranks gather each tensor together: after the engine's refusal of an early one the rest are still consumed."""
    gathered = []

    def tensors():
        for name, tensor in {"wrong": torch.zeros(1), **qwen3.state_dict()}.items():
            gathered.append(name)
            yield name, tensor

    async def run():
        engine = await make_engine()
        with pytest.raises(RunError, match="no tensor 'wrong'"):
            await sync(engine, 2, tensors(), canary(qwen3), bound=1.0)

    asyncio.run(run())
    assert len(gathered) == 1 + len(qwen3.state_dict())
