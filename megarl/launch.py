"""From settings to running ranks: early refusals, the derived table, one process per rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarl import config, report
from megarl.checks import Mistakes, data, folder, reward
from megarl.checks import settings as checks
from megarl.config import Settings
from megarl.errors import RunError, Stopped, UserError
from megarl.learner import parallel, precision
from megarl.models.config_json import read_shape
from megarl.models.shape import ModelShape
from megarl.planner.fitting import fitting
from megarl.rollout.servers import flags
from megarl.run import changes, provenance
from megarl.run.directory import read_metrics
from megarl.run.records import METRICS, recorded
from megarl.runtime import device
from megarl.runtime.interrupt import starting
from megarl.runtime.launched import under_launcher
from megarl.runtime.output import lasting
from megarl.runtime.rank import Heartbeat
from megarl.runtime.spawn import spawn
from megarl.view.console import console
from megarl.view.summary import summary
from megarl.view.table import show, show_rows

Check = Callable[[ModelShape], dict[str, Any]]
"""A check that raises UserError, or returns what it found in words."""


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
    more: list[Check] = [
        lambda shape: data.prompts(settings, shape),
        lambda shape: {"weights": checks.weights(settings, shape)},
        lambda shape: {"reward": reward.tried(settings, settings.data.train)},
    ]
    if resume:
        more.insert(0, lambda shape: _resumed(settings, allow_changes))
    shape, found = _checked(settings, world_size, resume, *more)
    sizes = derived(settings, shape, world_size)
    if notes := checks.notes(settings, resume):
        sizes["note"] = "\n".join(notes)
    if dry_run:  # of a layout that is possible
        found |= {"memory, on GPUs": fitting(settings, shape, world_size), "engine flags": flags.checked(settings)}
        show(sizes | found | {"disk": folder.check(settings, shape, resume)})
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
    shape, found = _checked(
        settings,
        world_size,
        resume,
        lambda shape: data.demonstrations(settings, shape),
        lambda shape: {"weights": checks.weights(settings, shape)},
    )
    sizes = derived(settings, shape, world_size)
    sizes = {name: sizes[name] for name in ("model", "layout", "device", "precision", "rows", "steps", "run")}
    sizes["updates"] = f"1 a step, {settings.batch.prompts_per_step} demonstrations each"
    if notes := checks.notes(settings, resume):
        sizes["note"] = "\n".join(notes)
    if dry_run:
        show(sizes | found)
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
    if not settings.data.eval:
        raise UserError("data.eval: [] has no held-out problems; e.g. data.eval=[heldout.jsonl]")
    _checked(
        settings,
        world_size,
        None,
        lambda shape: data.prompts(settings, shape, ("eval",)),
        lambda shape: {} if trained else {"weights": checks.weights(settings, shape)},
        lambda shape: {"reward": reward.tried(settings, settings.data.eval)},
    )
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
    device.choose(settings.device)
    start = recorded.find(run, step)
    ranks = provenance.read(run).get("ranks", settings.parallel.model_ranks)
    world_size = parallel.launch_info().world_size if under_launcher() else nproc or ranks
    parallel.check(settings.parallel, read_shape(settings.model.path))
    parallel.check_ranks(settings.parallel, world_size)
    _check_devices(world_size)
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


def _check_devices(world_size: int) -> None:
    """Raise UserError if this machine's ranks are more than its CUDA devices."""
    launched = under_launcher()
    device.check_ranks(parallel.launch_info().local_world_size if launched else world_size, own_devices=launched)


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


def _resumed(settings: Settings, allow_changes: bool) -> dict[str, Any]:
    """Refuse a run that cannot go on under these settings, or whose metrics are damaged."""
    changes.check(settings, allow_changes)
    if (settings.run / METRICS).is_file():
        read_metrics(settings.run)
    return {}


def preflight(settings: Settings, world_size: int, resume: bool) -> ModelShape:
    """Every check that needs neither weights nor data. Raises UserError, a line a mistake; writes nothing."""
    mistakes = Mistakes()
    with mistakes:
        shape = checks.check(settings, world_size)
        with mistakes:
            folder.check(settings, shape, resume)
    mistakes.answer()
    return shape


def _checked(
    settings: Settings, world_size: int, resume: bool | None, *more: Check
) -> tuple[ModelShape, dict[str, Any]]:
    """The model's shape, and what `more` checks found in words. Rank 0 alone makes those, which read files.

    `resume` None: the run's folder is only read.

    Raises UserError, a line for each mistake that any check found; nothing was started or written then.
    """
    device.choose(settings.device)
    checks.locate(settings)
    mistakes, found = Mistakes(), dict[str, Any]()
    with mistakes:
        _check_devices(world_size)
    with mistakes:
        checks.check(settings, world_size) if resume is None else preflight(settings, world_size, resume)
    with mistakes:
        shape = checks.shape_of(settings)
        checks.freeze_date(settings, resume is not False)
        for check in more if parallel.launch_info().rank == 0 else ():
            with mistakes:
                found |= check(shape)
    mistakes.answer()
    return shape, found


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
        "device": device.describe(),
        "precision": precision.describe(settings.precision),
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
