"""megarl: Megatron-style reinforcement learning for reasoning models, one code path from a laptop to a cluster.

Floors, from the top down. A module imports only from its own room and from the floors below it:

    cli
    scaling
    launch
    bench
    checks
    train, sft, evaluate, replay, markers
    loop, report, doctor
    rollout, planner
    data, learner, view
    run, algorithms, rewards
    config, models, runtime
    types, errors, boxed

`data`, `rewards`, `rollout` and `learner` do not import each other; `train` wires them through `loop`. Above megarl
stands `checkpoints_conv`, which megarl never imports: its command and benchmark are entry points (setup.py).
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "Generation", "Prompt", "Sampling", "Settings", "evaluate", "load", "train"]

if TYPE_CHECKING:
    from megarl.config import Settings, load
    from megarl.launch import evaluate, train
    from megarl.rollout.engine import Engine, Generation, Sampling
    from megarl.types import Completion, Prompt
else:
    _HOMES = {"Completion": "types", "Prompt": "types", "Settings": "config", "load": "config"}
    _HOMES |= {"Engine": "rollout.engine", "Generation": "rollout.engine", "Sampling": "rollout.engine"}
    _HOMES |= {"evaluate": "launch", "train": "launch"}

    class _Lazy(ModuleType):
        """Imports what a public name needs when it is used, so that `import megarl` is instant.

        `train` and `evaluate` are modules too. Python sets a package's attribute to a module that it has imported,
        which would hide the function: `__setattr__` leaves that out.
        """

        def __getattr__(self, name: str) -> Any:
            if name not in _HOMES:
                raise AttributeError(f"module 'megarl' has no attribute '{name}'")
            return getattr(import_module(f"megarl.{_HOMES[name]}"), name)

        def __setattr__(self, name: str, value: object) -> None:
            if name not in _HOMES or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return [*super().__dir__(), *__all__]

    sys.modules[__name__].__class__ = _Lazy
