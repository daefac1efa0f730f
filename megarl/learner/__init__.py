"""The learner: a Megatron-Core GPTModel and its optimizer, on any device and layout. Called by `train` only.

Files: device (the one place that decides CPU or CUDA) · cpu (the shim that lets Megatron-Core run without CUDA) ·
spawn (ranks on this machine) · parallel (process groups) · precision · model (layer specs) · attention · logprobs
(vocab-parallel) · rows (samples → micro-batches) · transport (batches to ranks) · weights (the map, loading,
streaming) · schedule · learner · checkpoint.
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
