"""Builds the pool of engines that the settings ask for, of servers that megarl starts or that already run."""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import torch

from megarl.config import Rollout, Servers, Settings
from megarl.errors import UserError
from megarl.models.config_json import read_shape
from megarl.rollout.detokenize import Vocabulary
from megarl.rollout.in_engine import megarl_sglang
from megarl.rollout.servers import local, sglang, vllm
from megarl.rollout.servers.http import Run
from megarl.rollout.servers.pool import Pool
from megarl.rollout.servers.process import LOOPBACK, Command, Server, is_loopback
from megarl.rollout.servers.remote import RemoteEngine
from megarl.rollout.weights.broadcast import BroadcastTransport
from megarl.rollout.weights.disk import DiskTransport
from megarl.rollout.weights.shared_memory import SharedMemoryTransport
from megarl.rollout.weights.transport import CUDA_BUCKET, Transport

ENGINES: dict[str, tuple[type[RemoteEngine], Callable[..., list[str]], Callable[..., dict[str, str]]]] = {
    "sglang": (sglang.SGLangEngine, sglang.command, sglang.environment),
    "vllm": (vllm.VLLMEngine, vllm.command, vllm.environment),
    "local": (local.LocalServerEngine, local.command, local.environment),
}

OWN_FLAGS = {  # of the servers that megarl sets itself, and why
    "--api-key": "every user of the machine may read a command line; name the variable that has the key in "
    "rollout.servers.api_key_env",
    "--host": "megarl's servers listen on loopback; start one for other nodes with `megarl serve --host`",
    "--port": "megarl chooses a free port; start a server on a port of yours with `megarl serve --port`",
    "--fd": "megarl passes the socket itself",
}


def check(rollout: Rollout, learner_devices: int = 0) -> None:
    """Refuse, before anything is started, what the engine cannot do. Raises UserError.

    `learner_devices`: the CUDA devices of this host, from 0, that the learner's ranks use.
    """
    servers = rollout.servers
    if rollout.engine != "sglang" and servers.weight_transport not in ("auto", "disk"):
        raise UserError(
            f"rollout.servers.weight_transport: '{servers.weight_transport}' needs SGLang; "
            f"{rollout.engine} takes 'disk'"
        )
    if rollout.engine == "vllm" and (rollout.top_p < 1 or rollout.top_k > 0):
        name, value, valid = ("top_p", rollout.top_p, "1.0") if rollout.top_p < 1 else ("top_k", rollout.top_k, "0")
        raise UserError(
            f"rollout.{name}: {value}: vLLM returns log-probs after the cut, which training cannot use; "
            f"use {valid}, or rollout.engine: sglang"
        )
    if not servers.addresses and not python_of(rollout).is_file():
        raise UserError(
            f"rollout.servers.python: {python_of(rollout)} does not exist; build it with `make engines`, or name the "
            "interpreter of an environment that has the engine"
        )
    if servers.deterministic and not (rollout.engine == "sglang" and on_cuda(servers)):
        raise UserError(
            "rollout.servers.deterministic: true needs SGLang on CUDA; use false: "
            f"{rollout.engine} on {'CUDA' if on_cuda(servers) else 'a CPU'} has no such mode"
        )
    api_key_of(servers)
    check_flags(servers.flags)
    if not servers.addresses:
        device_share(0, servers, learner_devices)
        shared = sorted(set(servers.devices) & set(range(learner_devices)))
        if shared and on_cuda(servers) and rollout.engine == "sglang" and servers.weight_transport != "disk":
            raise UserError(
                f"rollout.servers.devices: {shared} are the learner's, whose ranks use 0 to {learner_devices - 1}: "
                "NCCL cannot broadcast within a device; name others, or use weight_transport: disk with a small "
                "--mem-fraction-static"
            )
    if servers.attempt_timeout > servers.request_timeout:
        raise UserError(
            f"rollout.servers.attempt_timeout: {servers.attempt_timeout:g} is above request_timeout; "
            f"at most {servers.request_timeout:g}"
        )


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags that expose the key or move the server, and flags joined with their value. Raises UserError."""
    for flag in flags:
        given = flag.partition("=")[0].replace("_", "-")
        for full, advice in OWN_FLAGS.items():
            if len(given) > 4 and full.startswith(given):  # a parser may take the beginning of a flag for the flag
                raise UserError(f"rollout.servers.flags: '{full}': {advice}")
    for flag in flags:
        if together := re.match(r"(-[\w.-]+)\s+(.*)", flag):  # vLLM would start and ignore it
            name, value = together.groups()
            raise UserError(
                f"rollout.servers.flags: '{flag}': a flag and its value are two texts: [{name}, \"{value}\"]"
            )


def build(settings: Settings, vocabulary: Vocabulary, learner_devices: int = 0) -> Pool:
    """The pool for `settings.rollout`. Starts nothing: call its `start`, then use it as an `Engine`.

    `learner_devices`: as of `check`.
    """
    rollout, servers, model = settings.rollout, settings.rollout.servers, settings.model
    check(rollout, learner_devices)
    shape = read_shape(model.path)
    transport = choose_transport(rollout, model.path, dtype_of(settings), settings.run / "weights")
    kind, *_ = ENGINES[rollout.engine]
    routed = (shape.layers, shape.moe.top_k) if shape.moe else None
    key = api_key_of(servers)
    if not servers.addresses:
        key = key or secrets.token_urlsafe(32)  # the machine's other users reach the port too
    places: Sequence[str | Server] = servers.addresses or [
        server(settings, i, f"{rollout.engine}-{i}", key, learner_devices=learner_devices) for i in range(servers.count)
    ]
    run = Run.new(f"{settings.run.resolve()} on {socket.gethostname()}")
    engines = [
        kind(
            place.name if isinstance(place, Server) else place,
            place,
            vocabulary,
            servers,
            vocab_size=shape.vocab,
            routed=routed,
            transport=transport,
            api_key=key,
            run=run,
        )
        for place in places
    ]
    return Pool(engines, transport, servers, tied=shape.tied)


def server(
    settings: Settings,
    index: int,
    name: str,
    api_key: str | None,
    host: str = LOOPBACK,
    port: int = 0,
    *,
    learner_devices: int = 0,
) -> Server:
    """Server `index` of the `servers.count` on this host, not started. It listens on `port` of `host` (0: a free one).

    `learner_devices`: as of `check`.
    """
    rollout, servers = settings.rollout, settings.rollout.servers
    line = command_of(settings, ["--host", host])
    log = settings.run / "logs" / f"{name}.log"
    variables = {**environment_of(rollout, api_key), **device_share(index, servers, learner_devices)}
    takes_socket = rollout.engine == "local"
    return Server(name, line, log=log, environment=variables, host=host, port=port, takes_socket=takes_socket)


def command_of(settings: Settings, more: Sequence[str] = ()) -> Command:
    """A server's command line, given its port. The flags `more` follow those of the settings."""
    rollout, servers, model = settings.rollout, settings.rollout.servers, settings.model
    _, command, _ = ENGINES[rollout.engine]
    deterministic = sglang.deterministic_flags(_blackwell()) if servers.deterministic else []
    flags = [*deterministic, *servers.flags, *more]
    flags += [megarl_sglang.EXPERTS_FLAG] if rollout.engine == "sglang" and rollout.replay_routing else []
    if rollout.engine == "local":
        longest = settings.longest_sequence
        flags += ["--slots", str(rollout.local_max_sequences), "--max-length", str(longest)]
    return partial(
        command,
        python=python_of(rollout),
        model=model.path.resolve(),
        dtype=str(dtype_of(settings)).removeprefix("torch."),
        cuda=on_cuda(servers),
        weights=model.weights,
        flags=flags,
    )


def environment_of(rollout: Rollout, api_key: str | None) -> dict[str, str]:
    """Variables that a server needs in addition to ours."""
    *_, environment = ENGINES[rollout.engine]
    return environment(cuda=on_cuda(rollout.servers), api_key=api_key)


def choose_transport(rollout: Rollout, model: Path, dtype: torch.dtype, folder: Path) -> Transport:
    """The transport that `servers.weight_transport` names.

    `auto`: shared memory for SGLang servers on this host's CPU, a broadcast for other SGLang servers, a folder for vLLM
    and the embedded engine's server.
    """
    servers, cuda = rollout.servers, on_cuda(rollout.servers)
    mode = servers.weight_transport
    if mode == "auto":
        mode = "disk" if rollout.engine != "sglang" else "distributed" if cuda or servers.addresses else "tensor"
    if mode == "disk":
        return DiskTransport(folder, model, dtype)
    if mode == "tensor":
        return SharedMemoryTransport(dtype)
    if cuda:
        return BroadcastTransport(dtype, backend="nccl", address=broadcast_address(servers), bucket=CUDA_BUCKET)
    return BroadcastTransport(dtype, address=broadcast_address(servers))


def broadcast_address(servers: Servers) -> str:
    """The address of this host that the servers dial. Raises UserError if a server's host has no address."""
    if servers.broadcast_address:
        return servers.broadcast_address
    routes = [_route_to(address) for address in servers.addresses]
    return next((route for route in routes if not is_loopback(route)), LOOPBACK)


def _route_to(address: str) -> str:
    """The address from which this host reaches `http://host:port`. Nothing is sent."""
    parts = urlsplit(address)
    try:
        family, kind, *_, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as e:
        raise UserError(
            f"rollout.servers.addresses: {address} cannot be reached: {e.strerror}; name a host that has an address, "
            "or set rollout.servers.broadcast_address"
        ) from None


def python_of(rollout: Rollout) -> Path:
    """The interpreter that runs the servers."""
    default = Path(".engines") / rollout.engine / "bin" / "python"
    return rollout.servers.python or (Path(sys.executable) if rollout.engine == "local" else default)


def dtype_of(settings: Settings) -> torch.dtype:
    """The servers' compute type."""
    return torch.float32 if settings.precision.dtype == "fp32" else torch.bfloat16


def api_key_of(servers: Servers) -> str | None:
    """The key that the settings name, in a variable or a file. None if they name none. Raises UserError."""
    name, file = servers.api_key_env, servers.api_key_file
    if name and file:
        raise UserError("rollout.servers.api_key_file: api_key_env names a key too; name one of them")
    if name:
        if name not in os.environ:
            raise UserError(f"rollout.servers.api_key_env: the variable {name} is not set")
        return _checked_key(f"rollout.servers.api_key_env: the variable {name}", os.environ[name])
    if file:
        return _checked_key(f"rollout.servers.api_key_file: {file}", _read_private(file))
    return None


def _read_private(file: Path) -> str:
    """The text of a file that nobody else can read."""
    place = f"rollout.servers.api_key_file: {file}"
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
            if mode & 0o077:
                raise UserError(f"{place}: others may use it (mode {mode:o}); chmod 600 {file}")
            return opened.read(4096).decode("utf-8", "replace").strip()
    except OSError as e:
        raise UserError(f"{place}: {e.strerror}") from None


def _checked_key(place: str, key: str) -> str:
    if not key:
        raise UserError(f"{place} is empty; write a key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{place}: an HTTP header cannot carry this key; use letters, digits, '-' and '_'")
    return key


def _blackwell() -> bool:
    """Whether this host's devices are of compute capability 10 or more."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10


def on_cuda(servers: Servers) -> bool:
    return servers.device == "cuda" or (servers.device == "auto" and torch.cuda.is_available())


def device_share(index: int, servers: Servers, learner_devices: int = 0) -> dict[str, str]:
    """Variables that give server `index` its share of this host: one thread on a CPU, else some visible devices.

    Raises UserError if the devices do not suffice. `learner_devices`: as of `check`.
    """
    if not on_cuda(servers):
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    if beyond := [number for number in servers.devices if not 0 <= number < len(visible)]:
        raise UserError(
            f"rollout.servers.devices: {beyond[0]}: of the {len(visible)} visible devices the last is "
            f"{len(visible) - 1}"
        )
    devices = [visible[number] for number in servers.devices] or visible[learner_devices:]
    share = len(devices) // servers.count
    if share:
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices[index * share : (index + 1) * share])}
    if devices:
        raise UserError(
            f"rollout.servers.count: {servers.count} servers for {len(devices)} devices; at most {len(devices)}"
        )
    raise UserError(
        f"rollout.servers.devices: the learner's {learner_devices} ranks leave none of this host's {len(visible)} "
        f"devices to the servers; start at most {len(visible) - servers.count} ranks (--nproc), or name servers of "
        "other hosts in rollout.servers.addresses"
    )
