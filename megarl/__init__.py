"""megarl: Megatron-style reinforcement learning for reasoning models, one code path from a laptop to a cluster.

Floors (a file imports only from the floors below it):

TODO
"""

__version__ = "0.1.0"
