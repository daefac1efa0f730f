"""Rows of JSONL, JSON and Parquet files, with errors that name file and line."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import pyarrow.parquet

from megarl.data.references import parse_float, parse_int
from megarl.errors import UserError, nearest

Records = tuple[str, Iterator[tuple[int, Any]]]  # the mark between a file's name and a row's number, the numbered rows

LONGEST_LINE = 1 << 30  # bytes
BATCH_BYTES = 64 << 20  # of a Parquet file in memory at once, about
OTHERS = "(other columns)"  # of a Parquet row: the names of the columns that were not read
_IN_FOLDERS = ("*.parquet", "*.jsonl", "*.jsonl.gz")  # *.json only by name: data sets have their descriptions in such


def expand(paths: Sequence[Path], setting: str) -> list[Path]:
    """The files of `paths`: of a folder its Parquet and JSONL files, of a name with `*`, `?` or `[…]` all that match.

    Raises UserError, naming `setting`, for a path that is or matches no file, or a file of an unknown kind.
    """
    return list(chain.from_iterable(_files(path, setting) for path in paths))


def _files(path: Path, setting: str) -> list[Path]:
    patterns: tuple[str, ...] = ()
    if path.is_dir():
        patterns, found = _IN_FOLDERS, [file for pattern in _IN_FOLDERS for file in path.glob(pattern)]
    elif any(c in str(path) for c in "*?[") and not path.exists():
        patterns, found = (str(path),), list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    else:
        if not path.is_file():
            there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            problem = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{setting}: {path} {problem}{nearest(path.name, there) if there else ''}")
        found = [path]
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        what = f"has no file {' or '.join(patterns)}" if path.is_dir() else "is a pattern that no file matches"
        raise UserError(f"{setting}: {path} {what}")
    for file in files:
        if _kind(file) is None:
            raise UserError(f"{setting}: {file}: unknown kind of file; known: {', '.join(_READERS)}")
    return files


def _kind(file: Path) -> str | None:
    """The longest known end of a file's name."""
    return next((kind for kind in sorted(_READERS, key=len, reverse=True) if file.name.endswith(kind)), None)


def records(file: Path, columns: Collection[str]) -> Records:
    """The rows of `file`, one by one. From Parquet only `columns` are read; from other kinds, everything.

    The iterator raises UserError at a row that cannot be parsed, or where the file cannot be read.
    """
    kind = _kind(file)
    assert kind, f"{file} did not pass `expand`"
    mark, rows = _named(file, lambda: _READERS[kind](file, columns))
    return mark, _all(file, rows)


def _named(file: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns. Whatever a library says of the file becomes a UserError of one line."""
    try:
        return read()
    except (UserError, StopIteration):
        raise
    except Exception as e:
        kind = (_kind(file) or "").removeprefix(".")
        reason = " ".join(str(getattr(e, "strerror", None) or e or type(e).__name__).split())
        raise UserError(f"{file}: not a readable {_NAMES.get(kind, kind)} file: {reason}") from None


def _all(file: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    while True:
        try:
            row = _named(file, lambda: next(rows))
        except StopIteration:
            return
        yield row


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb")) if file.suffix == ".gz" else file.open("rb")


def _jsonl(file: Path, columns: Collection[str]) -> Records:
    def rows() -> Iterator[tuple[int, Any]]:
        with _open(file) as stream:
            lines = iter(lambda: stream.readline(LONGEST_LINE + 1), b"")
            for number, line in enumerate(lines, start=1):
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{file}:{number}: has more than {LONGEST_LINE} bytes; one object a line is needed")
                text = _without_mark(line, str(file)) if number == 1 else line
                if text.strip():
                    yield number, _parse(text, f"{file}:{number}", "malformed JSONL line")

    return ":", rows()


def _json(file: Path, columns: Collection[str]) -> Records:
    """One array of objects, or one object a line: many files on the hub with this name are so."""
    with _open(file) as stream:
        start = stream.read(1 << 10)
        if not _without_mark(start, str(file)).lstrip().startswith(b"["):
            return _jsonl(file, columns)
        text = _without_mark(start + stream.read(), str(file))
    return "#", enumerate(_parse(text, str(file), "malformed JSON"))


def _without_mark(text: bytes, name: str) -> bytes:
    """The start of a file without UTF-8's byte-order mark. Raises UserError at another encoding's."""
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # UTF-32's begin with them
        if text.startswith(mark):
            raise UserError(f"{name}: is UTF-16 or UTF-32; save it as UTF-8")
    return text.removeprefix(codecs.BOM_UTF8)


def _parse(text: bytes, where: str, complaint: str) -> Any:
    try:
        return json.loads(text.decode(), parse_int=parse_int, parse_float=parse_float)
    except RecursionError:
        raise UserError(f"{where}: {complaint}: nested too deeply") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: {complaint}: {e.msg} at character {e.pos + 1}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: {complaint}: byte {e.start + 1} is not UTF-8") from None
    except ValueError as e:  # a number of more than 4,300 digits
        raise UserError(f"{where}: {complaint}: {e}") from None


def _parquet(file: Path, columns: Collection[str]) -> Records:
    def rows() -> Iterator[tuple[int, Any]]:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in names if name in columns]
            others = {OTHERS: names} if len(wanted) < len(names) else {}
            number = 0
            for batch in table.iter_batches(batch_size=_batch_rows(table), columns=wanted):
                for record in batch.to_pylist() if wanted else [{}] * batch.num_rows:
                    yield number, record | others
                    number += 1

    return "#", rows()


def _batch_rows(table: pyarrow.parquet.ParquetFile) -> int:
    """Rows to read at once: few of large ones, since Arrow's text columns end at 2 GiB."""
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    mean = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=0)
    return int(max(1, min(1024, BATCH_BYTES // max(mean, 1))))


def columns_of(record: dict[str, Any]) -> str:
    """The names of a row's columns, for messages."""
    return ", ".join(record.get(OTHERS) or record) or "nothing"


_NAMES = {"parquet": "Parquet", "jsonl": "JSONL", "json": "JSON", "jsonl.gz": "gzip", "json.gz": "gzip"}
_READERS: dict[str, Callable[[Path, Collection[str]], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".jsonl.gz": _jsonl,
    ".json.gz": _json,
}
