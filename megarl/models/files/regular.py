"""Files of others, opened only if they are regular: a FIFO would block for ever, a device has no end."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from megarl.errors import UserError, one_line

JSON_LIMIT = 100_000_000  # bytes


def opened(path: Path) -> BinaryIO:
    """The file, open for reading. UserError if it is missing, unreadable, or no regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise UserError(f"{short(path)}: {e.strerror}") from None
    except ValueError:  # a NUL byte, half a surrogate pair
        raise UserError(f"{short(path)}: is not a file name") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{short(path)}: is not a regular file")
    return open(fd, "rb")


def contents(path: Path, limit: int) -> bytes:
    """All bytes of the file. UserError, before anything is read, if it has more than `limit` bytes."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UserError(f"{short(path)}: has {size:,} bytes; a file of its kind has at most {limit:,}")
        return file.read(limit)


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The file's JSON value. UserError if it is no JSON, or names a key twice."""
    return parse_json(path, contents(path, limit))


def parse_json(path: Path, text: bytes) -> Any:
    """`text`, which stands in the file `path`, as JSON. UserError as `read_json`."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{short(path)}: is not JSON: {short(e)}") from None


def short(text: object, limit: int = 300) -> str:
    """`text` on one line, as a terminal may show it, cut after `limit` characters."""
    words = " ".join(one_line(str(text)).split())
    return words if len(words) <= limit else words[: limit - 1] + "…"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return found
