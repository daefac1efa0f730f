"""How long a server's port has received nothing. The kernel knows, so this works for any server.

A node that its scheduler has lost keeps its processes, and a pulled cable closes no connection. Only the time since the
last data tells.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

from megarl.errors import RunError

# Linux's sock_diag(7): lists the connections of one port, each with its tcp_info.
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, NLMSG_ERROR, NLMSG_DONE, REQUEST_DUMP = 20, 2, 3, 0x301
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
# family, protocol, extensions, states, source port, the rest of the socket's id
REQUEST = struct.Struct("=BBBxI2s46x")
ATTRIBUTE = struct.Struct("=HH")  # length, type
INFO = 2  # the attribute with tcp_info
EXTENSIONS = 1 << (INFO - 1)
CONNECTED = 0xFFF & ~(1 << 10)  # every state but listening
CONNECTION = 72  # bytes of an answer before its attributes
LAST_DATA_RECEIVED = 52  # offset in tcp_info: 4 bytes, milliseconds ago
SUSPENDED = 10.0  # seconds between two checks after which this process itself must have been stopped
KERNEL_TIMEOUT = 10.0  # seconds


def seconds_since_data(port: int) -> float | None:
    """Seconds since data arrived on a connection of this TCP port. None without a connection. Raises RunError."""
    ages = [age for family in (socket.AF_INET, socket.AF_INET6) for age in _ages(family, port)]
    return min(ages, default=None)


class IdleTimer:
    """Expires when a port has received nothing for `timeout` seconds (0: never). Check it at least once a second.

    A connection may come and go unseen between two checks, but not one of ours: they stay for `http.KEEP_ALIVE` s.
    """

    def __init__(
        self,
        port: int,
        timeout: float,
        *,
        age: Callable[[int], float | None] = seconds_since_data,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.port, self.timeout = port, timeout
        self._age, self._clock = age, clock
        self._last_data = self._last_check = clock()

    def expired(self) -> bool:
        if not self.timeout:
            return False
        now = self._clock()
        if now - self._last_check > SUSPENDED:  # we could see no data meanwhile
            self._last_data = now
        self._last_check = now
        age = self._age(self.port)
        if age is not None:
            self._last_data = max(self._last_data, now - age)
        return now - self._last_data > self.timeout


def _ages(family: int, port: int) -> Iterator[float]:
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(KERNEL_TIMEOUT)
            request = REQUEST.pack(family, socket.IPPROTO_TCP, EXTENSIONS, CONNECTED, struct.pack("!H", port))
            size = HEADER.size + len(request)
            kernel.sendto(HEADER.pack(size, SOCK_DIAG_BY_FAMILY, REQUEST_DUMP, 1, 0) + request, (0, 0))
            for kind, message in _messages(kernel):
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", message)[0], "netlink error")
                for attribute, value in _attributes(message[CONNECTION:]):
                    if attribute == INFO and struct.unpack_from("!H", message, 4)[0] == port:
                        yield struct.unpack_from("=I", value, LAST_DATA_RECEIVED)[0] / 1000
    except OSError as e:
        raise RunError(f"the kernel does not list the connections of port {port}: {e}; use --idle-timeout 0") from None


def _messages(kernel: socket.socket) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each message before the end."""
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
