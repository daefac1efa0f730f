"""Weights from the learner into engines: the transports, and the checks that they arrived. Imports no engine."""
