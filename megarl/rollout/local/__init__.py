"""The embedded engine: in the learner's own process, or behind HTTP (`megarl serve`).

`engine` wires the parts: `scheduler` (who runs), `slots` and `prefix_cache` (where), `runner` (forward passes of
`decoder`, with `kv_cache` and `moe`), `sampler` (the next token), `stop_table` (the end). `server` is the HTTP side.
"""
