"""Every call that megarl makes of Megatron and Transformer Engine fits every accepted version, by their sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.signatures import Package, Report, check
from tools import cuda_wheels

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).parents[2]
FILES = sorted(file for room in ("megarl", "checkpoints_conv") for file in (ROOT / room).rglob("*.py"))
PREFIXES = {"megatron-core": "megatron.core", "transformer-engine": "transformer_engine"}
LEAST = {"megatron-core": (40, 30), "transformer-engine": (1, 1)}  # names and calls that there are at least
CHECKED = [name for name in cuda_wheels.HASHES if name.split("=")[0] in PREFIXES]


def report(requirement: str, files: list[Path]) -> Report:
    package = Package(cuda_wheels.unpacked(requirement))
    return check(files, PREFIXES[requirement.split("=")[0]], package)


@pytest.mark.parametrize("requirement", CHECKED)
def test_every_name_is_there_and_every_call_binds(requirement: str) -> None:
    """Names and calls are read from the text of both sides: what is called through a variable is not seen."""
    found = report(requirement, FILES)
    names, calls = LEAST[requirement.split("=")[0]]
    assert found.names >= names and found.calls >= calls
    assert not found.wrong


def test_a_wrong_name_and_a_wrong_call_are_found(tmp_path: Path) -> None:
    """The check above can fail: an unknown name, an unknown argument, one too few."""
    file = tmp_path / "wrong.py"
    file.write_text(
        "from megatron.core import parallel_state\n"
        "from megatron.core.optimizer import OptimizerConfig, get_a_megatron_optimizer\n"
        "from megatron.core.pipeline_parallel import get_forward_backward_func\n"
        "OptimizerConfig(learning_rate=1.0)\n"
        "get_forward_backward_func(1, 2, 3, 4)\n"
        "parallel_state.initialize_all()\n"
        "parallel_state.get_data_parallel_group(with_context_parallel=True)\n"
    )
    found = report("megatron-core==0.16.1", [file])
    assert sorted(int(line.split(":")[1]) for line in found.wrong) == [2, 4, 5, 6]
