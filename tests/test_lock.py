"""What `make setup` installs is what setup.py asks for, and pip checks every file of it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ENTRIES = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())[1:]
PYTHONS = ("3.11", "3.12", "3.13")


def words() -> dict[str, Any]:
    """What setup.py hands to setuptools."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def asked() -> list[Requirement]:
    """Every requirement of setup.py that development needs, torch aside: its build depends on the machine."""
    every = map(Requirement, [*words()["install_requires"], *words()["extras_require"]["dev"]])
    return [one for one in every if one.name != "torch"]


def locked(name: str, python: str) -> str | None:
    """The version that a Python gets on Linux."""
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    for entry in ENTRIES:
        one = Requirement(entry.split("\\")[0].strip())
        same = re.sub("[-_.]+", "-", one.name).lower() == re.sub("[-_.]+", "-", name).lower()
        if same and (one.marker is None or one.marker.evaluate(here)):
            return str(one.specifier).removeprefix("==")
    return None


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_locked_within_its_bounds(python: str) -> None:
    """A bound that is changed in setup.py alone fails here: run `make lock`."""
    wanted = asked()
    assert len(wanted) > 20
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"python_version": python}):
            version = locked(one.name, python)
            assert version and one.specifier.contains(version, prereleases=True), f"{one}: locked is {version}"


def test_every_locked_package_has_hashes_and_torchs_build_is_left_out() -> None:
    assert len(ENTRIES) > 60
    for entry in ENTRIES:
        assert "--hash=sha256:" in entry, entry
        assert not entry.startswith(("torch==", "triton", "nvidia-", "cuda-")), entry


def test_every_requirement_has_an_upper_bound() -> None:
    """Of what megarl runs with; tools for development are held by the lock alone."""
    for one in map(Requirement, words()["install_requires"]):
        assert any(part.operator in ("==", "<") for part in one.specifier), one
