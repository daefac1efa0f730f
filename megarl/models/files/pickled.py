"""Pickles of others, read as data. Nothing that they name is imported, and nothing of theirs is called.

A pickle is a small program. This reads the part of its language that makes values: numbers, texts, lists, mappings, and
objects of the kinds in an exact list of (module, name). An object is a `Record`, or what a `Maker` of ours makes of its
arguments. Python's unpickler in Python is the base: the one in C keeps its memo in an array, so that six bytes of a
pickle can ask for 32 GB.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from megarl.models.files.regular import short

OPCODES = (
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG1", "FLOAT", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
)  # fmt: skip
_CODES = [getattr(pickle, name)[0] for name in OPCODES]
_PYTHONS: Any = pickle._Unpickler  # type: ignore[attr-defined]


@dataclass(eq=False, slots=True)
class Record:
    """An object as it is written: the name of its class, its arguments, and its state if it has one."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class Maker(NamedTuple):
    """What a name in a pickle makes of its arguments here."""

    make: Callable[..., Any]


Known = Mapping[tuple[str, str], Any]


def records(module: str, *names: str) -> dict[tuple[str, str], Maker]:
    """Classes of `module` whose objects become records."""
    return {(module, name): Maker(lambda *arguments, kind=name: Record(kind, arguments)) for name in names}


DTYPES: Known = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def load(data: bytes, known: Known, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value in a pickle. `known`: each name that may be in it, with its `Maker` or its value.

    `persistent` gets the ids of what is stored beside the pickle. Raises ValueError, in one line, for anything else.
    """
    try:
        return _Unpickler(data, known, persistent).load()
    except EOFError:
        raise ValueError("it ends too early") from None
    except Exception as e:  # of many kinds, because damage can be anywhere
        raise ValueError(short(e) or type(e).__name__) from None


def size(values: Any = ()) -> torch.Size:
    """`torch.Size`, of at most 32 whole numbers."""
    numbers = tuple(values)
    if len(numbers) > 32 or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
        raise ValueError("a size is not a few whole numbers")
    return torch.Size(numbers)


class _Unpickler(_PYTHONS):
    def __init__(self, data: bytes, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._persistent = known, persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise ValueError("it refers to something outside itself")
        return self._persistent(pid)

    def make(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is no class")
        self.append(maker.make(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Record) or target.state is not None:
            raise ValueError("it changes something that is no new object")
        target.state = state

    def set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        self.load_setitem()

    def set_items(self) -> None:
        _check_keys(self.stack[::2])
        self.load_setitems()

    def mapping(self) -> None:
        _check_keys(self.stack[::2])
        self.load_dict()

    def refuse(self) -> None:
        raise ValueError("it has an instruction that no checkpoint needs")

    dispatch: ClassVar[dict[int, Any]] = dict.fromkeys(range(256), refuse)
    dispatch |= dict(zip(_CODES, map(_PYTHONS.dispatch.get, _CODES), strict=True))
    dispatch |= {pickle.REDUCE[0]: make, pickle.NEWOBJ[0]: make, pickle.BUILD[0]: build}
    dispatch |= {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items, pickle.DICT[0]: mapping}


def _check_keys(keys: list[Any]) -> None:
    """Python would hash a deeply nested key until its stack overflows."""
    plain = (str, int, float, bytes, Record, torch.dtype, type(None))
    for key in keys:
        if not all(isinstance(part, plain) for part in (key if isinstance(key, tuple) else (key,))):
            raise ValueError(f"a {type(key).__name__} is a key")
