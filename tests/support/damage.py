"""Damaged files: bytes flipped, cut, inserted, repeated, set to extremes; JSON of wrong types and shapes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 10**30, -(10**9), 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "7", "a\nb\x1b[31m", "../../x", "\ud800", "\0", [], [[]], {}, {"a": 1}, [1, 2, 3], ["x"], [None],
]  # fmt: skip


def damaged_bytes(whole: bytes, seed: int) -> bytes:
    """`whole` with one to four damages."""
    draw, data = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(data):
                data[at] = draw.randrange(256)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = draw.randbytes(draw.choice([1, 2, 8, 100]))
            case 4:
                del data[at : at + draw.choice([1, 2, 8, 100])]
            case 5:
                other = draw.randrange(len(data) + 1)
                data[at : at + 8] = data[other : other + 8]
            case _:
                width = draw.choice([1, 2, 4, 8])
                data[at : at + width] = draw.choice([b"\0", b"\xff", b"\x7f"]) * width
    return bytes(data)


def damaged_json(whole: bytes, seed: int) -> bytes:
    """`whole`, a JSON text, with one to three of its values exchanged, removed, renamed or buried."""
    draw, tree = random.Random(seed), json.loads(whole)
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(tree))
        if not places or draw.random() < 0.03:
            tree = copy.deepcopy(draw.choice(ODD))
            continue
        holder, key = draw.choice(places)
        match draw.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            case 2:
                holder[key] = [holder[key]]
            case 3:
                holder[key] = copy.deepcopy(draw.choice(places)[0])
            case _:
                holder[key] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(value)
