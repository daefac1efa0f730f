"""Models as the trainer and every tool know them: sizes, families, the map between Hugging Face and Megatron.

The map is declarative and invertible; learner, weight sync, planner and conversion all read the same one. Nothing here
imports Megatron or starts a process.

Reading order: `shape` (the sizes), `config_json` (read from config.json), `rules` (one Megatron tensor made of Hugging
Face tensors), `families/qwen3.py` (a family is a table of rules), `layout` (which rank has what), `files/`.
"""
