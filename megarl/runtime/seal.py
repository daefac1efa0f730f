"""Objects between ranks travel as pickles, which can run code. Each carries a seal that only this run can make.

gloo accepts whoever connects to a rank's port first, so a process of another user may take a rank's place. torch has no
hook for what its object collectives send: this wraps the two functions that all of them use.
"""

from __future__ import annotations

import hmac
from hashlib import blake2b
from typing import Any

import torch
from torch.distributed import distributed_c10d

from megarl.errors import RunError

SIZE = 32  # bytes of a key and of a seal


def seal_objects(key: bytes) -> None:
    """From now on send objects with their seal, and unpickle only objects that have one made with `key`."""
    pack, unpack = distributed_c10d._object_to_tensor, distributed_c10d._tensor_to_object

    def seal(data: torch.Tensor) -> bytes:
        return blake2b(data.cpu().numpy().tobytes(), key=key, digest_size=SIZE).digest()

    def sealed(value: Any, device: Any, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
        data, size = pack(value, device, group)
        mark = torch.frombuffer(bytearray(seal(data)), dtype=torch.uint8).to(data.device)
        return torch.cat([data, mark]), size + SIZE

    def opened(tensor: torch.Tensor, size: Any, group: Any) -> Any:
        data = tensor[: int(size)].cpu()
        body, mark = data[:-SIZE], data[-SIZE:].numpy().tobytes()
        if not hmac.compare_digest(seal(body), mark):
            raise RunError("a message between ranks was not sent by this run: another process has taken a rank's place")
        return unpack(body, len(body), group)

    distributed_c10d._object_to_tensor = sealed
    distributed_c10d._tensor_to_object = opened
