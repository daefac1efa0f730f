"""Every setting: typed, documented where it is declared, checked before anything is loaded.

One YAML file plus `key=value` overrides (`rollout.early_exit.enabled=true`). Unknown keys are refused.

data.py, learner.py, rollout.py and algorithm.py hold the groups of settings, settings.py all of them; section.py says
what a group is, checks.py what must fit together, reading.py how YAML becomes settings.
"""

from megarl.config.algorithm import KL, Algorithm, Pruning, Reward
from megarl.config.data import Batch, Data, Packing
from megarl.config.learner import Checkpoint, Experts, Model, Optimizer, Parallel, Precision
from megarl.config.reading import dump, load, parse
from megarl.config.rollout import EarlyExit, Evaluation, Rollout, Servers
from megarl.config.section import Fraction, Natural, Positive, Rate, Section
from megarl.config.settings import Settings

__all__ = [
    "KL",
    "Algorithm",
    "Batch",
    "Checkpoint",
    "Data",
    "EarlyExit",
    "Evaluation",
    "Experts",
    "Fraction",
    "Model",
    "Natural",
    "Optimizer",
    "Packing",
    "Parallel",
    "Positive",
    "Precision",
    "Pruning",
    "Rate",
    "Reward",
    "Rollout",
    "Section",
    "Servers",
    "Settings",
    "dump",
    "load",
    "parse",
]
