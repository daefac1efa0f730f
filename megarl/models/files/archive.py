"""Tensors as torch.save writes them, anywhere in a file: described one by one, written while they are read.

torch.save's archive is a zip file: records that describe the tensor, one record with its bytes, a directory. Everything
but the bytes depends only on type and shape, so torch.save makes it once for each type and shape.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from megarl.errors import UserError
from megarl.models.files import pickled
from megarl.models.files.pickled import Maker, records
from megarl.models.files.regular import opened, short
from megarl.models.files.tensor_io import describe, pwrite, write

ALIGNMENT = 64  # bytes, of an archive in its file; the tensor's bytes are aligned like this in the archive
OVERHEAD = 2048  # maximum bytes of an archive beside the tensor's
PICKLE_LIMIT = 2**28  # bytes that describe the tensors of one archive


class Frame(NamedTuple):
    """An archive without the tensor's bytes."""

    head: bytes
    tail: bytes


class ArchiveWriter:
    """Writes archives from several threads. `scratch`: a folder on a file system with sparse files."""

    def __init__(self, scratch: Path) -> None:
        self._template = scratch / "archive"
        self._frames: dict[tuple[torch.dtype, tuple[int, ...]], Frame] = {}
        self._lock = Lock()

    def write(self, fd: int, start: int, shape: tuple[int, ...], blocks: Iterable[Tensor]) -> int:
        """Write a tensor of `shape`, the concatenated `blocks`, at byte `start`; return where it ends."""
        first, *rest = blocks
        frame = self._frame(first.dtype, shape)
        end = pwrite(fd, memoryview(frame.head), start)
        for block in (first, *rest):
            end = write(fd, block, end)
        return pwrite(fd, memoryview(frame.tail), end)

    def _frame(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
        with self._lock:
            if (dtype, shape) not in self._frames:
                tensor = torch.empty(shape, dtype=dtype)  # never touched, so it takes no memory
                with torch.serialization.skip_data():
                    torch.save(tensor, self._template)
                start = start_of(read_archive(self._template))
                with open(self._template, "rb") as file:
                    head = os.pread(file.fileno(), start, 0)
                    tail = os.pread(file.fileno(), OVERHEAD, start + tensor.nbytes)
                self._template.unlink()
                self._frames[dtype, shape] = Frame(head, tail)
            return self._frames[dtype, shape]


def read_archive(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote to bytes [start, start + length) of a file, by default all of it.

    Tensors are descriptions. The rest is read as data (`pickled`): settings of the saver become records. UserError when
    the archive is damaged, compressed, or names anything but tensors and settings.
    """
    with opened(path) as file:
        end = os.fstat(file.fileno()).st_size
        length = end - start if length is None else length
        where = f"{short(path)}: damaged at byte {start}"
        if start < 0 or length < 0 or start + length > end:
            raise UserError(f"{where}: the file has {end} bytes")
        try:
            return _Archive(path, _Window(file, start, length), start).read()
        except Exception as e:  # of many kinds, because damage can be anywhere
            raise UserError(f"{where} ({short(e) or type(e).__name__})") from None


def read_tensor(path: Path, start: int, length: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The description of the archive's one tensor. UserError also when it has another shape or type."""
    tensor = read_archive(path, start, length)
    if not isinstance(tensor, Tensor) or tensor.shape != tuple(shape) or tensor.dtype != dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise UserError(f"{short(path)}: has {found} at byte {start}; .metadata says {dtype} {list(shape)}")
    return tensor


def start_of(tensor: Tensor) -> int:
    """The byte of the file where the storage of a description begins."""
    return tensor.untyped_storage().place.start  # type: ignore[attr-defined]


def stored_entries(archive: ZipFile, length: int) -> list[ZipInfo]:
    """The entries of a zip file of `length` bytes. ValueError if they would take more than that when unpacked."""
    entries = archive.infolist()
    packed = next((e for e in entries if e.compress_type != ZIP_STORED or e.file_size != e.compress_size), None)
    if packed:
        raise ValueError(f"{packed.filename} is compressed; nothing in files of this kind is")
    if sum(entry.file_size for entry in entries) > length:
        raise ValueError("its records overlap")
    return entries


class _Archive:
    """One archive. torch.save compresses nothing, so what is in it is never larger than the archive."""

    def __init__(self, path: Path, window: _Window, start: int) -> None:
        self._path, self._window, self._start = path, window, start
        self._storages: dict[str, Tensor] = {}  # by record; one-dimensional descriptions
        with ZipFile(window) as archive:  # type: ignore[arg-type]
            entries = stored_entries(archive, window.length)
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise ValueError("it has two records of one name")

    def read(self) -> Any:
        if "byteorder" in self._entries and self._record("byteorder", 16) != b"little":
            raise ValueError("its numbers are not little-endian")
        return pickled.load(self._record("data.pkl", PICKLE_LIMIT), _KNOWN, self._storage)

    def _place(self, name: str) -> tuple[int, int]:
        """First byte in the window, and size, of a record."""
        if name not in self._entries:
            raise ValueError(f"it has no record {name}")
        entry = self._entries[name]
        self._window.seek(entry.header_offset)
        header = self._window.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"the record {name} is not where the directory says")
        begin = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        begin += int.from_bytes(header[28:30], "little")
        if begin + entry.file_size > self._window.length:
            raise ValueError(f"the record {name} is truncated")
        return begin, entry.file_size

    def _record(self, name: str, limit: int) -> bytes:
        begin, size = self._place(name)
        if size > limit:
            raise ValueError(f"the record {name} has {size:,} bytes")
        self._window.seek(begin)
        return self._window.read(size)

    def _storage(self, pid: Any) -> Tensor:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("it refers to something that is no storage")
        if key not in self._storages:
            begin, size = self._place(f"data/{key}")
            if type(count) is not int or count * dtype.itemsize != size:
                raise ValueError(f"storage {key} has {size:,} bytes, not the {count} values of its description")
            self._storages[key] = describe(
                torch.empty(count, dtype=dtype, device="meta"), self._path, self._start + begin
            )
        if self._storages[key].dtype != dtype:
            raise ValueError(f"storage {key} has two types")
        return self._storages[key]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage. None repeats values: a tensor never takes more memory than the file it is in."""
    if not isinstance(storage, Tensor) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor has no storage")
    sizes, steps = pickled.size(shape), pickled.size(stride)
    if len(sizes) != len(steps) or sizes.numel() > storage.numel():
        raise ValueError("a tensor has more values than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if sizes.numel() and last >= storage.numel():
        raise ValueError("a tensor ends beyond its storage")
    return storage.as_strided(sizes, steps, offset if sizes.numel() else 0)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    return _tensor(storage.view(dtype), offset, shape, stride)


_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_KNOWN: dict[tuple[str, str], Any] = {
    **pickled.DTYPES,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor_v2"): Maker(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Maker(_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): Maker(lambda data, *_: data),
    ("torch", "Size"): Maker(pickled.size),
    ("collections", "OrderedDict"): Maker(dict),
    # What Megatron-LM saves beside the weights: arguments, random states. Read as records and ignored.
    **records("argparse", "Namespace"),
    **records("types", "SimpleNamespace"),
    **records("pathlib", "PosixPath"),
    **records("signal", "Signals"),
    **records("_io", "BytesIO"),
    **records("_codecs", "encode"),
    **records("numpy", "ndarray", "dtype"),
    **records("numpy.core.multiarray", "_reconstruct", "scalar"),
    **records("numpy._core.multiarray", "_reconstruct", "scalar"),
    **records("numpy.dtypes", "UInt32DType"),
    **records("megatron.core.enums", "ModelType"),
    **records("megatron.core.optimizer.optimizer_config", "OptimizerConfig"),
    **records("megatron.core.rerun_state_machine", "RerunDiagnostic", "RerunMode", "RerunState"),
    **records("megatron.core.transformer.enums", "AttnBackend", "CudaGraphScope"),
}


class _Window(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self.length = file, start, length
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = self.tell() if whence == io.SEEK_CUR else self.length if whence == io.SEEK_END else 0
        if base + offset < 0:
            raise ValueError("it points before its beginning")
        return self._file.seek(self._start + base + offset) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        return self._file.readinto(view[: max(0, self.length - self.tell())]) or 0  # type: ignore[attr-defined]

    def read(self, size: int = -1, /) -> bytes:
        """Whole, as of a buffered file, and never more memory than there is to read."""
        left = max(0, self.length - self.tell())
        return self._file.read(left if size < 0 else min(size, left))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
