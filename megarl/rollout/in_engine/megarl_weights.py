"""Loads weights inside a vLLM worker and reports what it read: `--worker-extension-cls megarl_weights.WeightReader`.

Needs only torch and safetensors. The trainer uses the same `checksum`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

_CHUNK = 1 << 20  # elements that a checksum processes together


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit checksum of a tensor's bytes in row-major order. It changes when a value changes or two are exchanged.

    Computed on the tensor's own device, so nobody needs to move weights to compare them.
    """
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(values) % 4 == 0:
        values = values.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + len(chunk), device=values.device)
        # Odd multipliers that depend on the position, but not linearly. Else exchanging two values whose differences
        # cancel (bytes +1 and -1, say) would not change the sum. Arithmetic is modulo 2^64.
        mixed = places * 0x5851F42D4C957F2D + 0x14057B7EF767814F
        mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
        total += ((chunk + 1) * ((mixed ^ (mixed >> 32)) | 1)).sum()
    return int(total.item()) & (2**64 - 1)


class WeightReader:
    """A mixin of vLLM's worker class. `/collective_rpc` calls its methods."""

    device: torch.device  # of the worker

    def megarl_load(self, folder: str) -> dict[str, str]:
        """Reload the weights from `folder`. Returns the checksums of the tensors read, in hexadecimal, by name.

        Given a path, vLLM's `reload_weights` does not notice a missing or damaged tensor. It also skips a layer whose
        weight belongs to another: on a CPU, a tied output layer would keep its old packed copy.
        """
        read: dict[str, str] = {}

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())
            for file in sorted(set(index["weight_map"].values())):
                with safe_open(Path(folder) / file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - not a dict
                        tensor = handle.get_tensor(name)
                        # On the worker's device: a CPU core takes minutes for the bytes of a large model.
                        read[name] = f"{checksum(tensor.to(self.device)):016x}"
                        yield name, tensor

        self.reload_weights(weights_iterator=tensors())  # type: ignore[attr-defined]
        layers = list(self.model_runner.get_model().modules())  # type: ignore[attr-defined]
        holders = Counter(id(parameter) for layer in layers for parameter in layer.parameters(recurse=False))
        for layer in layers:
            tied = any(holders[id(parameter)] > 1 for parameter in layer.parameters(recurse=False))
            if tied and hasattr(layer, "quant_method"):
                layer.quant_method.process_weights_after_loading(layer)
        return read
