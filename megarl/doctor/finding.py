"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fail` stops a run; `warn` slows it, or may stop it later. `hint`: what to do about it."""

    check: str
    status: Status
    text: str
    hint: str = ""


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warn(check: str, text: str, hint: str) -> Finding:
    return Finding(check, "warn", text, hint)


def fail(check: str, text: str, hint: str) -> Finding:
    return Finding(check, "fail", text, hint)
