"""Whether a server's clients still live: when one last sent it something, whatever the server, as the kernel knows it.

A node that its scheduler has lost keeps its processes, and a pulled cable closes no connection: only silence tells.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

from megarl.errors import RunError

# Linux's sock_diag(7): connections of one port, each with its tcp_info.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, NLMSG_ERROR, NLMSG_DONE, REQUEST_DUMP = 20, 2, 3, 0x301
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
QUESTION = struct.Struct(
    "=BBBxI2s46x"
)  # family, protocol, extensions, states, source port, the rest of the socket's id
ATTRIBUTE = struct.Struct("=HH")  # length, type
INFO = 2  # the attribute that holds tcp_info
EXTENSIONS = 1 << (INFO - 1)
CONNECTED = 0xFFF & ~(1 << 10)  # every state but listening
CONNECTION = 72  # bytes of an answer before its attributes
LAST_DATA_RECEIVED = 52  # where tcp_info has it, 4 bytes, milliseconds ago
LATE = 10.0  # seconds between two looks that tell that we did not run
ANSWER_DEADLINE = 10.0  # seconds

Silence = Callable[[int], float | None]


def silence(port: int) -> float | None:
    """Seconds since something arrived on a connection of this TCP port; None without a connection. Raises RunError."""
    ages = [age for family in (socket.AF_INET, socket.AF_INET6) for age in _ages(family, port)]
    return min(ages, default=None)


class Idleness:
    """How long no client has sent anything to a port, from now on; look at least once a second.

    Between two looks a connection may come and go unseen, but not one of ours: they stay for `http.KEEP_ALIVE` seconds.
    """

    def __init__(
        self, port: int, deadline: float, *, silence: Silence = silence, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`deadline`: seconds; 0 = none."""
        self.port, self.deadline = port, deadline
        self._silence, self._clock = silence, clock
        self._heard = self._looked = clock()

    def look(self) -> bool:
        """Whether the deadline has passed."""
        if not self.deadline:
            return False
        now = self._clock()
        if now - self._looked > LATE:  # we were stopped ourselves, and heard nobody meanwhile
            self._heard = now
        self._looked = now
        age = self._silence(self.port)
        if age is not None:
            self._heard = max(self._heard, now - age)
        return now - self._heard > self.deadline


def _ages(family: int, port: int) -> Iterator[float]:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(ANSWER_DEADLINE)
            question = QUESTION.pack(family, socket.IPPROTO_TCP, EXTENSIONS, CONNECTED, struct.pack("!H", port))
            size = HEADER.size + len(question)
            kernel.sendto(HEADER.pack(size, SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, 1, 0) + question, (0, 0))
            for kind, message in _messages(kernel):
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", message)[0], "an error of its own")
                for attribute, value in _attributes(message[CONNECTION:]):
                    if attribute == INFO and struct.unpack_from("!H", message, 4)[0] == port:
                        yield struct.unpack_from("=I", value, LAST_DATA_RECEIVED)[0] / 1000
    except OSError as e:
        raise RunError(f"the kernel does not tell the connections of port {port}: {e}; use --idle-timeout 0") from None


def _messages(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """(type, content) until the last one."""
    while True:
        data = kernel.recv(1 << 20)
        while data:
            size, kind, *_ = HEADER.unpack_from(data)
            if kind == NLMSG_DONE:
                return
            yield kind, data[HEADER.size : size]
            data = data[_aligned(size) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        size, kind = ATTRIBUTE.unpack_from(data)
        yield kind, data[ATTRIBUTE.size : size]
        data = data[_aligned(size) :]


def _aligned(size: int) -> int:
    return size + 3 & ~3
