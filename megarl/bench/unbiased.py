"""Dynamic pruning keeps the expected gradient, shown by enumeration.

A small batch of a causal LM is pruned in every possible way. Its policy loss has an importance ratio, clipping,
truncated importance sampling, KL and entropy. The gradients, weighted by the probabilities of these ways, are summed
and compared with the unpruned gradient: `max_rel_bias` is the largest difference over the largest entry. All draws,
weights, advantages, denominators and losses are those that training uses (megarl/algorithms).

Rows that are expected to be biased check the harness, and show what each usual mistake costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations, product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from torch import Tensor, nn

from megarl.algorithms.advantage import advantages
from megarl.algorithms.loss import policy_loss, token_scale, within_row
from megarl.algorithms.presets import PRESETS, Aggregation, Switches
from megarl.algorithms.pruning import Draw, History, Selection, completion_weights, prompt_weights
from megarl.bench.common import result
from megarl.bench.common.choice import chosen
from megarl.errors import RunError
from megarl.types import MicroBatch

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6}
BIASED = 1e-2  # a biased estimator must exceed this
RATES = {"prompts": 0.5, "completions": 0.6}

Estimator = Literal[
    "horvitz_thompson",  # what training does
    "proportional",  # the same with `pruning.selection: proportional`
    "zero_variance_dropped",  # groups of equal rewards are dropped too: exact without KL and entropy only
    "deterministic",  # the lowest are dropped: an ablation
    "unweighted",  # kept samples have weight 1
    "kept_count_denominator",  # weighted, divided by the number kept
    "weighted_kept_denominator",  # weighted, divided by the weighted number kept
    "unweighted_kl",  # the weight multiplies the advantage only, not the whole term
    "advantages_recomputed",  # from the kept completions
]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    estimator: Estimator = "horvitz_thompson"
    preset: str = "grpo"
    aggregation: Aggregation = "sequence_mean"
    draw: Draw = "bernoulli"
    level: Literal["prompts", "completions", "both"] = "both"
    dtype: Literal["fp64", "fp32"] = "fp64"
    expected_unbiased: bool = True
    regularised: bool = True  # KL and entropy in the loss

    @property
    def switches(self) -> Switches:
        preset = PRESETS[self.preset]
        return Switches(
            advantage=preset.advantage,
            ratio=preset.ratio,
            aggregation=self.aggregation,
            constant=8.0,
            clip_low=preset.clip_low,
            clip_high=preset.clip_high,
            dynamic_sampling=False,
            old_logprobs="recompute",
            tis_cap=1.1,
            entropy_coef=0.02 if self.regularised else 0.0,
            kl_loss_coef=0.2 if self.regularised else 0.0,
        )

    def rate(self, level: str) -> float:
        return RATES[level] if self.level in (level, "both") else 0.0


def main(
    json: Annotated[Path | None, typer.Option(help="Write the result to this file.")] = None,
    estimators: Annotated[str, typer.Option(help="Only the rows of these, comma-separated.")] = ",".join(ESTIMATORS),
) -> None:
    """Enumerate every pruning of a small batch; compare the expected gradient with the unpruned one."""
    wanted = chosen(estimators, ESTIMATORS, "estimators")
    rows = [measure(case) for case in cases() if case.estimator in wanted]
    result.publish("unbiased", rows, json)
    wrong = [f"{r['estimator']}/{r['preset']}/{r['draw']}/{r['level']}" for r in rows if not as_expected(r)]
    if wrong:
        raise RunError(f"bench unbiased: not as expected: {', '.join(wrong)}")


def cases() -> list[Case]:
    """The grid of the unbiased estimator, every preset, then the mistakes."""
    grid = [
        Case(aggregation=aggregation, draw=draw, level=level, dtype=dtype)
        for dtype in ("fp64", "fp32")
        for aggregation in ("token_mean", "sequence_mean", "constant")
        for draw in ("bernoulli", "fixed")
        for level in ("prompts", "completions", "both")
    ]
    presets = [
        Case(preset=name, aggregation=preset.aggregation, level=level, expected_unbiased=level == "completions")
        if preset.advantage == "reinforce_pp"  # its batch statistic sees the surviving prompts only
        else Case(preset=name, aggregation=preset.aggregation, level=level)
        for name, preset in PRESETS.items()
        for level in ("completions", "both")
    ]
    proportional = [
        Case(estimator="proportional", aggregation=aggregation, dtype=dtype)
        for dtype in ("fp64", "fp32")
        for aggregation in ("token_mean", "sequence_mean")
    ]
    exact_shortcut = Case(estimator="zero_variance_dropped", regularised=False)
    mistake = partial(Case, expected_unbiased=False)
    mistakes = [
        mistake(estimator="zero_variance_dropped"),
        *(
            mistake(estimator=estimator, aggregation=aggregation)
            for estimator in ("deterministic", "unweighted", "kept_count_denominator", "unweighted_kl")
            for aggregation in ("token_mean", "sequence_mean")
        ),
        mistake(estimator="advantages_recomputed", level="completions"),
        mistake(estimator="weighted_kept_denominator", level="prompts", aggregation="token_mean"),
        mistake(estimator="weighted_kept_denominator", level="prompts", aggregation="sequence_mean"),
    ]
    return [*grid, *presets, *proportional, exact_shortcut, *mistakes]


def measure(case: Case) -> dict[str, Any]:
    """The case's row: its largest relative bias over every pruning that its draws can make."""
    problem = Problem(case.dtype)
    everything = Pruned(1.0, np.ones(problem.size), problem.advantages(case))
    unpruned = problem.gradient(everything, replace(case, estimator="horvitz_thompson"))
    expected, chance, count = np.zeros_like(unpruned), 0.0, 0
    for pruned in prunings(problem, case):
        expected += pruned.probability * problem.gradient(pruned, case)
        chance, count = chance + pruned.probability, count + 1
    if abs(chance - 1) > 1e-12:
        raise RunError(f"bench unbiased: the enumerated prunings have probability {chance}, not 1")
    return {
        "estimator": case.estimator,
        "preset": case.preset,
        "aggregation": case.aggregation,
        "draw": case.draw,
        "level": case.level,
        "dtype": case.dtype,
        "kl_and_entropy": case.regularised,
        "prunings": count,
        "max_rel_bias": float(np.abs(expected - unpruned).max() / np.abs(unpruned).max()),
        "expected_unbiased": case.expected_unbiased,
    }


def as_expected(row: dict[str, Any]) -> bool:
    """Whether an unbiased case is unbiased to rounding, and a biased one clearly biased."""
    if row["expected_unbiased"]:
        return row["max_rel_bias"] <= TOLERANCE[row["dtype"]]
    return row["max_rel_bias"] > BIASED


@dataclass(frozen=True)
class Pruned:
    """One outcome of the draws: weights [N] (0 = dropped) and advantages [N] of all completions."""

    probability: float
    weights: np.ndarray
    advantages: np.ndarray


def prunings(problem: Problem, case: Case) -> Iterator[Pruned]:
    """Every outcome of a step's draws, in the order of a step: prompts, advantages, completions."""
    selection: Selection = "random_low"
    if case.estimator in ("deterministic", "proportional"):
        selection = case.estimator
    by_prompt = partial(
        prompt_weights,
        problem.history,
        np.arange(len(problem.rewards)),
        rate=case.rate("prompts"),
        draw=case.draw,
        selection=selection,
    )
    for chance, of_prompt in outcomes(by_prompt, len(problem.rewards), case.draw):
        values = problem.advantages(case, of_prompt).reshape(len(of_prompt), -1)
        per_group = [
            outcomes(
                partial(
                    completion_weights,
                    group,
                    rate=case.rate("completions"),
                    draw=case.draw,
                    selection=selection,
                    drop_zero_variance=case.estimator == "zero_variance_dropped",
                ),
                len(group),
                case.draw,
            )
            if weight
            else [(1.0, np.zeros(len(group)))]
            for group, weight in zip(values, of_prompt, strict=True)
        ]
        for combination in product(*per_group):
            probability = chance * np.prod([q for q, _ in combination])
            weights = of_prompt[:, None] * np.stack([weights for _, weights in combination])
            yield Pruned(float(probability), weights.ravel(), values.ravel())


def outcomes(assign: Callable[..., np.ndarray], size: int, draw: Draw) -> list[tuple[float, np.ndarray]]:
    """All results of `assign(uniform=[size])` with their probabilities.

    A Bernoulli draw depends on which side of its own threshold each number lies, a fixed-size one on their order.
    """
    found: dict[bytes, tuple[float, np.ndarray]] = {}
    if draw == "bernoulli":
        sides = [((p, p / 2), (1 - p, (1 + p) / 2)) for p in (threshold(assign, size, i) for i in range(size))]
        draws = [(float(np.prod([p for p, _ in side])), np.array([u for _, u in side])) for side in product(*sides)]
    else:
        orders = list(permutations(range(size)))
        draws = [(1 / len(orders), (np.array(order) + 0.5) / size) for order in orders]
    for probability, uniform in draws:
        weights = assign(uniform=uniform)
        before = found.get(weights.tobytes(), (0.0, weights))[0]
        found[weights.tobytes()] = (before + probability, weights)
    return [(probability, weights) for probability, weights in found.values() if probability > 0]


def threshold(assign: Callable[..., np.ndarray], size: int, i: int) -> float:
    """The number below which the i-th is dropped, found by bisection instead of from its weight."""
    below, above = 0.0, 1.0
    for _ in range(60):
        middle = (below + above) / 2
        if assign(uniform=np.where(np.arange(size) == i, middle, 0.5))[i]:
            above = middle
        else:
            below = middle
    return above if below else 0.0


@dataclass
class Problem:
    """Four prompts of four completions, and a model whose log-probs have changed since the rollout.

    One group has different rewards, one has a single success, one has two (equal |advantages|, so none is low), and one
    has equal rewards (zero variance). The history makes the first two prompts low; the fourth was never visited.
    """

    dtype: str
    rewards: list[np.ndarray] = field(
        default_factory=lambda: [
            np.array([1.2, 0.8, 0.1, 0.0]),
            np.array([1.0, 0.0, 0.0, 0.0]),
            np.array([1.0, 0.0, 0.0, 1.0]),
            np.zeros(4),
        ]
    )
    vocabulary: int = 11
    prompt_tokens: int = 3

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.size = sum(map(len, self.rewards))
        self.lengths = rng.integers(2, 9, self.size)
        self.history = History(len(self.rewards))
        for index, score in enumerate([0.1, 0.3, 0.9]):
            self.history.update(index, score)

        width = self.prompt_tokens + self.lengths.max()
        self.tokens = torch.from_numpy(rng.integers(0, self.vocabulary, (self.size, width)))
        place = np.arange(width - 1)  # position t predicts token t + 1
        first = self.prompt_tokens - 1
        self.learned = torch.from_numpy((place >= first) & (place < first + self.lengths[:, None]))
        torch.manual_seed(0)
        self.model = CausalLM(self.vocabulary).double()
        with torch.no_grad():
            now, _ = self.model(self.tokens)

        def moved(by: float) -> Tensor:
            return now + torch.from_numpy(rng.uniform(-by, by, now.shape))

        def holes(values: Tensor, share: float) -> Tensor:
            return torch.where(torch.from_numpy(rng.random(values.shape) < share), torch.nan, values)

        self.old = moved(0.4)
        self.rollout = holes(self.old + torch.from_numpy(rng.uniform(-0.2, 0.2, now.shape)), 0.2)
        self.reference = moved(0.6)
        self.number = torch.float64 if self.dtype == "fp64" else torch.float32
        self.model = self.model.to(self.number)

    def advantages(self, case: Case, of_prompt: np.ndarray | None = None) -> np.ndarray:
        """Advantages [N] of the groups whose prompts were kept, 0 for the others."""
        of_prompt = np.ones(len(self.rewards)) if of_prompt is None else of_prompt
        alive = np.flatnonzero(of_prompt)
        values = advantages([self.rewards[i] for i in alive], case.switches.advantage, keep=1 / of_prompt[alive])
        result = [np.zeros(len(group)) for group in self.rewards]
        for i, value in zip(alive, values, strict=True):
            result[i] = value
        return np.concatenate(result)

    def gradient(self, pruned: Pruned, case: Case) -> np.ndarray:
        """The gradient of the step's loss by all parameters, float64, as `case.estimator` computes it."""
        kept = np.flatnonzero(pruned.weights)
        if not len(kept):
            return np.zeros(sum(p.numel() for p in self.model.parameters()))
        weights, values = pruned.weights[kept], pruned.advantages[kept]
        total_sequences, total_tokens = float(self.size), float(self.lengths.sum())
        if case.estimator == "unweighted":
            weights = np.ones(len(kept))
        elif case.estimator == "kept_count_denominator":
            total_sequences, total_tokens = float(len(kept)), float(self.lengths[kept].sum())
        elif case.estimator == "weighted_kept_denominator":
            total_sequences, total_tokens = float(weights.sum()), float(weights @ self.lengths[kept])
        elif case.estimator == "unweighted_kl":
            weights, values = np.ones(len(kept)), weights * values
        elif case.estimator == "advantages_recomputed":
            values = self._recomputed(kept, case)
        switches = case.switches
        scale = token_scale(
            switches.aggregation, self.lengths[kept], weights, total_sequences, total_tokens, switches.constant
        )
        logprobs, entropy = self.model(self.tokens[kept])
        micro = self.row(kept, scale, values)
        loss, _ = policy_loss(logprobs.flatten(), entropy.flatten(), micro, within_row(micro.sequence), switches)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([g.flatten() for g in gradients]).double().numpy()

    def row(self, kept: np.ndarray, scale: np.ndarray, values: np.ndarray) -> MicroBatch:
        """The kept completions as one row, each padded to the same width."""
        width = self.learned.shape[1]

        def spread(per_sample: np.ndarray) -> Tensor:
            return torch.from_numpy(per_sample)[:, None].expand(-1, width)

        def cut(values: Tensor) -> Tensor:
            return values[kept].flatten().to(self.number)

        learned = self.learned[kept]
        return MicroBatch(
            tokens=self.tokens[kept, :-1].flatten(),
            labels=self.tokens[kept, 1:].flatten(),
            positions=torch.arange(width).repeat(len(kept)),
            cu_seqlens=torch.arange(len(kept) + 1, dtype=torch.int32) * width,
            sequence=torch.arange(len(kept)).repeat_interleave(width),
            scale=torch.where(learned, spread(scale), 0.0).flatten().to(self.number),
            advantage=spread(values).flatten().to(self.number),
            sampled=~torch.isnan(cut(self.rollout)),
            rollout_logprobs=cut(self.rollout),
            old_logprobs=cut(self.old),
            ref_logprobs=cut(self.reference),
        )

    def _recomputed(self, kept: np.ndarray, case: Case) -> np.ndarray:
        """The mistake: advantages of the kept completions among themselves."""
        starts = np.cumsum([0, *map(len, self.rewards)])
        parts = [kept[(kept >= a) & (kept < b)] for a, b in zip(starts, starts[1:], strict=False)]
        flat = np.concatenate(self.rewards)
        return np.concatenate(advantages([flat[part] for part in parts], case.switches.advantage))


class CausalLM(nn.Module):
    """Two transformer layers with causal attention: token ids [n, L] → log-probs and entropies [n, L - 1]."""

    def __init__(self, vocabulary: int, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, 2, 2 * hidden, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        x = self.embedding(inputs)
        mask = nn.Transformer.generate_square_subsequent_mask(inputs.shape[1], dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        logprobs = self.head(x).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, labels[..., None]).squeeze(-1), entropy
