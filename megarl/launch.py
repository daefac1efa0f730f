"""From settings to running ranks: early refusals, the derived table, one process per rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from megarl import config, report
from megarl.algorithms import presets, steps
from megarl.config import Settings
from megarl.data.files import check_exists
from megarl.data.prompts import first_answers, read_prompts
from megarl.errors import RunError, Stopped, UserError
from megarl.learner import parallel, precision, router
from megarl.models import hub
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.hf import HfWeights
from megarl.models.shape import ModelShape
from megarl.models.tokenizer import load_tokenizer
from megarl.planner.fitting import fitting
from megarl.rewards.workers import Graders
from megarl.rollout.early_exit import plan
from megarl.rollout.servers import flags
from megarl.run import changes, provenance, trackers
from megarl.run.directory import read_metrics
from megarl.run.records import METRICS, recorded
from megarl.runtime.interrupt import starting
from megarl.runtime.launched import under_launcher
from megarl.runtime.output import lasting
from megarl.runtime.rank import Heartbeat
from megarl.runtime.spawn import spawn
from megarl.view.console import console
from megarl.view.summary import summary
from megarl.view.table import show, show_rows

MADE_UP = "Let me guess.\n</think>\n\n\\boxed{0}"
"""A response to try the reward function on."""


@starting()
def train(
    settings: Settings,
    nproc: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    allow_changes: bool = False,
) -> list[dict[str, Any]]:
    """Check what can be checked without loading weights, then train; the run's metrics, one object a step.

    A resumed run may have other settings, and says which. Those of its data, groups and rewards need `allow_changes`.

    Starts `nproc` ranks (default: one copy of the model), or runs as this rank of torchrun or srun. Every rank but
    the first returns [], and so does a dry run, which stops after the checks. Raises UserError for a mistake in the
    settings, RunError when the run fails, Stopped when it was asked to leave and has saved.
    """
    world_size = _world_size(settings, nproc)
    locate(settings)
    shape = preflight(settings, world_size, resume)
    if resume:
        changes.check(settings, allow_changes)
        if (settings.run / METRICS).is_file():
            read_metrics(settings.run)  # refuses a damaged one before anything starts
    reward = try_reward(settings, settings.data.train)
    sizes = derived(settings, shape, world_size)
    if dry_run:
        fits = fitting(settings, shape, world_size)
        found = {"weights": weights(settings, shape), "memory, on GPUs": fits}
        show(sizes | prompts(settings) | found | {"reward": reward, "engine flags": flags.checked(settings)})
        return []
    from megarl.train import train as run

    controller = parallel.launch_info().rank == 0
    with lasting(settings.run / "logs"):
        try:
            finished = _start(run, settings, (resume,), world_size, sizes, saves=True)
        finally:  # a failed run gets its report too
            if controller and recorded(settings.run):
                report.at_end(settings.run)
        if finished and controller:
            console(stderr=True).print(summary(settings.run), soft_wrap=True)
    if not finished:
        raise Stopped
    return read_metrics(settings.run) if controller else []


@starting()
def sft(settings: Settings, nproc: int | None, resume: bool, dry_run: bool) -> None:
    """As `train`, for supervised fine-tuning."""
    world_size = _world_size(settings, nproc)
    locate(settings)
    shape = preflight(settings, world_size, resume)
    sizes = derived(settings, shape, world_size)
    sizes = {name: sizes[name] for name in ("model", "layout", "precision", "rows", "steps", "run")}
    sizes["updates"] = f"1 a step, {settings.batch.prompts_per_step} demonstrations each"
    if dry_run:
        show(sizes)
        return
    from megarl.sft import sft as run

    controller = parallel.launch_info().rank == 0
    with lasting(settings.run / "logs"):
        try:
            finished = _start(run, settings, (resume,), world_size, sizes, saves=True)
        finally:
            if controller and recorded(settings.run):
                report.at_end(settings.run)
    if not finished:
        raise Stopped


def evaluate(
    settings: Settings,
    trained: bool = False,
    temperatures: list[float] | None = None,
    nproc: int | None = None,
    responses: Path | None = None,
) -> list[dict[str, Any]]:
    """As `train`, for evaluation; prints and returns one row a temperature (default: `evaluation.temperature`).

    `trained` takes the weights from the newest checkpoint of `settings.run`; else from `settings.model.path`.
    `responses` is a file for the responses, as JSON lines.
    """
    if responses and not responses.absolute().parent.is_dir():
        raise UserError(f"--responses: {responses.absolute().parent} is no folder; name a file in one that exists")
    world_size = _world_size(settings, nproc)
    locate(settings)
    preflight(settings, world_size, resume=True)
    try_reward(settings, settings.data.eval)
    from megarl.evaluate import evaluate as run

    wanted = temperatures or [settings.evaluation.temperature]
    rows: list[dict[str, Any]] = _start(run, settings, (trained, wanted, responses), world_size, {})
    if rows:
        show_rows("held-out problems", rows)
    return rows


def replay(run: Path, step: int, overrides: list[str] | None, nproc: int | None) -> None:
    """As `train`, for one recorded step; prints a table. RunError when the layout is the run's and a bit differs."""
    from megarl import replay as recorded

    settings = config.load(run / "config.yaml", [*(overrides or []), f"run={run}"])
    if settings.rollout.replay_routing:
        raise UserError(
            f"rollout.replay_routing: true, but {run} does not record the experts of its rollouts; add "
            "rollout.replay_routing=false to replay the step with the learner's routers, which is not bit by bit"
        )
    start = recorded.find(run, step)
    ranks = provenance.read(run).get("ranks", settings.parallel.model_ranks)
    world_size = parallel.launch_info().world_size if under_launcher() else nproc or ranks
    parallel.check(settings.parallel, read_shape(settings.model.path))
    parallel.check_ranks(settings.parallel, world_size)
    if start < step - 1:
        print(f"replaying steps {start + 1} to {step}: step {step - 1} has no checkpoint", file=sys.stderr)
    rows = _start(recorded.replay, settings, (step, start), world_size, {})
    if not rows:
        return
    show_rows(f"step {step}, replayed from {f'the checkpoint of step {start}' if start else 'the start'}", rows)
    differing = [row["metric"] for row in rows if not row["equal"]]
    if differing and not overrides and world_size == ranks:
        raise RunError(f"replay: step {step} differs from its record in {', '.join(differing)}")


def _world_size(settings: Settings, nproc: int | None) -> int:
    if under_launcher():
        return parallel.launch_info().world_size
    return nproc or settings.parallel.model_ranks


def _start(
    run: Callable[..., Any],
    settings: Settings,
    arguments: tuple[Any, ...],
    world_size: int,
    sizes: dict[str, Any],
    saves: bool = False,
) -> Any:
    """Run on every rank. Returns what rank 0 returned or, under a launcher, what this rank did."""
    logs = settings.run / "logs"
    with lasting(logs):
        if under_launcher():
            return run(settings, *arguments)
        show(sizes)
        heartbeat = Heartbeat(settings.heartbeat_timeout, logs)
        return spawn(run, world_size, (settings, *arguments), saves=saves, heartbeat=heartbeat)[0]


def locate(settings: Settings) -> None:
    """Replace Hub ids by files in the cache, in place, so that every rank reads the same. Raises UserError."""
    settings.model.path = hub.model(settings.model.path, settings.model.weights == "pretrained")
    settings.data.train = [file for each in settings.data.train for file in hub.data(each, "data.train")]
    settings.data.eval = [file for each in settings.data.eval for file in hub.data(each, "data.eval")]


def preflight(settings: Settings, world_size: int, resume: bool) -> ModelShape:
    """Every check that needs no weights. Raises UserError; writes nothing."""
    if not (settings.model.path / "config.json").is_file():
        raise UserError(f"model.path: {settings.model.path} has no config.json")
    for name, files in (("train", settings.data.train), ("eval", settings.data.eval)):
        for file in files:
            check_exists(file, f"data.{name}")
    shape = read_shape(settings.model.path)
    parallel.check(settings.parallel, shape)
    router.check(settings, shape)
    parallel.check_ranks(settings.parallel, world_size)
    precision.check(settings.precision)
    trackers.check(settings.trackers)
    presets.resolve(settings.algorithm, settings.rollout.max_response_tokens, settings.batch.updates_per_step)
    steps.check_shaping(settings.reward, settings.rollout.max_response_tokens)
    plan.check(settings.rollout, load_tokenizer(settings.model.path))
    checkpoints = settings.run / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"run: {checkpoints} is a file; move it away, or name another folder")
    if not resume and recorded(settings.run):
        raise UserError(f"run: {settings.run} already has a run; add --resume to continue it, or name another folder")
    return shape


def try_reward(settings: Settings, files: list[Path]) -> str:
    """Grade a made-up response to the first problems of `files`, as the controller does; what came of it, in words.

    Raises UserError if the function cannot be imported, takes other arguments, or gives no verdict at all.
    """
    answers = first_answers(files, 3) if parallel.launch_info().rank == 0 else []
    if not answers:
        return "not tried"
    function = settings.reward.function
    try:
        with closing(Graders(function, workers=1, timeout=settings.reward.timeout)) as graders:
            grades = [grade.result() for grade in [graders.submit(MADE_UP, answer) for answer in answers]]
    except RunError as e:
        raise UserError(f"reward.function: '{function}': {e}") from None
    if all(grade.verdict in ("error", "timeout") for grade in grades):
        raise UserError(f"reward.function: '{function}' fails on a made-up response: {grades[0].message}")
    return f"{function}: {', '.join(grade.verdict for grade in grades)} for a made-up response"


def derived(settings: Settings, shape: ModelShape, world_size: int) -> dict[str, Any]:
    """The sizes that follow from the settings, in words."""
    b, p = settings.batch, settings.parallel
    dp = world_size // p.model_ranks
    per_step = b.prompts_per_step * b.completions_per_prompt
    return {
        "model": f"{shape.family}, {shape.layers} layers, hidden {shape.hidden}, vocabulary {shape.vocab}",
        "layout": f"{world_size} ranks = tp {p.tp} x pp {p.pp} x cp {p.cp} x dp {dp}"
        + (f", {p.vpp} chunks a stage" if p.vpp > 1 else "")
        + (", sequence parallel" if p.uses_sequence_parallel else ""),
        "precision": settings.precision.dtype,
        "rollout": f"{settings.rollout.engine}: {b.prompts_per_step} prompts x {b.completions_per_prompt} completions "
        f"= {per_step} a step, at most {settings.rollout.max_response_tokens} tokens each",
        "updates": f"{b.updates_per_step} a step, {per_step // b.updates_per_step} completions each, before pruning",
        "rows": f"at most {b.tokens_per_row} tokens, packed {settings.packing.strategy}",
        "step-grpo": "early exit at " + ", ".join(settings.rollout.early_exit.markers)
        if settings.rollout.early_exit.enabled
        else "off",
        "dppo": f"prompts {settings.pruning.prompts:g}, completions {settings.pruning.completions:g}"
        if settings.pruning.prompts or settings.pruning.completions
        else "off",
        "steps": f"{settings.steps}, rolled out {settings.async_steps} ahead"
        if settings.async_steps
        else settings.steps,
        "run": settings.run,
    }


def weights(settings: Settings, shape: ModelShape) -> str:
    """Where the first weights come from. Raises UserError unless the files have exactly the model's tensors."""
    if settings.model.weights == "random":
        return "drawn from the seed"
    files = HfWeights(settings.model.path)
    files.check(rules(shape))
    return f"{len(files.names)} tensors in {len(files.files())} files, each with its rule in the map"


def prompts(settings: Settings) -> dict[str, str]:
    """Read the data as a run would, and count its rows. Raises UserError for the first malformed row."""
    tokenizer, found = load_tokenizer(settings.model.path), {}
    for name in ("train", "eval"):
        if files := getattr(settings.data, name):
            _, report = read_prompts(files, tokenizer, settings.data, setting=f"data.{name}")
            found[f"data.{name}"] = str(report)
    return found
