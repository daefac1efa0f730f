"""The learner: a Megatron-Core GPTModel and its optimizer, on any device and layout. Called by `train` only.

Files: cpu (lets Megatron-Core run without CUDA) · parallel (process groups) · precision (types, FP8 recipes) · quantise
and emulation (FP8 on a CPU) · model (layer specs) · attention · norm · router (experts) · logprobs (vocab-parallel) ·
rows (samples → micro-batches) · broadcast_batch (to every rank) · weights (loading, streaming) · schedule · learner ·
checkpoint (Megatron's format) · export (Hugging Face's).
"""

import warnings

from megarl.learner import cpu

cpu.install()  # before anything imports megatron.core

for _message in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",  # Megatron's own default
    "If you are using transformer_engine as the transformer implementation",  # said whether or not it is
    "The .grad attribute of a Tensor that is not a leaf",  # Megatron's distributed optimizer looks at views
    "`torch.distributed.*` is deprecated",  # names that Megatron calls and older torch knows
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
):
    warnings.filterwarnings("ignore", message=_message)
