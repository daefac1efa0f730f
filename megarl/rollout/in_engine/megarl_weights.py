"""Loads weights inside a vLLM worker and tells what was read: `--worker-extension-cls megarl_weights.WeightReader`.

Needs torch and safetensors only. The trainer computes the same checksums from here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

_CHUNK = 1 << 20  # elements a checksum looks at together


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """64 bits of a tensor's bytes in row-major order: differs when a value changes or two values change places.

    Computed on the tensor's own device, so engines and learners need not move weights to compare them.
    """
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(values) % 4 == 0:
        values = values.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(chunk), device=values.device)
        # Odd multipliers that depend on the place, and not linearly: else an exchange of two values whose differing
        # parts cancel (bytes +1 and -1, say) would not show. Arithmetic is modulo 2^64.
        mixed = places * 0x5851F42D4C957F2D + 0x14057B7EF767814F
        mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
        total += ((chunk + 1) * ((mixed ^ (mixed >> 32)) | 1)).sum()
    return int(total.item()) & (2**64 - 1)


class WeightReader:
    """Mixed into vLLM's worker class; its methods are called by `/collective_rpc`."""

    def megarl_load(self, folder: str) -> dict[str, str]:
        """Reload the weights from `folder`; the checksums, in hexadecimal, of the tensors read, by name.

        vLLM's own `reload_weights` on a path takes what it finds: a missing or damaged tensor goes unnoticed. And it
        leaves out a layer whose weight is another's: on a CPU, a tied output layer goes on with its old packed copy.
        """
        read: dict[str, str] = {}

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
            for file in sorted(set(index["weight_map"].values())):
                with safe_open(Path(folder) / file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - not a dict
                        tensor = handle.get_tensor(name)
                        read[name] = f"{checksum(tensor):016x}"
                        yield name, tensor

        self.reload_weights(weights_iterator=tensors())  # type: ignore[attr-defined]
        layers = list(self.model_runner.get_model().modules())  # type: ignore[attr-defined]
        holders = Counter(id(parameter) for layer in layers for parameter in layer.parameters(recurse=False))
        for layer in layers:
            tied = any(holders[id(parameter)] > 1 for parameter in layer.parameters(recurse=False))
            if tied and hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)
        return read
