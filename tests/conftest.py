"""What every test shares."""

import os
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from typer.main import get_command

# The tests show what a CPU can show, also beside a GPU. `make test-gpu` sets this to cuda.
os.environ.setdefault("MEGARL_DEVICE", "cpu")

# On a busy machine the time of one example says nothing.
settings.register_profile("megarl", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megarl")


@pytest.fixture
def bench() -> Callable[..., None]:
    """`megarl bench …` in this process, given the words of the command line; raises UserError or RunError."""
    from megarl import cli

    def call(*words: object) -> None:
        with pytest.raises(SystemExit) as end:
            get_command(cli.app)(args=["bench", *map(str, words)], prog_name="megarl", standalone_mode=False)
        assert end.value.code == 0, words

    return call
