"""`megarl plan`: memory and time of a run on given GPUs, before it runs."""

from __future__ import annotations

import json as json_files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from megarl import config as configs
from megarl.errors import UserError
from megarl.models.layout import Layout as Divisions
from megarl.planner import chart as charts
from megarl.planner import hardware
from megarl.planner.count import count
from megarl.planner.hardware import GIB
from megarl.planner.job import Plan, plan
from megarl.planner.published import shape_of
from megarl.planner.search import nearest_fit, ranked, settings_of
from megarl.run.atomic import write_text
from megarl.view.console import console

SHOWN = 10
EDGE = 4  # stages shown at each end of a long pipeline


def main(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as for train.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the learner; default: one copy of the model.")] = None,
    gpu: Annotated[str, typer.Option(help=f"Kind of GPU: {', '.join(hardware.GPUS)}.")] = "h100",
    response_tokens: Annotated[int | None, typer.Option(help="Mean response; default: half of the budget.")] = None,
    search: Annotated[bool, typer.Option(help="Rank the layouts that fit, fastest first.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    chart: Annotated[Path | None, typer.Option(help="Draw the plan into this SVG file.")] = None,
) -> None:
    """Predict memory and time of a run. Refuse a layout that cannot fit."""
    settings = configs.load(config, overrides)
    model = shape_of(settings.model.path)
    card = hardware.gpu(gpu)
    size = gpus or settings.parallel.model_ranks * settings.parallel.ep
    if search:
        _search(settings, model, card, size, response_tokens, json)
        return
    parallel = settings.parallel
    try:
        Divisions(parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.etp).check(model)
    except UserError as e:
        raise UserError(f"parallel.{e}") from None
    plan(settings, model, card, size, response_tokens)  # refuses impossible sizes before Megatron does
    result = plan(settings, model, card, size, response_tokens, count(model, parallel, size))
    console().print(*tables(result), sep="\n")
    if json:
        write_text(json, json_files.dumps(as_json(result), indent=1) + "\n")
    if chart:
        write_text(chart, charts.svg(result))
    if not result.fits:
        raise UserError(refusal(result, nearest_fit(settings, model, card, size, response_tokens)))


def refusal(result: Plan, nearest: Plan | None) -> str:
    """One line: what overflows, and the nearest layout that fits."""
    peak, place = result.peak, result.layout
    other = f"nearest layout that fits: {settings_of(nearest)}" if nearest else "no layout fits; use more GPUs"
    if peak.largest == "kv_cache" and (most := _sequences(result)):
        other = f"nearest value that fits: rollout.local_max_sequences={most}"
    return (
        f"parallel: tp {place.tp} pp {place.pp} cp {place.cp} ep {place.ep} on {place.gpus} {result.gpu.name}: stage "
        f"{peak.stage} needs {peak.driver(place):.1f} GiB of {result.gpu.memory:g}, most of it {peak.largest} "
        f"({peak.parts[peak.largest] / GIB:.1f} GiB); {other}"
    )


def _sequences(result: Plan) -> int:
    """How many sequences of the embedded engine leave the fullest stage room for the rest. 0 if none does."""
    over = (result.peak.driver(result.layout) - result.gpu.memory) * GIB
    slots = result.engine.concurrency + 1  # one is for scoring
    return max(0, int(slots * (1 - over / result.peak.parts["kv_cache"])) - 1)


def tables(result: Plan) -> list[Table]:
    """Memory by stage, time by phase and by part."""
    stages = result.stages if len(result.stages) <= 2 * EDGE else [*result.stages[:EDGE], *result.stages[-EDGE:]]
    memory = Table(title=f"Memory of one rank, GiB of {result.gpu.memory:g} ({result.gpu.name})")
    memory.add_column("stage")
    for stage in stages:
        memory.add_column(str(stage.stage), justify="right")
    for name in dict.fromkeys(name for stage in stages for name in stage.parts):
        memory.add_row(name.replace("_", " "), *(f"{stage.parts.get(name, 0) / GIB:.2f}" for stage in stages))
    memory.add_row("with reserve", *(f"{stage.driver(result.layout):.1f}" for stage in stages))
    place = result.layout
    where = f"{place.gpus} {result.gpu.name} in {result.precision}"
    time = Table(title=f"One step on {where}: tp {place.tp} pp {place.pp} dp {place.dp}")
    time.add_column("phase")
    time.add_column("seconds", justify="right")
    for name, seconds in result.seconds.items():
        engine = result.engine
        own = "" if engine.embedded or name != "rollout" else f" on {engine.engines * engine.tp} GPUs more"
        time.add_row(name + own, f"{seconds:.2f}")
    for name, seconds in sorted(result.train.parts.items(), key=lambda part: -part[1]):
        if seconds > 0.005 * result.train.seconds:
            time.add_row(f"  one update: {name.replace('_', ' ')}", f"{seconds:.2f}")
    time.add_row("step", f"{result.step_seconds:.2f}")
    time.add_row("tokens/s", f"{result.tokens / result.step_seconds:,.0f}")
    time.add_row("MFU of training", f"{result.mfu:.1%}")
    time.add_row("GPU-hours per 100 steps", f"{result.gpu_hours:,.1f}")
    return [memory, time]


def as_json(result: Plan) -> dict[str, Any]:
    """Everything in the tables, as numbers: bytes and seconds."""
    place = result.layout
    return {
        "gpu": result.gpu.name,
        "gpus": place.gpus,
        "engine_gpus": 0 if result.engine.embedded else result.engine.engines * result.engine.tp,
        "precision": result.precision,
        "layout": {"tp": place.tp, "pp": place.pp, "vpp": place.vpp, "cp": place.cp, "ep": place.ep, "dp": place.dp},
        "parameters": result.shape.parameters(),
        "parameters_counted_on_the_model": result.exact,
        "micro_batches": place.micro_batches,
        "stages": [{"stage": s.stage, "bytes": s.parts, "driver_gib": s.driver(place)} for s in result.stages],
        "fits": result.fits,
        "seconds": result.seconds,
        "update_seconds": result.train.parts,
        "step_seconds": result.step_seconds,
        "tokens_per_second": result.tokens / result.step_seconds,
        "mfu": result.mfu,
        "gpu_hours_per_100_steps": result.gpu_hours,
    }


def _search(
    settings: configs.Settings, model: Any, card: Any, gpus: int, response: int | None, json: Path | None
) -> None:
    found = ranked(settings, model, card, gpus, response)
    if not found:
        raise UserError(f"gpus: no layout of this model fits on {gpus} {card.name}; use more GPUs")
    table = Table(title=f"Layouts that fit on {gpus} {card.name}, fastest first ({len(found)} in all)")
    for name in ("update s", "MFU", "GiB", "layout"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for p in found[:SHOWN]:
        memory = p.peak.driver(p.layout)
        table.add_row(f"{p.train.seconds:.2f}", f"{p.mfu:.1%}", f"{memory:.1f}", settings_of(p))
    console().print(table)
    if json:
        write_text(json, json_files.dumps([as_json(p) | {"settings": settings_of(p)} for p in found], indent=1) + "\n")
