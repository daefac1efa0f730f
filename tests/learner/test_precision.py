"""Which FP8 recipe a device gets, and what is refused before a model is built. Transformer Engine is a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megarl.config import Parallel, Precision
from megarl.errors import UserError
from megarl.learner import precision as precisions
from megarl.learner.rows import Alignment

HOPPER, BLACKWELL, ADA = {"fp8", "blockwise"}, {"fp8", "blockwise", "mxfp8"}, {"fp8"}


@pytest.fixture
def gpu(monkeypatch):
    """Transformer Engine on a device that supports these recipes, by the functions that it has for asking."""

    def give(supported: set[str]) -> None:
        engine = ModuleType("transformer_engine.pytorch")
        functions = {"fp8": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available"}
        for recipe, name in (functions | {"mxfp8": "is_mxfp8_available"}).items():

            def ask(return_reason: bool = False, recipe: str = recipe) -> tuple[bool, str]:
                assert return_reason
                return (True, "") if recipe in supported else (False, f"{recipe} needs another device.")

            setattr(engine, name, ask)
        package = ModuleType("transformer_engine")
        package.pytorch = engine
        monkeypatch.setitem(sys.modules, "transformer_engine", package)
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
        monkeypatch.setattr(precisions.device, "on_cuda", lambda: True)
        monkeypatch.setattr(precisions.device, "transformer_engine", lambda: True)

    return give


@pytest.mark.parametrize(("device", "recipe"), [(HOPPER, "blockwise"), (BLACKWELL, "mxfp8"), (ADA, "tensorwise")])
def test_auto_takes_the_finest_recipe_of_the_device(gpu, device, recipe):
    """And Megatron is told that one; the dry run says which, and why."""
    gpu(device)
    auto = Precision(dtype="fp8", high_precision_layers=1)
    precisions.check(auto)
    assert precisions.transformer_settings(auto)["fp8_recipe"] == recipe
    assert f"fp8, recipe {recipe}, chosen for this device" in precisions.describe(auto)


def test_auto_is_tensorwise_where_fp8_is_emulated():
    """As it was before there was a choice."""
    assert precisions.recipe(Precision(dtype="fp8")) == "tensorwise"
    assert precisions.describe(Precision(dtype="fp8")).endswith("emulated on this CPU")


@pytest.mark.parametrize(("device", "recipe"), [(HOPPER, "mxfp8"), (ADA, "blockwise"), (set(), "auto")])
def test_what_the_device_cannot_do_is_refused(gpu, device, recipe):
    """In Transformer Engine's words, without its traceback."""
    gpu(device)
    with pytest.raises(UserError, match=f"^precision.recipe: {recipe}: .* needs another device; set .*bf16$"):
        precisions.check(Precision(dtype="fp8", recipe=recipe))


def test_what_megatron_cannot_leave_in_bf16_is_refused():
    """Delayed scaling leaves no layer out, and a stage cannot leave out more layers than it has."""
    with pytest.raises(UserError, match=r"high_precision_layers: 1: recipe delayed .*nearest valid value: 0"):
        precisions.check(Precision(dtype="fp8", recipe="delayed", high_precision_layers=1))
    with pytest.raises(UserError, match=r"high_precision_layers: 3 .* nearest valid value: 2"):
        precisions.check_layers(Precision(dtype="fp8", high_precision_layers=3), 8, 4)
    precisions.check_layers(Precision(dtype="fp8", high_precision_layers=2), 8, 4)


@pytest.mark.parametrize(
    ("recipe", "parallel", "row"),
    [
        ("blockwise", Parallel(tp=2), 256),
        ("blockwise", Parallel(tp=2, cp=2), 512),
        ("blockwise", Parallel(tp=2, sequence_parallel=False), 16),
        ("blockwise", Parallel(), 16),
        ("mxfp8", Parallel(tp=2), 64),
        ("tensorwise", Parallel(tp=2), 32),
    ],
)
def test_every_rank_has_whole_blocks_of_tokens(recipe, parallel, row):
    """Transformer Engine gathers sequence-parallel parts quantised: 128 tokens each with blockwise scaling."""
    assert Alignment.of(parallel, Precision(dtype="fp8", recipe=recipe), 1000).row == row
