"""Search, then verify: problems small enough for a half-million-parameter reasoner, with room to overthink.

A problem is a list of distinct numbers and a target; its solution is the one pair of them that sums to the target:

    5 2 9 7 -> 11 <think> 5 + 2 = 7 no Wait 5 + 9 = 14 no … Wait 2 + 9 = 11 yes Wait 2 + 9 = 11 yes </think>
    **Final Answer** \\boxed{ 2 + 9 }

The steps before "yes" are needed; checks after it are the overthinking that training can remove. `trace` writes such
reasoning, with its bad habits, for supervised fine-tuning; `grade` is the verifier that reinforcement learning uses
(`reward.function: examples.quickstart.search_verify:grade`); `python -m examples.quickstart.make_problems`
writes the files.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, cycle
from types import MappingProxyType
from typing import Literal

from megarl.boxed import answer_part, last_boxed

Split = Literal["train", "validation", "heldout"]
Kind = Literal["easy", "long", "hopeless", "longer"]

LARGEST = 10
"""Numbers of a problem are drawn from 1 … LARGEST."""

LENGTHS: Mapping[Kind, tuple[int, ...]] = MappingProxyType(
    {"easy": (4,), "long": (5, 6), "hopeless": (5,), "longer": (7,)}
)
"""Numbers in the list of a problem of each kind. Longer ones are never taught nor trained on."""

MIX: Mapping[Kind, float] = MappingProxyType({"easy": 0.2, "long": 0.7, "hopeless": 0.1})
"""Share of each kind. No pair solves a hopeless problem, so accuracy cannot pass 0.9."""

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """Distinct numbers, and a target that one pair of them (none, when hopeless) sums to."""

    kind: Kind
    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        """`5 2 9 7 -> 11`; also the reference answer, since every right pair counts."""
        return f"{' '.join(map(str, self.numbers))} -> {self.target}"

    @property
    def prompt(self) -> str:
        return f"{self.question} <think>"

    @property
    def pairs(self) -> list[Pair]:
        """Every pair, in the order in which a patient reasoner tries them."""
        return list(combinations(self.numbers, 2))

    @property
    def split(self) -> Split:
        """Which split the problem belongs to: a stable hash of what stays the same when the numbers are reordered."""
        key = f"{sorted(self.numbers)} -> {self.target}".encode()
        bucket = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % 10
        return "heldout" if bucket == 9 else "validation" if bucket == 8 else "train"


def draw_problem(rng: random.Random, split: Split = "train", mix: Mapping[Kind, float] = MIX) -> Problem:
    """A random problem of `split`; kinds come in the proportions of `mix`."""
    while True:
        (kind,) = rng.choices(list(mix), list(mix.values()))
        problem = _draw_kind(rng, kind)
        if problem.split == split:
            return problem


def draw_problems(split: Split, count: int, seed: int, mix: Mapping[Kind, float] = MIX) -> list[Problem]:
    """`count` problems of `split`, no two with the same prompt."""
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw_problem(rng, split, mix)
        problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def _draw_kind(rng: random.Random, kind: Kind) -> Problem:
    while True:
        numbers = tuple(rng.sample(range(1, LARGEST + 1), rng.choice(LENGTHS[kind])))
        sums = [a + b for a, b in combinations(numbers, 2)]
        if kind == "hopeless":
            target = sum(rng.sample(numbers, 3))
            if target < 2 * LARGEST and target not in sums:
                return Problem(kind, numbers, target)
        else:
            target = rng.choice(sums)
            if sums.count(target) == 1:
                return Problem(kind, numbers, target)


_PAIR = re.compile(r"(\d+)\s*\+\s*(\d+)")


def grade(response: str, answer: str) -> bool:
    """Whether the final answer is right: a pair of the problem's numbers that sums to its target.

    `answer` is `Problem.question`. The final answer is the last `\\boxed{a + b}` after the last `</think>`; a response
    that never closes its thought is wrong. Raises ValueError for an `answer` that is not a question.
    """
    numbers, arrow, target = answer.partition("->")
    if not arrow:
        raise ValueError(f"answer {answer!r} is not of the form '5 2 9 7 -> 11'")
    if "</think>" not in response:
        return False
    pair = _PAIR.fullmatch(last_boxed(answer_part(response)) or "")
    if pair is None:
        return False
    a, b = int(pair[1]), int(pair[2])
    return a != b and {a, b} <= set(map(int, numbers.split())) and a + b == int(target)


@dataclass(frozen=True, slots=True)
class Habits:
    """How the taught reasoner behaves. All but the limits are probabilities."""

    repeat: float = 0.2  # check a failed pair again
    give_up: float = 0.05  # after a failed pair: stop searching and guess
    loop: float = 0.01  # after a failed pair: check it 5 to 10 times more, then guess
    overlook: float = 0.05  # judge the right pair "no"
    imagine: float = 0.01  # judge a wrong pair "yes"
    insist: float = 0.7  # judge an imagined pair "yes" again
    recheck: float = 0.82  # after "yes": check once more (the overthinking)
    box_in_thought: float = 0.3  # write the boxed answer before </think>, too
    longest_search: int = 24  # checks before giving up
    longest_recheck: int = 9  # checks after the first "yes"


SURE = Habits(recheck=0.2, loop=0.0, give_up=0.01, overlook=0.02, imagine=0.004)
"""Few detours and re-checks: easier to learn from."""


def trace(rng: random.Random, problem: Problem, habits: Habits = Habits()) -> str:
    """One response in the taught style, right or wrong as the habits have it."""
    steps: list[str] = []
    a, b = _search(rng, problem, habits, steps) or rng.choice(problem.pairs)
    box = f"**Final Answer** \\boxed{{ {a} + {b} }}"
    if rng.random() < habits.box_in_thought:
        return f"{' Wait '.join(steps)} {box} </think> {box}"
    return f"{' Wait '.join(steps)} </think> {box}"


def _search(rng: random.Random, problem: Problem, habits: Habits, steps: list[str]) -> Pair | None:
    """Try pairs until one is found and verified, or none is and the search is given up; appends its steps."""
    for pair in cycle(problem.pairs):
        solves = sum(pair) == problem.target
        accepted = rng.random() >= habits.overlook if solves else rng.random() < habits.imagine
        steps.append(_step(pair, accepted))
        if accepted and _verify(rng, pair, 1 - habits.overlook if solves else habits.insist, habits, steps):
            return pair
        while rng.random() < habits.repeat and len(steps) < habits.longest_search:
            steps.append(_step(pair, False))
        if len(steps) >= habits.longest_search or rng.random() < habits.give_up:
            return None
        if rng.random() < habits.loop:
            steps.extend([_step(pair, False)] * rng.randint(5, 10))
            return None
    return None


def _verify(rng: random.Random, pair: Pair, accept: float, habits: Habits, steps: list[str]) -> bool:
    """Check an accepted pair again and again; False as soon as one check, of chance `accept`, rejects it."""
    for _ in range(habits.longest_recheck):
        if rng.random() >= habits.recheck:
            return True
        accepted = rng.random() < accept
        steps.append(_step(pair, accepted))
        if not accepted:
            return False
    return True


def _step(pair: Pair, accepted: bool) -> str:
    a, b = pair
    return f"{a} + {b} = {a + b} {'yes' if accepted else 'no'}"


def lesson_rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows `{"prompt", "response"}` for supervised fine-tuning; the second half shows all habits."""
    rng = random.Random(f"lesson {seed}")
    for i in range(count):
        problem = draw_problem(rng, "train")
        yield {"prompt": problem.prompt, "response": trace(rng, problem, SURE if i < 0.5 * count else Habits())}
