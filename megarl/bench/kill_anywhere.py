"""`kill -9` of any process of a run, at random moments and inside saves: nothing is lost, repeated or left behind."""

from __future__ import annotations

import contextlib
import json as jsons
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import psutil
import typer

from megarl.bench.common import result, training_runs
from megarl.config import Settings
from megarl.data.ledger import Ledger
from megarl.data.order import EpochOrder
from megarl.errors import RunError, UserError, nearest
from megarl.loop.controller import STATE
from megarl.rollout.servers import factory
from megarl.rollout.servers.process import Server, free_port
from megarl.run import atomic, lock
from megarl.run.arrays import read_arrays
from megarl.run.directory import read_metrics
from megarl.runtime import spawn as ranks
from megarl.train import train
from megarl.view import table

VICTIMS = {"rank": 0.3, "controller": 0.3, "grader": 0.15, "job": 0.25}  # with the probability of each
ENGINE_SHARE = 0.2  # of an engine server, beside the others
MOMENTS = {"start": 0.15, "step": 0.4, "save": 0.45}
TIMEOUT = 900.0  # seconds for one attempt
LEFT_TIMEOUT = 30.0  # seconds for the processes of a killed attempt to end
RESTARTS = 100  # of an engine
MEASURED = ("seconds_", "memory_")  # metrics that differ between any two runs
PROMPTS = 10  # over more than one epoch
SMALL = [
    "steps=6",
    "parallel={tp: 2}",
    "batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}",
    "rollout.max_response_tokens=32",
    "rollout.local_max_sequences=16",
    "pruning={prompts: 0.5, completions: 0.5}",
    "data.eval=[]",
    "checkpoint={every: 1, keep: 2}",
]


@dataclass(frozen=True)
class Variant:
    """How runs are made other than by `SMALL`."""

    overrides: tuple[str, ...] = ()  # `{problems}` names the file of training problems
    ranks: int | None = None  # default: one copy of the model
    served: bool = False  # by an engine server beside the run, which is killed too


VARIANTS = {
    "plain": Variant(),
    "evaluation": Variant(("data.eval=[{problems}]", "evaluation.every=1")),
    "async_saves": Variant(("checkpoint.asynchronous=true",)),
    "dp2": Variant(("parallel={{tp: 1}}",), ranks=2),
    "dapo": Variant(("algorithm.preset=dapo", "pruning={{prompts: 0, completions: 0}}")),
    "served": Variant(("parallel={{tp: 1}}",), served=True),
}


@dataclass
class Tally:
    """What happened to one run until it finished."""

    kills: Counter[str] = field(default_factory=Counter)  # by victim
    inside_saves: int = 0  # of the kills
    resumes: int = 0
    left: int = 0  # processes of killed attempts that did not end


def main(
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    kills: Annotated[int, typer.Option(min=1, help="Kills in total, over as many runs as needed.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the moments and the victims.")] = 0,
    variant: Annotated[str, typer.Option(help=f"What the runs do: {', '.join(VARIANTS)}.")] = "plain",
    config: Annotated[Path, typer.Option(help="Settings of the run, made small.")] = training_runs.QUICKSTART,
    overrides: Annotated[str, typer.Option(help="Settings of every run, separated by spaces.")] = "",
    runs: Annotated[
        Path | None, typer.Option(help="Where the runs go, which are not repeated; default: a folder by variant.")
    ] = None,
) -> None:
    """Train an untouched run, then runs of the same settings that are killed and resumed until they finish.

    `job` kills every rank and grader at once, as the death of a node does. `lost` and `repeated` compare the prompts of
    the final ledger with the data's order. `left_behind` counts processes that outlived a killed attempt. `differing`
    counts the steps whose metrics (except timings and memory) or ledger differ in any bit from the untouched run's.
    """
    if variant not in VARIANTS:
        raise UserError(f"--variant: '{variant}'{nearest(variant, VARIANTS)}")
    runs = runs or Path("runs/bench/kill_anywhere") / variant
    ranks.PRELOAD.append("megarl.train")  # makes the many starts shorter
    problems, how = _problems(config, runs), VARIANTS[variant]
    chosen = [*SMALL, f"data.train=[{problems}]", *(each.format(problems=problems) for each in how.overrides)]
    chosen += overrides.split()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(_serving(config, runs, chosen)) if how.served else None
        chosen += [f"rollout.servers={{addresses: [{engine.address}], restarts: {RESTARTS}}}"] if engine else []
        rows = _rows(config, runs, chosen, kills, seed, how.ranks, engine)
    result.publish("kill_anywhere", [{"variant": variant} | _total(rows)], json, runs=rows)


def _rows(
    config: Path, runs: Path, chosen: list[str], kills: int, seed: int, nproc: int | None, engine: Server | None
) -> list[dict[str, Any]]:
    """One row a run."""
    untouched = training_runs.settings(config, runs / "untouched", 0, chosen)
    reference = training_runs.trained(untouched, nproc)
    rows: list[dict[str, Any]] = []
    while (left := kills - sum(row["kills"] for row in rows)) > 0:
        number = len(rows)
        under_fire = training_runs.settings(config, runs / f"run-{number}", 0, chosen)
        file = under_fire.run / "kills.json"
        if not file.is_file():
            training_runs.forget(under_fire.run)
            generator = np.random.default_rng([seed, number])
            tally = _train_under_fire(under_fire, reference, left, generator, nproc, engine)
            file.write_text(jsons.dumps(_row(number, tally) | _account(under_fire, untouched)))
        rows.append(jsons.loads(file.read_text()))
        table.show_rows("so far", rows)
    return rows


@contextlib.contextmanager
def _serving(config: Path, runs: Path, chosen: list[str]) -> Iterator[Server]:
    """An engine server of these settings on a port that it keeps, so that it can be killed and started again."""
    settings = training_runs.settings(config, runs / "engine", 0, chosen)
    command, variables = factory.command_of(settings), factory.environment_of(settings.rollout, None)
    server = Server("engine", command, log=runs / "engine.log", environment=variables, port=free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _problems(config: Path, runs: Path) -> Path:
    """The first few training problems, in a file."""
    runs.mkdir(parents=True, exist_ok=True)
    source = training_runs.settings(config, runs, 0, []).data.train[0]
    lines = source.read_text().splitlines(keepends=True)[:PROMPTS]
    file = runs / "problems.jsonl"
    file.write_text("".join(lines))
    return file


def _train_under_fire(
    settings: Settings,
    reference: list[dict[str, Any]],
    most: int,
    generator: np.random.Generator,
    nproc: int | None,
    engine: Server | None,
) -> Tally:
    """Train to the end in spite of at most `most` kills."""
    tally = Tally()
    while True:
        gun = Gun(settings, reference, most, generator, tally, engine)
        gun.start()
        failure = None
        try:
            ranks.spawn(train, nproc or settings.parallel.model_ranks, (settings, True), TIMEOUT)
        except RunError as e:
            failure = e
        finally:
            gun.cease()
        tally.left += gun.left_behind()
        if failure is None:
            return tally
        if not gun.fatal:
            raise failure
        tally.resumes += 1


class Gun(threading.Thread):
    """Kills once in one attempt at a run. Graders and engines, whose death the run survives, any number of times."""

    def __init__(
        self,
        settings: Settings,
        reference: list[dict[str, Any]],
        most: int,
        generator: np.random.Generator,
        tally: Tally,
        engine: Server | None,
    ) -> None:
        super().__init__(name="gun", daemon=True)
        self.engine = engine
        self._victims = VICTIMS | ({"engine": ENGINE_SHARE} if engine else {})
        self._seen: list[psutil.Process] = []  # of the run, at the last kill
        self.settings, self.most, self.generator, self.tally = settings, most, generator, tally
        self.fatal = False  # whether it killed something that the run needs
        self._over = threading.Event()
        self._began = time.time()
        self._step_seconds = median(line["seconds_total"] for line in reference)
        self._save_seconds = median(line.get("seconds_checkpoint", 0.0) for line in reference[1:])

    def run(self) -> None:
        while not self._over.is_set() and not self.fatal and self.tally.kills.total() < self.most:
            self._await_moment(self._choose(MOMENTS))
            if not self._over.is_set():
                self._kill(self._choose(self._victims))

    def cease(self) -> None:
        """The attempt is over."""
        self._over.set()
        self.join()

    def left_behind(self) -> int:
        """Processes of the attempt that do not end. Those that started after the last kill are not known."""
        gone, alive = psutil.wait_procs(self._seen, timeout=LEFT_TIMEOUT)
        return len(alive)

    def _await_moment(self, moment: str) -> None:
        """Wait until a random time in the start, in one of the next steps, or in one of the next saves."""
        ahead = int(self.generator.integers(1, 4))
        if moment == "start":
            self._pause(4 * self._step_seconds)
        elif moment == "step":
            until = min(_steps_done(self.settings.run) + ahead, self.settings.steps - 1)
            while _steps_done(self.settings.run) < until and not self._over.wait(0.02):
                pass
            self._pause(self._step_seconds)
        else:
            checkpoints = self.settings.run / "checkpoints"
            until = min(max(atomic.steps(checkpoints), default=0) + ahead, self.settings.steps)
            half = atomic.partial_of(checkpoints, until)
            while not (half.exists() and self._saving()) and not self._over.wait(0.002):
                pass
            self._pause(self._save_seconds)

    def _pause(self, longest: float) -> None:
        self._over.wait(longest * self.generator.random())

    def _kill(self, victim: str) -> None:
        if victim == "engine":
            self._kill_engine()
            return
        everyone, graders, controller = _processes(self.settings.run)
        self._seen = _descendants()
        chosen = {
            "rank": everyone - controller,
            "controller": controller,
            "grader": graders,
            "job": everyone | graders,
        }[victim]
        if not chosen:
            return  # not started yet, or ended
        if victim != "job":
            chosen = {sorted(chosen)[int(self.generator.integers(len(chosen)))]}
        saving = self._saving()
        self.fatal = victim != "grader"
        killed = [pid for pid in chosen if _killed(pid)]
        if killed:
            self.tally.kills[victim] += 1
            self.tally.inside_saves += saving
        else:
            self.fatal = False

    def _kill_engine(self) -> None:
        """The server and what runs it. It is started again, as whoever runs it would do."""
        assert self.engine and self.engine.reaper
        reaper = psutil.Process(self.engine.reaper.pid)
        for process in [reaper, *reaper.children(recursive=True)]:
            _killed(process.pid)
        self.tally.kills["engine"] += 1
        self.engine.stop()
        self.engine.start()

    def _saving(self) -> bool:
        """Whether a checkpoint is being written; one that an earlier kill left half-written does not count."""
        with contextlib.suppress(FileNotFoundError):  # committed as we look
            halves = (self.settings.run / "checkpoints").glob(".step_*.partial")
            return any(half.stat().st_mtime > self._began for half in halves)
        return False

    def _choose(self, shares: dict[str, float]) -> str:
        weights = np.array(list(shares.values()))
        return str(self.generator.choice(list(shares), p=weights / weights.sum()))


def _processes(run: Path) -> tuple[set[int], set[int], set[int]]:
    """Process ids of the run's ranks, its graders, and its controller (empty until it has opened the run)."""
    found: set[int] = set()
    graders: set[int] = set()
    servers = {child.pid for child in psutil.Process().children()}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "megarl.rewards.worker" in process.cmdline():
                graders.add(process.pid)
            elif process.ppid() in servers and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    with contextlib.suppress(OSError, ValueError):
        return found, graders, found & {jsons.loads((run / lock.FILE).read_text())["pid"]}
    return found, graders, set()


def _descendants() -> list[psutil.Process]:
    """Every process that the run's ranks started, and the ranks."""
    found: list[psutil.Process] = []
    for server in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(server.cmdline()):
                found += server.children(recursive=True)
    return found


def _killed(pid: int) -> bool:
    try:
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _steps_done(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(read_metrics(run)) if file.is_file() else 0


def _row(number: int, tally: Tally) -> dict[str, Any]:
    by_victim = {victim: tally.kills[victim] for victim in (*VICTIMS, "engine")}
    return {
        "run": number,
        "kills": tally.kills.total(),
        **by_victim,
        "inside_saves": tally.inside_saves,
        "resumes": tally.resumes,
        "left_behind": tally.left,
    }


def _account(killed: Settings, untouched: Settings) -> dict[str, int]:
    """The finished run's prompts and metrics against the data's order and the untouched run."""
    ledger, position = _records(killed)
    audit = ledger.audit(EpochOrder(PROMPTS, killed.seed, killed.data.shuffle), position)
    metrics = [
        [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in read_metrics(run)]
        for run in (killed.run, untouched.run)
    ]
    return {
        "prompts": audit.num_drawn,
        "lost": audit.lost,
        "repeated": audit.repeated,
        "missing_steps": audit.missing_steps,
        "differing": _differing(*metrics) + _differing(list(ledger), list(_records(untouched)[0])),
    }


def _records(settings: Settings) -> tuple[Ledger, int]:
    """The ledger of the finished run, and the number of prompts that it took."""
    folder = atomic.folder_of(settings.run / "checkpoints", settings.steps)
    return Ledger.load(folder), int(read_arrays(folder / STATE)["position"])


def _differing(ours: list[Any], theirs: list[Any]) -> int:
    return sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))


def _total(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {"runs": len(rows), **{key: sum(row[key] for row in rows) for key in rows[0] if key != "run"}}
