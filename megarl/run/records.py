"""Reads the JSON files of a run directory. Whatever is wrong with one is one line that names the file and its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError

from megarl.errors import RunError, UserError
from megarl.run.atomic import steps

METRICS = "metrics.jsonl"
ROLLOUTS, EVALUATIONS = "rollouts", "evaluations"  # folders of recorded completions
LARGEST = 2**31  # no step, token or size of a run reaches it


def recorded(folder: Path) -> bool:
    """Whether a folder has a run: a line of metrics, or a checkpoint. A run that failed before has left nothing."""
    metrics = folder / METRICS
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(steps(folder / "checkpoints"))


@contextmanager
def damaged(file: Path, line: int | None = None) -> Iterator[None]:
    """Turn any error of the body, which reads this file or line, into a UserError that names it."""
    try:
        yield
    except (UserError, RunError):
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror or e}") from None
    except Exception as e:
        raise UserError(f"{file}{f':{line}' if line else ''}: damaged: {_what(e)}") from e


def object_in(file: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises UserError."""
    with damaged(file):
        return _object(file.read_bytes())


def object_of(raw: bytes, file: Path, line: int) -> dict[str, Any]:
    """The object of one line. Raises UserError."""
    with damaged(file, line):
        return _object(raw)


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Every line with its number, from 1. The last one may be cut. Raises UserError."""
    with damaged(file), file.open("rb") as lines:
        yield from enumerate(lines, start=1)


def metrics_of(raw: bytes, file: Path, line: int) -> dict[str, Any]:
    """One line of metrics.jsonl: `step`, numbers, and texts under other names than timings. Raises UserError."""
    with damaged(file, line):
        found = _object(raw)
        if not _is_natural(found.get("step")):
            raise ValueError(f"step is {found.get('step')!r:.40}, not a step's number")
        for key, value in found.items():
            timed = key.startswith("seconds_")
            if not _is_number(value) and (timed or not isinstance(value, str)) or timed and not 0 <= value < LARGEST:
                raise ValueError(f"{key[:40]} is {value!r:.40}, not a number")
        return found


def rollouts_of(raw: bytes, file: Path, line: int) -> dict[str, Any]:
    """One line of rollouts/step_N.jsonl, its parts checked against `Rollout`; of evaluations/, against `HeldOut`.

    Raises UserError.
    """
    with damaged(file, line):
        found = _object(raw)
        (HeldOut if file.parent.name == EVALUATIONS else Rollout).model_validate(found).check()
        return found


def rollouts_file(folder: Path, step: int, kind: str = ROLLOUTS) -> Path:
    """Where a step's completions are, or with `EVALUATIONS` the held-out responses after it."""
    return folder / kind / f"step_{step:06d}.jsonl"


def rollouts_files(folder: Path, kind: str = ROLLOUTS) -> dict[int, Path]:
    """The steps that have such a file, in order, and the files. Copies and other files beside them are left out."""
    found = sorted((folder / kind).glob("step_*.jsonl"))
    steps = {int(name[1]): file for file in found if (name := re.fullmatch(r"step_(\d{6,10})", file.stem, re.ASCII))}
    return {step: file for step, file in sorted(steps.items()) if file.name == rollouts_file(folder, step, kind).name}


def rollout_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The recorded completions of a file of rollouts, with their line. Raises UserError that names a damaged one."""
    for n, raw in numbered_lines(file):
        yield n, rollouts_of(raw, file, n)


Text = InstanceOf[str]  # also half a surrogate pair, which pydantic's `str` refuses
Natural = Annotated[int, Field(ge=0, lt=LARGEST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Rollout(BaseModel):
    """The parts of a recorded completion that replay, report and tail read. There may be more."""

    model_config = ConfigDict(strict=True, extra="ignore")

    uid: Text
    index: Natural
    prompt: Text
    source: Text
    prompt_ids: list[Natural]
    response: Text
    response_ids: list[Natural]
    origin: list[Annotated[int, Field(ge=0, lt=256)]]
    logprobs: list[Finite | None]
    finish: Text
    exit_reason: Text
    probes: list[list[Any]]
    spans: list[Annotated[list[Annotated[int, Field(ge=-1, lt=LARGEST)]], Field(min_length=3, max_length=3)]]
    verdict: Text
    formatted: bool
    steps: Natural
    reward: float
    advantage: float
    weight: float
    keep: Share
    score: Finite | None = None
    message: Text = ""
    replaced: bool = False

    def check(self) -> None:
        if not len(self.response_ids) == len(self.origin) == len(self.logprobs):
            raise ValueError("response_ids, origin and logprobs differ in length")
        for position, confidence, accepted, token_ids in self.probes:
            if not (_is_natural(position) and 0 <= confidence <= 1 and isinstance(accepted, bool)):
                raise ValueError("probes: not of the form [position, confidence, accepted, token_ids]")
            if not all(map(_is_natural, token_ids)):
                raise ValueError("probes: token_ids are not all token ids")


class HeldOut(Rollout):
    """A held-out response: it is not trained on."""

    advantage: None  # type: ignore[assignment]
    weight: None  # type: ignore[assignment]


def _object(raw: bytes) -> dict[str, Any]:
    found = json.loads(raw.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}, not an object")
    return found


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**1000  # what a float can say
    return isinstance(value, float)


def _what(error: Exception) -> str:
    """An error of reading, in a few plain words."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON ({error.msg} at character {error.pos + 1})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:200]
