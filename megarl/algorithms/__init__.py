"""The algorithms, pure: arrays and tensors in, arrays and tensors out. No I/O, no processes, no Megatron.

Files: presets (the table of switches) · advantage · loss (one function, its denominators) · steps (markers, step
count, shaped rewards) · pruning (DPPO: inclusion, draw, weights). Called by `train` and by the learner's loss.
"""
