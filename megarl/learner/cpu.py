"""Megatron-Core on the CPU: the "current CUDA device" becomes the CPU. No effect when the learner is on CUDA.

No file of Megatron is edited. We redirect what Megatron calls in torch under CUDA's name: the current device and
stream, the random generator, factories with device="cuda" or pinned memory, `Tensor.cuda()`, and the type names it
compares with. `install` must run before the first `import megatron.core`, which copies some names.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import torch

from megarl.runtime import device

CPU = torch.device("cpu")
cuda: Any = torch.cuda  # Any, because the replacements have other types


def install() -> None:
    """Redirect. No effect when the learner is on CUDA, or the second time."""
    if device.on_cuda() or installed():
        return
    cuda.megarl_shim = True
    if torch.cuda.is_available():
        _hide()
    _devices()
    _random()
    _factories()
    _tensors()


def installed() -> bool:
    """Whether this process's Megatron computes on the CPU."""
    return bool(getattr(torch.cuda, "megarl_shim", False))


def _hide() -> None:
    """Hide a visible CUDA device from Megatron, and packages whose kernels Megatron would prefer to torch's own."""
    cuda.is_available = lambda: False
    for package in ("transformer_engine", "apex"):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # None makes the import fail


def install_experts() -> None:
    """Let Megatron's expert layers run without CUDA and without Transformer Engine; after `import megatron.core`."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # Megatron reads this name but imports it only with Transformer Engine
    if installed() and token_dispatcher.maybe_move_tensor_to_cpu is not _as_splits:
        token_dispatcher.maybe_move_tensor_to_cpu = _as_splits
        mappings._gather_along_first_dim = _uneven_gather(mappings._gather_along_first_dim)
        mappings._reduce_scatter_along_first_dim = _uneven_reduce(mappings._reduce_scatter_along_first_dim)


def _as_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron converts the sizes of an all-to-all to numbers only if they are on a CUDA device."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_gather(even: Any) -> Any:
    """Gloo gathers only equal parts. Unequal ones (tokens of experts split over ranks) use an all-to-all."""

    @functools.wraps(even)
    def gather(part: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even(part, group, None, use_global_buffer)
        sizes = [int(n) for n in output_split_sizes]
        whole = part.new_empty(sum(sizes), *part.shape[1:])
        copies = part.contiguous().repeat(group.size(), *[1] * (part.dim() - 1))
        torch.distributed.all_to_all_single(whole, copies, sizes, [len(part)] * group.size(), group=group)
        return whole

    return gather


def _uneven_reduce(even: Any) -> Any:
    """The same for the sum of unequal parts."""

    @functools.wraps(even)
    def reduce(whole: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even(whole, group, None, use_global_buffer)
        sizes = [int(n) for n in input_split_sizes]
        mine = sizes[group.rank()]
        parts = whole.new_empty(mine * group.size(), *whole.shape[1:])
        torch.distributed.all_to_all_single(parts, whole.contiguous(), [mine] * group.size(), sizes, group=group)
        return parts.view(group.size(), mine, *whole.shape[1:]).sum(0)

    return reduce


class _Stream:
    """A stream or event on which everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or self


class _Generators:
    """`torch.cuda.default_generators`: the CPU's generator for every device."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


def _devices() -> None:
    stream = _Stream()
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.Stream = _Stream
    cuda.stream = contextlib.nullcontext


def _random() -> None:
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda call, **_: call()  # without CUDA, torch would never run the call


def _factories() -> None:
    from torch.utils import _device

    _device._device_constructors()  # caches the originals: `with torch.device("meta")` looks functions up there
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return call


def _means_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


def _tensors() -> None:
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    name_of = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = name_of(self, *args, **kwargs)
        # Megatron's optimizers compare with "torch.cuda.FloatTensor" and similar; only they see that name.
        if not args and not kwargs and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    tensor.type = type_
