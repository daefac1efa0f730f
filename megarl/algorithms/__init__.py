"""The algorithms: arrays and tensors in, arrays and tensors out. No I/O, no processes, no Megatron.

Files: presets (the table of switches) · advantage · kl (estimators) · loss (one function, its denominators) · metrics
(sums → metrics) · steps (markers, step count, shaped rewards) · pruning (DPPO: history, draw, weights).
Called by `train`, by the loader and by the learner's loss.
"""
