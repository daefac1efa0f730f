"""Hugging Face ⇄ Megatron: one declarative, invertible map per model family.

The learner, weight sync, the planner and the conversion commands all read the same map. Nothing here imports
Megatron or starts a process; from megarl only `errors` is used.

Reading order: `shape` (what a config.json says), `rules` (one Megatron tensor made of Hugging Face tensors),
`models/families/qwen3.py` (a family is a table of rules), `layout` (which rank holds what), `hf` (safetensors files).
"""
