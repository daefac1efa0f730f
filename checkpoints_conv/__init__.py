"""Converts checkpoints between Hugging Face's and Megatron's formats, through the map in `megarl.models`.

Nothing here imports Megatron or starts a process.

Reading order: `checkpoint` (what every format offers), `torch_dist` and `classic` (Megatron's formats), `hf_writer`,
`convert` (the conversion), `commands`, `cli`.
"""
