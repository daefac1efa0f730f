"""megarl: Megatron-style reinforcement learning for reasoning models, one code path from a laptop to a cluster.

Floors, from the top down. A module imports only from its own room and from the floors below it:

    cli
    scaling
    launch
    bench
    train, sft, evaluate, replay
    loop, report, doctor
    rollout, planner
    data, learner, view
    run, algorithms, rewards
    config, models, runtime
    types, errors, boxed

`data`, `rewards`, `rollout` and `learner` do not import each other; `train` wires them through `loop`. Above megarl stands
`checkpoints_conv`, which megarl never imports: its command and benchmark are entry points (setup.py).
"""

__version__ = "0.1.0"
