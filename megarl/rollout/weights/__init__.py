"""Weights from the learner into engines: transports, checksums, the canary."""
