"""The actors of the training loop, which `train` wires: controller, collector, rollout engine, batches, checkpoints.

On every rank, collective where a docstring says so; the controller is on rank 0 alone.
"""
