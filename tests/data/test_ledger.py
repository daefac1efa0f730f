"""The ledger: what is recorded comes back, damage is noticed, and the audit finds every lost or repeated prompt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import Pruning
from megarl.data.ledger import FILE, Audit, Entry, Fate, Ledger, Step
from megarl.data.loader import Loader
from megarl.errors import RunError
from tests.support import tables

pruned = st.builds(Entry, st.integers(0, 99), st.integers(0, 3), st.just(Fate.PRUNED))
rolled_out = st.builds(
    Entry,
    st.integers(0, 99),
    st.integers(0, 3),
    st.sampled_from([Fate.REPLACED, Fate.DROPPED, Fate.TRAINED]),
    st.integers(1, 16),
    st.integers(0, 16),
)
histories = st.lists(st.tuples(st.integers(0, 9), st.lists(pruned | rolled_out, max_size=6)), max_size=6)


def record(steps: list[tuple[int, list[Entry]]]) -> Ledger:
    ledger = Ledger()
    for number, (version, entries) in enumerate(steps, start=1):
        ledger.record_step(number, version, entries)
    return ledger


@settings(max_examples=50)
@given(history=histories, more=histories)
def test_what_is_recorded_comes_back(tmp_path_factory, history, more):
    """Through a file, and appended to after it was loaded, as in a resumed run."""
    folder = tmp_path_factory.mktemp("checkpoint")
    record(history).commit(folder)
    ledger = Ledger.load(folder)
    for number, (version, entries) in enumerate(more, start=len(history) + 1):
        ledger.record_step(number, version, entries)
    ledger.commit(folder)
    expected = [Step(n, version, entries) for n, (version, entries) in enumerate(history + more, start=1)]
    assert list(ledger) == list(Ledger.load(folder)) == expected


THREE = [(step, [Entry(step, 0, Fate.TRAINED, 8, 4), Entry(step + 3, 0, Fate.PRUNED)]) for step in range(3)]


@pytest.fixture
def committed(tmp_path):
    record(THREE).commit(tmp_path)
    return tmp_path


def test_a_torn_last_line_is_left_out(committed):
    """Cut off anywhere within the last line: two steps remain."""
    whole = (committed / FILE).read_bytes()
    starts = whole[:-1].rfind(b"\n") + 1
    for end in range(starts + 1, len(whole) - 1):
        (committed / FILE).write_bytes(whole[:end])
        assert len(Ledger.load(committed)) == 2, end
    (committed / FILE).write_bytes(whole[:starts])
    assert len(Ledger.load(committed)) == 2
    (committed / FILE).write_bytes(whole[:-1])  # only the newline is missing
    assert len(Ledger.load(committed)) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: [lines[0].replace(b'"version":0', b'"version":7'), *lines[1:]],
        lambda lines: [*lines[:2], lines[2].replace(b'"version":2', b'"version":7')],
        lambda lines: [lines[0], lines[2]],
        lambda lines: lines[1:],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: [lines[0], lines[0], *lines[1:]],
        lambda lines: [lines[0], lines[1][:20], lines[2]],
    ],
)
def test_any_other_damage_is_an_error(committed, damage):
    """Changed, missing, exchanged or doubled lines, the last one included: the file is refused, the line named."""
    lines = (committed / FILE).read_bytes().splitlines()
    (committed / FILE).write_bytes(b"\n".join(damage(lines)) + b"\n")
    with pytest.raises(RunError, match=rf"{FILE}:\d: damaged: the checksum is wrong"):
        Ledger.load(committed)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(RunError, match="ledger.jsonl: cannot be read: No such file"):
        Ledger.load(tmp_path)


def run(loader: Loader, sizes: list[int]) -> Ledger:
    """Draw and record, as training does."""
    ledger = Ledger()
    for step, size in enumerate(sizes, start=1):
        draw = loader.draw(size)
        for drawn in draw.prompts:
            loader.history.update(drawn.index, 0.1 if drawn.index % 2 else 0.9)
        entries = [Entry(index, epoch, Fate.PRUNED) for index, epoch in draw.pruned]
        entries += [Entry(drawn.index, drawn.epoch, Fate.TRAINED, 8, 8) for drawn in draw.prompts]
        ledger.record_step(step, step - 1, entries)
    return ledger


@settings(max_examples=30)
@given(st.integers(1, 20), st.lists(st.integers(0, 15), max_size=6))
def test_an_honest_run_passes_the_audit(n, sizes):
    """With pruning, across epochs and partial ones: nothing lost, nothing repeated."""
    loader = Loader(tables.table(n), Pruning(prompts=0.5), seed=0)
    ledger = run(loader, sizes)
    audit = ledger.audit(loader.order, loader.position)
    assert audit == Audit(loader.position, lost=0, repeated=0, missing_steps=0)
    assert audit.clean


def test_the_audit_counts_what_is_wrong():
    """Of an otherwise honest run: a prompt left out, one twice, one from an epoch not begun, a step skipped."""
    loader = Loader(tables.table(10), Pruning(), seed=0)
    steps = list(run(loader, [4, 4, 4]))

    def audit(*changed: Step) -> Audit:
        ledger = Ledger()
        for step in changed:
            ledger.record_step(step.step, step.version, step.entries)
        return ledger.audit(loader.order, loader.position)

    one, two, three = steps
    assert audit(*steps).clean
    assert audit(Step(1, 0, one.entries[1:]), two, three) == Audit(12, 1, 0, 0)
    assert audit(Step(1, 0, one.entries + one.entries[:1]), two, three) == Audit(12, 0, 1, 0)
    assert audit(one, two, Step(3, 2, [*three.entries, Entry(0, 5, Fate.TRAINED)])) == Audit(12, 0, 1, 0)
    assert audit(one, three) == Audit(12, 4, 0, 1)
    assert audit(one, two, two, three) == Audit(12, 0, 4, 1)
    assert not audit(one, three).clean


def test_a_step_is_compact():
    """512 prompts out of ten million take less than 7 kB, all columns and the checksum included."""
    ledger = Ledger()
    ledger.record_step(1, 0, [Entry(9_000_000 + i, 3, Fate.TRAINED, 8, 4) for i in range(512)])
    assert len(ledger._lines[0]) < 7_000
