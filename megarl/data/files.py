"""Rows of JSONL, JSON and Parquet files, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megarl.errors import UserError, nearest

Records = tuple[str, Iterator[tuple[int, Any]]]  # the mark between a file's name and a row's number, the numbered rows


def check_exists(file: Path, setting: str) -> None:
    """Raise UserError, naming `setting`, unless `file` exists and is of a known kind."""
    if not file.is_file():
        there = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"{setting}: {file} does not exist{nearest(file.name, there) if there else ''}")
    if file.suffix not in _READERS:
        raise UserError(f"{setting}: {file}: unknown kind of file; known: {', '.join(_READERS)}")


def records(file: Path, columns: Collection[str]) -> Records:
    """The rows of `file`, one by one. From Parquet only `columns` are read; from other kinds, everything.

    The iterator raises UserError at a row that cannot be parsed.
    """
    return _READERS[file.suffix](file, columns)


def _jsonl(file: Path, columns: Collection[str]) -> Records:
    def rows() -> Iterator[tuple[int, Any]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(line, f"{file}:{number}", "malformed JSONL line")

    return ":", rows()


def _json(file: Path, columns: Collection[str]) -> Records:
    """One array of objects, or one object a line: many files on the hub with this name are so."""
    text = file.read_bytes()
    if not text.lstrip().startswith(b"["):
        return _jsonl(file, columns)
    return "#", enumerate(_parse(text, str(file), "malformed JSON"))


def _parse(text: bytes, where: str, complaint: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: {complaint}: nested too deeply") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: {complaint}: {e.msg} at character {e.pos + 1}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: {complaint}: byte {e.start + 1} is not UTF-8") from None


def _parquet(file: Path, columns: Collection[str]) -> Records:
    def rows() -> Iterator[tuple[int, Any]]:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            wanted = [name for name in table.schema_arrow.names if name in columns]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    yield number, record
                    number += 1
        except (pyarrow.ArrowInvalid, OSError) as e:
            raise UserError(f"{file}: not a readable Parquet file: {' '.join(str(e).split())}") from None

    return "#", rows()


_READERS: dict[str, Callable[[Path, Collection[str]], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}
