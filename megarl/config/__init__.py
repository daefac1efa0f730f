"""Every setting: typed, documented where it is declared, checked before anything is loaded.

A YAML file with a recipe and includes, plus `key=value` overrides. Unknown keys are refused.

Files: data, learner, rollout, algorithm (the groups) · settings (all of them, and the checks across groups) · section
(what a group is) · reading (YAML to settings and back) · aliases (names elsewhere) · docs (`megarl settings`).
"""

from megarl.config.algorithm import KL, Algorithm, Pruning, Reward
from megarl.config.data import Batch, Data, Packing
from megarl.config.learner import Checkpoint, Experts, Model, Optimizer, Parallel, Precision
from megarl.config.reading import dump, load, parse, tree
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
    "tree",
]
