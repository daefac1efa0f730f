"""The loader: every prompt once an epoch, the same after a resume, and pruning by nothing but what it should go by."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import Pruning
from megarl.data import loader as loader_module
from megarl.data.loader import Loader, PromptBatch, with_unique_ids
from megarl.errors import RunError, UserError
from tests.support import tables

PRUNING = Pruning(prompts=0.5)


def through_a_file(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        return dict(loaded)


def indices(draw: PromptBatch) -> list[tuple[int, int, float]]:
    return [(drawn.index, drawn.epoch, drawn.keep) for drawn in draw.prompts]


def visit(loader: Loader, draw: PromptBatch) -> None:
    """Give every prompt of the draw a history: that of a third of the prompts is low."""
    for drawn in draw.prompts:
        loader.history.update(drawn.index, 0.1 if drawn.index % 3 == 0 else 0.9)


@given(st.integers(1, 30), st.lists(st.integers(0, 40), max_size=8), st.booleans())
def test_without_pruning_every_prompt_comes_once_an_epoch(n, sizes, shuffle):
    """Draws of any sizes, across epochs: together they are the epochs' orders, none skipped, none repeated."""
    loader = Loader(tables.table(n), Pruning(), seed=3, shuffle=shuffle)
    draws = [loader.draw(size) for size in sizes]
    assert [len(draw.prompts) for draw in draws] == [draw.num_drawn for draw in draws] == sizes
    taken = [(drawn.index, drawn.epoch) for draw in draws for drawn in draw.prompts]
    orders = [(int(i), e) for e in range(len(taken) // n + 1) for i in loader.order(e)]
    assert taken == orders[: len(taken)]
    assert loader.position == sum(sizes)
    assert all(drawn.prompt.text == f"prompt {drawn.index}" for draw in draws for drawn in draw.prompts)


@settings(max_examples=40)
@given(
    st.integers(2, 30),
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.integers(0, 7),
    st.sampled_from(["bernoulli", "fixed"]),
    st.sampled_from(["random_low", "proportional", "deterministic"]),
    st.booleans(),
)
def test_resumed_at_any_point_it_goes_on_alike(n, sizes, cut, draw, selection, refill):
    """Saved between any two draws, mid-epoch or not: the rest of the draws and the final state are bit-equal."""
    pruning = Pruning(prompts=0.5, sampling=draw, selection=selection, refill=refill)
    loader = Loader(tables.table(n), pruning, seed=1)
    for size in sizes[:cut]:
        visit(loader, loader.draw(size))
    resumed = Loader(tables.table(n), pruning, seed=1)
    resumed.restore(through_a_file(loader.state()))
    for size in sizes[cut:]:
        expected, got = loader.draw(size), resumed.draw(size)
        assert indices(got) == indices(expected)
        assert got.pruned == expected.pruned
        visit(loader, expected)
        visit(resumed, got)
    final, again = loader.state(), resumed.state()
    assert final.keys() == again.keys()
    assert all(final[key].tobytes() == again[key].tobytes() for key in final)


def visited(n: int, pruning: Pruning, seed: int = 0, name: str = "", table=None) -> Loader:
    """A loader after one epoch, in which a third of the prompts got a low score."""
    loader = Loader(table or tables.table(n, name), pruning, seed)
    visit(loader, loader.draw(n))
    return loader


@settings(max_examples=30)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_a_prompts_fate_does_not_depend_on_the_step_it_falls_into(sizes, seed):
    """Bernoulli draws of the same history: drawn in many steps or in one, the same prompts are pruned."""
    together, apart = visited(40, PRUNING, seed), visited(40, PRUNING, seed)
    whole = together.draw(sum(sizes))
    parts = [apart.draw(size) for size in sizes]
    assert [i for part in parts for i in indices(part)] == indices(whole)
    assert [p for part in parts for p in part.pruned] == whole.pruned
    assert together.position == apart.position


def test_a_prompts_fate_does_not_depend_on_its_place_in_the_data():
    """The same prompts in a file written backwards: in each epoch, the fates are those of the uids."""
    there = tables.table(30)
    back = type(there)()
    for i in reversed(range(30)):
        p = there[i]
        back.append(bytes.fromhex(p.uid), p.token_ids, p.text, p.answer, "memory#", i)
    fates = []
    for table in (there, back):
        loader = Loader(table, Pruning(prompts=0.5, refill=False), seed=2, shuffle=False)
        for i in range(30):
            original = i if table is there else 29 - i
            loader.history.update(i, 0.1 if original % 3 == 0 else 0.9)
        fates.append([{table.uid(index) for index, _ in loader.draw(30).pruned} for _ in range(3)])
    assert fates[0] == fates[1]
    assert len({frozenset(pruned) for pruned in fates[0]}) == 3  # and every epoch draws anew


def test_pruning_follows_the_rule():
    """A first visit is never pruned; of later ones, only those below the mean history, each with the chance r_q."""
    loader = Loader(tables.table(3000), PRUNING, seed=0)
    first = loader.draw(3000)
    assert not first.pruned
    assert {drawn.keep for drawn in first.prompts} == {1.0}
    visit(loader, first)
    second = loader.draw(2500)
    assert all(index % 3 == 0 for index, _ in second.pruned)
    low = len(second.pruned) + sum(drawn.index % 3 == 0 for drawn in second.prompts)
    assert len(second.pruned) / low == pytest.approx(0.5, abs=5 * 0.5 / low**0.5)
    assert all(drawn.keep == (0.5 if drawn.index % 3 == 0 else 1.0) for drawn in second.prompts)


def test_refilling():
    """With refilling n prompts come back, the last one drawn among them. Without it, those of n that are kept."""
    refilled = visited(60, PRUNING)
    for n in (1, 7, 25):
        draw = refilled.draw(n)
        assert len(draw.prompts) == n
        assert draw.num_drawn == n + len(draw.pruned)
        epoch, offset = divmod(refilled.position - 1, 60)
        assert (draw.prompts[-1].index, draw.prompts[-1].epoch) == (refilled.order(epoch)[offset], epoch)
    plain = visited(60, Pruning(prompts=0.5, refill=False))
    draw = plain.draw(30)
    assert draw.num_drawn == 30
    assert draw.pruned and len(draw.prompts) == 30 - len(draw.pruned)


def test_fixed_draws_prune_an_exact_number():
    """Of the low prompts among those looked at, floor(rate * number), whatever the seed."""
    for seed in range(5):
        loader = visited(60, Pruning(prompts=0.5, sampling="fixed", refill=False), seed)
        draw = loader.draw(30)
        low = len(draw.pruned) + sum(drawn.index % 3 == 0 for drawn in draw.prompts)
        assert len(draw.pruned) == low // 2


def test_annealing_and_a_rate_of_zero_prune_nothing():
    loader = visited(60, PRUNING)
    assert not loader.draw(60, prune=False).pruned
    assert not visited(60, Pruning(prompts=0.0)).draw(60).pruned


def test_drawing_ends_though_everything_is_pruned(monkeypatch):
    """Draws that prune whatever they may: an error with the numbers, not an endless loop."""
    loader = Loader(tables.table(1000), Pruning(prompts=0.9), seed=0)
    for i in range(1000):
        loader.history.update(i, 1.0 if i == 500 else 0.1)
    monkeypatch.setattr(loader_module, "uniforms", lambda count, *key: np.zeros(count))
    with pytest.raises(RunError, match=r"pruning.prompts: 0.9 kept only [01] of \d+ prompts drawn; the step needs 2"):
        loader.draw(2)


def test_ten_million_prompts():
    """The state is 4 bytes a prompt and a little, however far the run is; so is the order of an epoch."""
    n = 10_000_000
    loader, resumed = (Loader(tables.Counted(n), PRUNING, seed=0) for _ in range(2))
    loader.position = n * 3 // 2
    state = loader.state()
    assert sum(array.nbytes for array in state.values()) < 4 * n + 1000
    resumed.restore(state)
    assert resumed.position == loader.position
    small = Loader(tables.Counted(n // 100), PRUNING, seed=0)
    assert small.order(0).nbytes == 4 * n // 100


def test_another_run_cannot_be_resumed():
    """Other data, order, seed or shuffling would repeat or skip prompts: refused, naming the setting."""
    state = through_a_file(Loader(tables.table(10), PRUNING, seed=0).state())
    for loader, message in [
        (Loader(tables.table(11), PRUNING, seed=0), "data.train: has 11 prompts, the checkpoint's .* 10"),
        (
            Loader(tables.table(10, "other"), PRUNING, seed=0),
            "data.train: the run to resume has other prompts, or another order",
        ),
        (Loader(tables.table(10), PRUNING, seed=1), "seed: 1, but the run to resume has 0"),
        (Loader(tables.table(10), PRUNING, seed=0, shuffle=False), "data.shuffle: False, but the run to .* True"),
    ]:
        with pytest.raises(UserError, match=message):
            loader.restore(state)


@given(st.integers(1, 12), st.lists(st.integers(0, 20), max_size=4))
def test_prompts_of_one_step_have_unique_ids(n, sizes):
    """Several draws of one step, more than the data holds: no uid twice, and the first visit keeps its own."""
    loader = Loader(tables.table(n), Pruning(), seed=0)
    before, uids = [], []
    for size in sizes:
        drawn = loader.draw(size).prompts
        prompts = with_unique_ids(drawn, before)
        assert [p.token_ids for p in prompts] == [d.prompt.token_ids for d in drawn]
        assert [p.uid.partition("@")[0] for p in prompts] == [d.prompt.uid for d in drawn]
        before += drawn
        uids += [p.uid for p in prompts]
    assert len(set(uids)) == len(uids)
    assert {uid for uid in uids if "@" not in uid} == {d.prompt.uid for d in before}


def test_a_draw_comes_back_from_a_file():
    """Two epochs, pruned prompts among them; also a draw of nothing."""
    loader = Loader(tables.table(12), PRUNING, seed=5)
    visit(loader, loader.draw(12))
    for draw in (loader.draw(10), PromptBatch()):
        assert loader.batch_from(through_a_file(draw.state())) == draw
