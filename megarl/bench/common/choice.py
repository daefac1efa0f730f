"""Check the names given to an option."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from megarl.errors import UserError, nearest


def chosen(given: str | Iterable[str], known: Collection[str], option: str) -> list[str]:
    """The names in `given`, which may be separated by commas; raises UserError for one that is not `known`."""
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    for name in names:
        if name not in known:
            raise UserError(f"--{option}: {name!r} is not one of {', '.join(known)}{nearest(name, known)}")
    return names
