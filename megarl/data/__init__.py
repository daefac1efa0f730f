"""Data: what is trained on next, and in which rows. Called by `train`, `sft` and the benchmarks.

Files: files (rows of JSONL, JSON, Parquet) · prompts (files → prompts) · demonstrations (files → what to imitate) ·
table (prompts in columns) · loader (order, prompt pruning, state) · packing (rows, data-parallel balance) ·
ledger (what became of every prompt).
"""
