"""The command line. Commands import what they need when they run, so that `megarl --help` is instant."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megarl.errors import RunError, Stopped, UserError, nearest, printable

if TYPE_CHECKING:
    from megarl.config import Settings

app = typer.Typer(
    name="megarl",
    help="Reinforcement learning for reasoning models on Megatron-Core: from a laptop CPU to a cluster, one code path.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_KEY_VALUE = {"ignore_unknown_options": True}  # other trainers' options come as overrides, and are answered there
_PASS_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}

Config = Annotated[Path, typer.Argument(help="YAML file of settings.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. optimizer.lr=1e-5.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks to start on this machine; default: one model copy.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's newest complete checkpoint.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the derived sizes and stop.")]

TrustRun = Annotated[
    bool, typer.Option("--trust-run", help="Import the code that the run names, though it belongs to another user.")
]


@app.command(context_settings=_KEY_VALUE)
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Ranks = None,
    resume: Resume = False,
    dry_run: DryRun = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="With --resume: let data, groups and rewards have other settings.")
    ] = False,
    trust_run: TrustRun = False,
) -> None:
    """Train a policy by reinforcement learning. Starts its ranks, or runs as one rank of torchrun or srun."""
    from megarl.runtime.interrupt import starting

    with starting():  # a signal while the imports run, too
        settings = _on_device(_trusted(config, overrides, trust_run))
        from megarl import launch

        launch.train(settings, nproc, resume, dry_run, allow_changes)


@app.command(context_settings=_KEY_VALUE)
def sft(
    config: Config,
    overrides: Overrides = None,
    nproc: Ranks = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune a model on prompts and responses (data.train); the result is RUN/model. See docs/sft.md."""
    from megarl.runtime.interrupt import starting

    with starting():
        from megarl import config as settings_file

        settings = _on_device(settings_file.load(config, overrides))
        from megarl import launch

        launch.sft(settings, nproc, resume, dry_run)


@app.command(context_settings=_KEY_VALUE)
def eval(
    place: Annotated[
        Path, typer.Argument(help="A run directory (for its newest checkpoint) or a YAML file (for its model).")
    ],
    overrides: Overrides = None,
    nproc: Ranks = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Sampling temperature; repeat the option for several.")
    ] = None,
    responses: Annotated[Path | None, typer.Option(help="Write the responses there, as JSON lines.")] = None,
    trust_run: TrustRun = False,
) -> None:
    """Measure accuracy, score and response length on held-out problems, by plain generation."""
    from megarl.run import trust
    from megarl.run.directory import find

    settings, trained = find(place, overrides)
    trust.check(place, settings, overrides, trust_run)
    _on_device(settings)
    from megarl import launch

    launch.evaluate(settings, trained, temperature, nproc, responses)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The page to write; default: report.html in the first run.")] = None,
) -> None:
    """Write one self-contained HTML page of a run, also while it runs: curves, rollouts, ledger, settings."""
    from megarl import report as pages

    typer.echo(pages.write(runs, out))


@app.command()
def tail(
    run: Annotated[
        Path, typer.Argument(help="A run directory, of a run that is going on or over.", show_default=False)
    ],
    rollouts: Annotated[int, typer.Option(min=0, help="Show so many responses of every step.")] = 0,
    once: Annotated[bool, typer.Option("--once", help="Show what there is, do not follow.")] = False,
) -> None:
    """Watch a run from outside: a live view on a terminal (r shows the last rollouts), else a line a step."""
    from megarl.view.tail import tail as follow

    follow(run, rollouts, once)


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The file to write; default: trace.json in the run.")] = None,
) -> None:
    """Write the phases of every rank as a Chrome trace, for ui.perfetto.dev or chrome://tracing."""
    from megarl.view import trace as traces

    typer.echo(traces.write(run, out))


@app.command()
def serve(
    config: Config,
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the first task's server.")] = 30000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: every one. Beyond loopback it needs a key.")
    ] = "127.0.0.1",
    idle_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds without a word from a client after which it ends, code 1; 0: never.")
    ] = 0.0,
    trust_run: TrustRun = False,
) -> None:
    """Run an engine server of this configuration on this node; under srun, one a task (slurm/launch.sh)."""
    from megarl.rollout.servers.serve import serve as run

    run(_trusted(config, overrides, trust_run), port, idle_timeout, host)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="The run's YAML file; without it, the machine alone.")] = None,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="Devices that this node must have.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the findings to this file.")] = None,
    trust_run: TrustRun = False,
) -> None:
    """Look for what would stop a run here: versions, devices, fabric, disk, ports, engines, clocks. Code 1 if any."""
    from megarl.doctor.command import doctor as run

    run(_trusted(config, overrides, trust_run) if config else None, gpus, json)


@app.command()
def markers(
    model: Annotated[str, typer.Argument(help="A model folder, or a Hub id in the cache.", show_default=False)],
    prompts: Annotated[Path | None, typer.Option(help="Problems; the embedded engine answers the first few.")] = None,
    responses: Annotated[Path | None, typer.Option(help="A file of responses instead, or a run directory.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts to answer.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    json: Annotated[Path | None, typer.Option(help="Write the findings to this file.")] = None,
) -> None:
    """Find the step markers, closing and recipe of Step-GRPO that fit a model, and print its settings."""
    from megarl.markers import markers as run

    run(model, prompts, responses, samples, tokens, json)


@app.command()
def settings(
    name: Annotated[str | None, typer.Argument(help="One section or setting, e.g. rollout.early_exit.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Print this recipe instead, e.g. step_grpo+dppo.")] = None,
) -> None:
    """Print every setting with its type, default and meaning, as Markdown; or a recipe, as YAML."""
    from megarl.config import docs

    if recipe is not None:
        typer.echo(docs.recipe(recipe), nl=False)
        return
    typer.echo(docs.PREFACE + docs.markdown() if name is None else docs.markdown(name), nl=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    step: Annotated[int, typer.Option(min=1, help="The recorded step to re-run.", show_default=False)],
    overrides: Overrides = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Ranks to start here; default: as many as the run has.")
    ] = None,
) -> None:
    """Re-run one step of a run from its checkpoint and rollouts: equal bit by bit, if the layout is the run's."""
    from megarl import launch

    launch.replay(run, step, overrides, nproc)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def plan(context: typer.Context) -> None:
    """Predict memory and time of a run on given GPUs; refuse a layout that cannot fit."""
    from megarl.planner.command import main as command

    _run(command, "megarl plan", context.args)


@app.command(context_settings=_PASS_ON, add_help_option=False)
def scaling(context: typer.Context) -> None:
    """Run a scaling study from one YAML file, here or on Slurm: tables, plots, fitted laws."""
    from megarl.scaling.command import app as command

    command(args=context.args, prog_name="megarl scaling")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def convert(context: typer.Context) -> None:
    """Convert checkpoints between Hugging Face and Megatron, and prove it."""
    [command] = entry_points(group="megarl.commands", name="convert")
    command.load()(args=context.args, prog_name="megarl convert")


@app.command(context_settings=_PASS_ON, add_help_option=False)
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which benchmark; without it, they are listed.")] = None,
) -> None:
    """Run a benchmark: prints its table and, with --json FILE, writes it."""
    from megarl import bench as benchmarks

    known = benchmarks.names()
    if name in (None, "--help"):
        for each in known:
            typer.echo(f"{each:14} {benchmarks.summary(each)}")
        return
    if name not in known:
        raise UserError(f"bench: no benchmark is called '{name}'{nearest(str(name), known)}")
    _run(benchmarks.load(str(name)).main, f"megarl bench {name}", context.args)


def _on_device(settings: Settings) -> Settings:
    """The same settings; their device is chosen before `megarl.learner` is imported, which prepares Megatron for it."""
    from megarl.runtime import device

    device.choose(settings.device)
    return settings


def _trusted(file: Path, overrides: list[str] | None, trust_run: bool) -> Settings:
    """The settings of a YAML file. UserError if it is another user's run's, and names code."""
    from megarl import config
    from megarl.run import trust

    settings = config.load(file, overrides)
    trust.check(file, settings, overrides, trust_run)
    return settings


def _run(function: Any, name: str, arguments: list[str]) -> None:
    """Run a function that has typer-style parameters as a command of its own."""
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    command.command()(function)
    command(args=arguments, prog_name=name)


def main() -> None:
    """Entry point: the user's mistakes end with code 2, failures of the run with code 1, each on one line.

    A run that saved and left because it was asked to ends with code 75.
    """
    try:
        app()
    except UserError as e:
        _say(e)
        sys.exit(2)
    except RunError as e:
        _say(e)
        sys.exit(1)
    except Stopped as e:
        _say(e)
        sys.exit(Stopped.EXIT_CODE)


def _say(error: Exception) -> None:
    """Nothing in an error, such as a line of a file that it quotes, can control the terminal."""
    for line in printable(str(error)).split("\n"):
        if line:
            print(f"megarl: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
