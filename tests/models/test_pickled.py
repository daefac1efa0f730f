"""Pickles and archives of others are read as data: nothing in them runs, and none takes more memory than its file."""

from __future__ import annotations

import collections
import io
import os
import pickle
import resource
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.errors import UserError
from megarl.models.files.archive import read_archive
from megarl.models.files.pickled import Maker, Record, load, records
from megarl.models.files.tensor_io import loaded
from megarl.models.files.torch_metadata import load_metadata

KNOWN = {**records("argparse", "Namespace"), ("collections", "OrderedDict"): Maker(dict)}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def named(module: str, name: str, *arguments: str) -> bytes:
    """A pickle of protocol 4 that calls a name, which may have dots, as attributes of what a module has imported."""
    texts = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name))
    given = b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in arguments)
    return b"\x80\x04" + texts + b"\x93" + b"(" + given + b"tR."


@pytest.mark.parametrize("protocol", range(2, 6))
def test_values_come_back(protocol: int) -> None:
    """In every protocol that Python writes. Objects are records, and a mapping of them keeps its order."""
    values = {"a": [1, 2**40, -3, 0.5, None, True], "ü": ("x", (1, 2, 3, 4)), 7: {"b": []}, "long": "x" * 300}
    assert load(pickle.dumps(values, protocol), KNOWN) == values
    whole = load(pickle.dumps({"args": Namespace(a=1)}, protocol), KNOWN)
    assert isinstance(whole["args"], Record) and whole["args"].kind == "Namespace"
    assert whole["args"].state == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Call(os.mkdir, "{ran}")),
        named("torch.distributed.checkpoint.filesystem", "os.mkdir", "{ran}"),
        named("argparse", "_os.mkdir", "{ran}"),
        named("argparse", "Namespace.__init__.__globals__", "{ran}"),
        named("megatron.core.dist_checkpointing.mapping", "logging.os.mkdir", "{ran}"),
        named("builtins", "eval", "__import__('os').mkdir('{ran}')"),
        b"cos\nmkdir\n(V{ran}\ntR.",
        b"(V{ran}\nios\nmkdir\n.",
    ],
)
def test_code_is_never_run(data: bytes, tmp_path: Path) -> None:
    """By any opcode that calls, under any name, in `.metadata` and in an archive."""
    ran = tmp_path / "ran"
    data = data.replace(b"{ran}", str(ran).encode().ljust(5)) if b"\x8c" not in data else data
    with pytest.raises(ValueError, match="names|instruction"):
        load(data, KNOWN)
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match="not the metadata of a torch_dist checkpoint"):
        load_metadata(tmp_path / ".metadata")
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
    with pytest.raises(UserError, match="x.pt: damaged"):
        read_archive(tmp_path / "x.pt")
    assert not ran.exists() and not Path("{ran}").exists()


DEEP = b"\x80\x02" + b")" + b"\x85" * 200_000
BOMBS = {
    "a text of 2**60 bytes": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"x.",
    "bytes of 2**40": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "a bytearray": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "a key nested 200,000 deep": b"\x80\x02}" + DEEP[2:] + b"Ns.",
    "a class changed": b"\x80\x02cargparse\nNamespace\n}b.",
    "a number called": b"\x80\x02K\x01)R.",
    "out of nothing": b"\x80\x02tR.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_without_memory(name: str) -> None:
    """Each is a few bytes that ask for much, or reach for what is not theirs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="."):
        load(BOMBS[name], KNOWN)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


def test_a_large_memo_takes_no_memory() -> None:
    """Six bytes that make Python's unpickler in C allocate 32 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load(b"\x80\x02Nr\xff\xff\xff\x7f.", KNOWN) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def archive(file: Path, content: Any) -> None:
    torch.save(content, file)


def rewritten(file: Path, compression: int, **changes: bytes) -> None:
    """The archive with its records compressed, or some of them exchanged."""
    with zipfile.ZipFile(file) as old:
        whole = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(file, "w", compression) as new:
        for name, data in whole.items():
            new.writestr(name, changes.get(name.rpartition("/")[2].replace(".", "_"), data))


def test_zip_bombs_are_refused_before_they_unpack(tmp_path: Path) -> None:
    """torch.save compresses nothing: whatever is compressed is refused, and so is a record larger than its file."""
    file = tmp_path / "x.pt"
    archive(file, {"a": torch.zeros(10)})
    rewritten(file, zipfile.ZIP_STORED, data_pkl=bytes(10**6))
    with pytest.raises(UserError, match="x.pt: damaged"):
        read_archive(file)
    archive(file, {"a": torch.zeros(10)})
    rewritten(file, zipfile.ZIP_DEFLATED, **{"0": bytes(30 * 2**20)})
    assert file.stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="x.pt: damaged .*is compressed"):
        read_archive(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KB


def test_a_tensor_is_never_larger_than_its_file(tmp_path: Path) -> None:
    archive(tmp_path / "x.pt", {"a": torch.zeros(1).expand(10**6, 10**6)})
    with pytest.raises(UserError, match="more values than its storage"):
        read_archive(tmp_path / "x.pt")


def test_what_savers_write_beside_tensors_is_read(tmp_path: Path) -> None:
    """Parameters, ordered mappings, types, sizes, arguments; random states of numpy are records."""
    import numpy

    content = {
        "weight": torch.nn.Parameter(torch.randn(3, 4).bfloat16()),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "ordered": collections.OrderedDict(a=torch.arange(5)[1:]),
        "types": [torch.bfloat16, torch.Size((2, 3))],
        "args": Namespace(lr=0.1, params_dtype=torch.float32),
        "rng": numpy.random.get_state(),
    }
    archive(tmp_path / "x.pt", content)
    read = read_archive(tmp_path / "x.pt")
    assert torch.equal(loaded(read["weight"]), content["weight"].data)
    assert torch.equal(loaded(read["ordered"]["a"]), torch.arange(5)[1:])
    assert loaded(read["eight"]).view(torch.uint8).tolist() == content["eight"].view(torch.uint8).tolist()
    assert read["types"] == content["types"]
    assert read["args"].state == {"lr": 0.1, "params_dtype": torch.float32}
    assert isinstance(read["rng"][1], Record)


def test_the_advice_to_load_unsafely_is_never_given(tmp_path: Path) -> None:
    saved = io.BytesIO()
    torch.save({"x": Call(os.mkdir, str(tmp_path / "ran"))}, saved)
    (tmp_path / "x.pt").write_bytes(saved.getvalue())
    with pytest.raises(UserError, match="it names posix.mkdir, which no checkpoint needs") as refusal:
        read_archive(tmp_path / "x.pt")
    assert "weights_only" not in str(refusal.value)
