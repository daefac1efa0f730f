"""NCCL refuses a group of two versions: what the trainer and an engine install must bring the same one."""

from __future__ import annotations

import ast
import re
from email import message_from_string
from pathlib import Path

import pytest

from tools import cuda_wheels

pytestmark = pytest.mark.cuda
SETUP = Path(__file__).parents[2] / "setup.py"


def pin(package: str) -> str:
    """`package==version` as setup.py has it."""
    texts = [node.value for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.Constant)]
    (found,) = {text for text in texts if isinstance(text, str) and re.fullmatch(rf"{package}==[\w.]+", text)}
    return found


def required(requirement: str) -> list[str]:
    """What a pinned wheel says that it needs."""
    (metadata,) = cuda_wheels.unpacked(requirement).glob("*.dist-info/METADATA")
    return message_from_string(metadata.read_text()).get_all("Requires-Dist") or []


def test_sglangs_torch_is_the_trainers() -> None:
    """Then its NCCL is too: torch pins one exactly. Weights reach vLLM by folder, so its torch is its own affair."""
    assert pin("torch") in required(pin("sglang"))


def test_torch_pins_one_nccl() -> None:
    """Without that, equal versions of torch would prove nothing."""
    needed = [line for line in required(cuda_wheels.TORCH) if line.startswith("nvidia-nccl")]
    assert len(needed) == 1 and re.match(r"nvidia-nccl-cu\d+==[\d.]+(;|$)", needed[0]), needed
    assert cuda_wheels.TORCH.replace("===", "==") == pin("torch")
