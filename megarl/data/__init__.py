"""Data: what is trained on next, and in which rows. Called by `train` and the benchmarks.

Files: prompts (files → prompts) · table (prompts in columns) · loader (order, prompt pruning, state) · packing (rows,
data-parallel balance) · ledger (what became of every prompt).
"""
