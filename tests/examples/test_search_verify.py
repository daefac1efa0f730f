"""The quick start's task. Proves that splits never share a problem, that the grader accepts exactly the right pairs,
that taught responses are what the tokenizer can say, and that the shipped files are what the commands write. Says
nothing about what a model learns from them (test_sft.py, and the README's figures)."""

import json
import random
from contextlib import closing
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from examples.quickstart import make_model, make_problems
from examples.quickstart.search_verify import MIX, SURE, Habits, Problem, draw_problems, grade, lesson_rows, trace
from megarl.rewards.workers import Graders

FOLDER = Path("examples/quickstart")
LONGER = Path("examples/step_grpo/problems/longer.jsonl")
SPLITS = ("train", "validation", "heldout")


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def solution(problem: Problem) -> tuple[int, int] | None:
    found = [pair for pair in problem.pairs if sum(pair) == problem.target]
    assert len(found) <= 1
    return found[0] if found else None


def test_the_shipped_problems_are_what_the_command_writes(tmp_path: Path) -> None:
    make_problems.main(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / "problems" / f"{split}.jsonl").read_bytes()
    make_problems.main(tmp_path / "longer", train=0, validation=0, heldout=0, longer=500)
    assert [file.name for file in (tmp_path / "longer").iterdir()] == [LONGER.name]
    assert (tmp_path / "longer" / LONGER.name).read_bytes() == LONGER.read_bytes()


def test_splits_are_disjoint_up_to_permutation() -> None:
    """No held-out or validation problem is a reordering of one that is taught or trained on."""
    seen = {split: set[str]() for split in SPLITS}
    for split in SPLITS:
        for row in read(FOLDER / "problems" / f"{split}.jsonl"):
            numbers, _, target = row["answer"].partition(" -> ")
            seen[split].add(f"{sorted(numbers.split())} {target}")
    taught = set[str]()
    for row in lesson_rows(2000, seed=0):
        numbers, _, target = row["prompt"].removesuffix(" <think>").partition(" -> ")
        taught.add(f"{sorted(numbers.split())} {target}")
    assert not (seen["train"] | taught) & seen["validation"]
    assert not (seen["train"] | taught) & seen["heldout"]
    assert not seen["validation"] & seen["heldout"]
    assert {problem.count(",") + 1 for problem in seen["train"] | taught} == {4, 5, 6}
    assert all(len(row["answer"].partition(" -> ")[0].split()) == 7 for row in read(LONGER))


def test_the_split_ignores_the_order_of_the_numbers() -> None:
    for numbers in permutations((5, 2, 9, 7)):
        assert Problem("easy", numbers, 11).split == Problem("easy", (2, 5, 7, 9), 11).split


def test_problems_have_one_solution_or_are_hopeless() -> None:
    problems = draw_problems("train", 500, seed=3)
    assert len({problem.prompt for problem in problems}) == 500
    for problem in problems:
        assert len(set(problem.numbers)) == len(problem.numbers)
        assert (solution(problem) is None) == (problem.kind == "hopeless")
    for kind, share in MIX.items():
        assert abs(sum(problem.kind == kind for problem in problems) / 500 - share) < 0.06


@pytest.mark.parametrize(
    ("final", "right"),
    [
        ("**Final Answer** \\boxed{ 2 + 9 }", True),
        ("**Final Answer** \\boxed{9+2}", True),
        ("\\boxed { 9 + 2 }", True),
        ("\\boxed{ 5 + 2 } \\boxed{ 9 + 2 }", True),  # the last box is the answer
        ("\\boxed{ 9 + 2 } \\boxed{ 5 + 2 }", False),
        ("\\boxed{ 9 + 2 + 0 }", False),
        ("\\boxed{ 5 + 6 }", False),  # 6 is not in the list
        ("\\boxed{ 5 + 7 }", False),
        ("\\boxed{ 11 }", False),
        ("\\boxed{ 9 + 2", False),
        ("9 + 2", False),
        ("", False),
    ],
)
def test_grade(final: str, right: bool) -> None:
    assert grade(f"9 + 2 = 11 yes </think> {final}", "5 2 9 7 -> 11") is right


def test_grade_needs_a_closed_thought_and_two_different_numbers() -> None:
    assert not grade("9 + 2 = 11 yes **Final Answer** \\boxed{ 9 + 2 }", "5 2 9 7 -> 11")
    assert not grade("\\boxed{ 9 + 2 } </think> none", "5 2 9 7 -> 11")
    assert not grade("</think> \\boxed{ 5 + 5 }", "5 2 9 7 -> 10")
    with pytest.raises(ValueError, match="not of the form"):
        grade("</think> \\boxed{ 9 + 2 }", "11")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**9), sure=st.booleans())
def test_traces_round_trip_through_the_tokenizer(seed: int, sure: bool) -> None:
    """Text → tokens → text → tokens is the identity; nothing is unknown; a token's text never depends on others."""
    rng = random.Random(seed)
    (problem,) = draw_problems("train", 1, seed)
    text = trace(rng, problem, SURE if sure else Habits())
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == " " + text == "".join(TOKENIZER.decode([i]) for i in ids)
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
    assert TOKENIZER.encode(problem.prompt + " " + text) == TOKENIZER.encode(problem.prompt) + ids


@given(seed=st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_a_perfect_reasoner_is_always_right_and_habits_cost_tokens(seed: int) -> None:
    """With every slip switched off the trace ends in the solution; nothing is said about how often habits mislead."""
    perfect = Habits(overlook=0.0, imagine=0.0, recheck=0.0, repeat=0.0, give_up=0.0, loop=0.0)
    (problem,) = draw_problems("heldout", 1, seed)
    text = trace(random.Random(seed), problem, perfect)
    assert grade(text, problem.question) == (problem.kind != "hopeless")
    if problem.kind != "hopeless":
        assert text.count(" yes") == 1
        assert text.count("Wait") + 1 <= len(problem.pairs)


def test_the_shipped_tokenizer_and_architecture_are_what_the_command_writes(tmp_path: Path) -> None:
    """Compared as loaded, not as bytes: the files also name the library version that wrote them."""
    make_model.main(tmp_path)
    made, shipped = AutoTokenizer.from_pretrained(tmp_path), TOKENIZER
    assert made.get_vocab() == shipped.get_vocab()
    assert json.loads(made.backend_tokenizer.to_str()) == json.loads(shipped.backend_tokenizer.to_str())
    config, other = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tmp_path, FOLDER / "reasoner"))
    assert config.pop("_name_or_path", None) != other.pop("_name_or_path", "")
    assert config == other
    assert config["vocab_size"] == len(shipped) == 36
    assert shipped.decode(shipped.encode("Waiting")) == "<unk>"


TOKENIZER = AutoTokenizer.from_pretrained(FOLDER / "reasoner")


def test_the_grader_runs_in_worker_processes_by_its_import_path() -> None:
    """From the repository's root, as the README starts it; other working directories need PYTHONPATH."""

    right, wrong = "</think> \\boxed{ 9 + 2 }", "</think> \\boxed{ 9 + 5 }"
    pairs = [(right, "5 2 9 7 -> 11"), (wrong, "5 2 9 7 -> 11"), (right, "11")]
    with closing(Graders("examples.quickstart.search_verify:grade", workers=1, timeout=30.0)) as graders:
        futures = [graders.submit(*pair) for pair in pairs]
        assert [future.result(60).verdict for future in futures] == ["right", "wrong", "error"]
