"""A study as its YAML file describes it: which settings vary, the seeds, and what is plotted against what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from megarl.config import Section, docs
from megarl.errors import UserError, nearest

GPUS, NODES = "gpus", "nodes"
"""Besides settings, a study may vary the number of ranks (the learner's GPUs, or processes on a CPU) or of nodes."""
PARAMETERS = "parameters"
"""Where model.path varies, the horizontal axis may be the number of parameters."""
EFFICIENCY, TO_TARGET = "efficiency", "seconds_to_target"
TRAINED = (
    "step_seconds", "sync_seconds", "tokens_per_second", "rollout_tokens_per_second", "train_tokens_per_second",
    "reward", "response_tokens", "packing_density", "effective_sample_size", "grad_norm", "accuracy", TO_TARGET,
)  # fmt: skip
METRICS = {
    "local": TRAINED,
    "slurm": TRAINED,
    "predicted": (
        "step_seconds", "tokens_per_second", "train_tokens_per_second", "mfu", "peak_gib", "fits",
        "gpu_hours_per_100_steps",
    ),
}  # fmt: skip
"""The metrics of a cell of each kind. The summary adds `efficiency` when `gpus` or `nodes` vary."""
Value = bool | int | float | str | list[Any]


class Study(Section):
    """The YAML file of a study; unknown keys are refused."""

    name: str
    """Names the results."""
    how: Literal["local", "slurm", "predicted"]
    """`local`: each cell is a training run on one node, here or in a Slurm array. `slurm`: each cell is a job of its
    own, on several nodes. `predicted`: the planner's answer."""
    base: Path
    """The run's YAML file that every cell starts from."""
    script: Path | None = None
    """The script that trains `base` in a slurm study, e.g. slurm/train_qwen3_32b.sh; `nodes` must vary."""
    settings: dict[str, Value] = {}
    """Settings of every cell, dotted."""
    vary: dict[str, list[Value]] = {}
    """Settings (or `gpus`, `nodes`) and their values; every combination is a point."""
    points: list[dict[str, Value]] = [{}]
    """Settings that go together, such as the layout of a number of GPUs; combined with `vary`."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    """Each point is measured with every seed; a prediction has one."""
    gpu: str = "h100"
    """The GPU of predictions: a name of `megarl plan --gpu`."""
    skip: Annotated[int, Field(ge=0)] = 1
    """Steps at the start of a run whose times are left out."""
    response_tokens: Annotated[int, Field(ge=1)] | None = None
    """Mean response length of predictions; default: half of the budget."""
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Held-out accuracy that `seconds_to_target` measures the time to; evaluated every `evaluation.every` steps."""
    x: str
    """The horizontal axis: a varied setting that is a number, `gpus`, `nodes`, or the models' `parameters`."""
    y: list[str] = ["tokens_per_second"]
    """Metrics to plot; a law is fitted where they and x are positive."""
    lines: str | None = None
    """The setting that makes the lines of a plot, when more than `x` varies."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [GPUS, NODES, *(s.key for g in docs.groups() for s in g.settings)]
        varied = {*self.vary, *(key for point in self.points for key in point)}
        for key in (*self.settings, *varied):
            if key not in known:
                raise ValueError(f"{key}: is not a setting{nearest(key, known)}")
            if key in ("run", "seed"):
                raise ValueError(f"{key}: the study sets it; " + ("use seeds" if key == "seed" else "see --out"))
        across = "model.path" if self.x == PARAMETERS else self.x
        for name, axis in (("x", across), ("lines", self.lines)):
            if axis is not None and axis not in varied:
                raise ValueError(f"{name}: '{axis}' does not vary{nearest(axis, sorted(varied))}")
            if axis is not None and axis not in self.vary and not all(axis in point for point in self.points):
                raise ValueError(f"{name}: '{axis}' must be in every point")
        for value in (*self.vary.get(self.x, []), *(point.get(self.x, 0) for point in self.points)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"x: {self.x}={docs.text(value)} is not a number; put it on lines")
        metrics = [*METRICS[self.how], *([EFFICIENCY] if self.x in (GPUS, NODES) else [])]
        for metric in self.y:
            if metric not in metrics:
                raise ValueError(f"y: there is no metric '{metric}'{nearest(metric, metrics)}")
        if TO_TARGET in self.y and self.target is None:
            raise ValueError(f"target: {TO_TARGET} needs one")
        if (self.how == "slurm") != (self.script is not None):
            raise ValueError("script: a slurm study needs one, and no other study has one")
        if (self.how == "slurm") != (NODES in varied) or (self.how == "slurm" and GPUS in varied):
            raise ValueError("how: a slurm study varies nodes, the others vary gpus")
        if self.how == "predicted" and len(self.seeds) > 1:
            raise ValueError(f"seeds: {self.seeds}: a prediction has no seed; leave it out")
        return self


@dataclass(frozen=True)
class Cell:
    """One run, or one prediction, of a study."""

    point: dict[str, Value]
    seed: int

    @property
    def name(self) -> str:
        """A file name that identifies the cell."""
        parts = [f"{key.rpartition('.')[2]}={docs.text(value)}" for key, value in self.point.items()]
        return ",".join([*parts, f"seed={self.seed}"]).replace("/", "_").replace(" ", "")

    @property
    def ranks(self) -> int | None:
        """The point's `gpus`; None = one copy of the model."""
        return self._number(GPUS)

    @property
    def nodes(self) -> int | None:
        """The point's `nodes`; None unless the study is a slurm one."""
        return self._number(NODES)

    def _number(self, key: str) -> int | None:
        value = self.point.get(key)
        return None if value is None else int(value)  # type: ignore[arg-type]


def read(file: Path) -> Study:
    """Read a study; raises UserError with one line per mistake."""
    if not file.is_file():
        raise UserError(f"study: {file} does not exist")
    try:
        study = Study.model_validate(yaml.safe_load(file.read_text()))
    except (ValidationError, yaml.YAMLError) as e:
        if isinstance(e, yaml.YAMLError):
            raise UserError(f"study: {file} is not YAML: {' '.join(str(e).split())}") from None
        lines = (f"{'.'.join(map(str, m['loc']))}: {m['msg'].removeprefix('Value error, ')}" for m in e.errors())
        raise UserError("\n".join(f"study: {file}: {line.removeprefix(': ')}" for line in lines)) from None
    names = [cell.name for cell in cells(study)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"study: {file}: two cells are called {twice[0]}; vary settings with different last names")
    return study


def cells(study: Study) -> list[Cell]:
    """Every cell in a fixed order, seeds innermost. A cell's place is its number in a Slurm array."""
    varied = [dict(zip(study.vary, values, strict=True)) for values in product(*study.vary.values())]
    points = [{**point, **values} for point, values in product(study.points, varied)]
    return [Cell(point, seed) for point in points for seed in study.seeds]
