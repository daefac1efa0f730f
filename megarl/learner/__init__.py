"""The learner: a Megatron-Core GPTModel and its optimizer, on any device and layout. Called by `train` only.

Files: device (the one place that decides CPU or CUDA) · cpu (the shim that lets Megatron-Core run without CUDA) ·
parallel (process groups) · model (layer specs) · attention · precision · logprobs (vocab-parallel) · learner · checkpoint.
"""
