"""Models as the trainer and every tool see them: sizes, families, the map between Hugging Face and Megatron.

The map is declarative and invertible. Learner, weight sync and conversion all read the same one. Nothing here imports
Megatron or starts a process.

Reading order: `shape` (the sizes), `config_json` (reads them), `rope` (rotary embedding), `rules` (one Megatron tensor
made of Hugging Face tensors), `families/qwen3.py` (a family is a table of rules), `layout` (which rank has what),
`files/`.
"""
