"""Data: prompts (files → Prompt), loader (order, prompt pruning, state), packing (rows, data-parallel balance), ledger."""
