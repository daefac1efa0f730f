"""megarl: Megatron-style reinforcement learning for reasoning models, one code path from a laptop to a cluster.

Floors (a file imports only from the floors below it):

    cli  →  train  →  algorithms < data · rewards · rollout · learner  →  config, trajectory, errors

`data`, `rewards`, `rollout` and `learner` do not import each other; `train` wires them.
"""

__version__ = "0.1.0"
