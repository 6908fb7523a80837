"""Which of the two twins, Triton or plain PyTorch, serves a tensor, and why."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "plain", "cooperative"]
"""cooperative: Triton, with a BatchNorm that no GPU has proved yet."""
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(device: torch.device | str) -> str | None:
    """Say why tensors on `device` take the plain PyTorch path, or None when they take the Triton kernels.

    device: a device or its name, "cuda:0". The answer is about backend="auto"; it does not launch anything.
    Returns: None, or one sentence for a person to read.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"device {device.type!r}: the Triton kernels need an NVIDIA GPU; plain PyTorch runs instead"
    index = device.index if device.index is not None else -1
    return _why_not_cuda(index)


@functools.cache
def _why_not_cuda(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.version.hip is not None:
        return "the kernels are written and tested for NVIDIA GPUs only, and this is a ROCm build of torch"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'triton>=3.6'"
    capability = torch.cuda.get_device_capability(None if index < 0 else index)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"compute capability {found} is below 8.0 (Ampere), the oldest the kernels are written for"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launchers with a C compiler and finds none: install gcc, or name one in CC"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, where they accept CPU tensors (slowly)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _use_triton(backend: str, device: str) -> bool:
    """Resolve `backend` for a device."""
    if backend == "plain":
        return False
    if backend not in ("auto", "triton"):
        raise ValueError(f"backend={backend!r} is unknown: write 'auto', 'triton' or 'plain' (or try 'cooperative')")
    reason = why_not_triton(device)
    if backend == "auto":
        return reason is None
    if interpreting() and importlib.util.find_spec("triton") is not None:
        return True
    if reason is not None:
        hint = "write backend='auto', or set TRITON_INTERPRET=1 before the first import to interpret them"
        raise ValueError(f"backend='triton' cannot serve this tensor. {reason}; {hint}")
    return True


# torch.compile takes the answer as a constant. This is all that torch.compiler.assume_constant_result does,
# without importing the compiler, and Triton with it, whenever this package is imported.
_use_triton._dynamo_marked_constant = True


def use_triton(backend: Backend, tensor: Tensor, what: str) -> bool:
    """Whether the Triton twin serves `tensor`.

    Raises: ValueError for an unknown backend, or backend="triton" where no kernel can run; TypeError for
    backend="triton" with a dtype the kernels do not have.
    """
    if backend == "auto" and not tensor.is_cuda:
        return False
    if backend == "cooperative":
        backend = "triton"
    supported = tensor.dtype in TRITON_DTYPES
    if backend == "triton" and not supported:
        names = ", ".join(str(d).removeprefix("torch.") for d in TRITON_DTYPES)
        raise TypeError(f"{what} is {tensor.dtype}: the Triton kernels take {names}; write backend='plain'")
    return _use_triton(backend, str(tensor.device)) and supported


Counters = dict[tuple[torch.device, int, int], Tensor]
_counters: Counters = {}
_owned = False


@contextmanager
def own_arrivals() -> Iterator[Counters]:
    """Give launches inside the block counters of their own, which must live as long as a graph captured there."""
    global _counters, _owned
    before = _counters, _owned
    # For the whole process, not for a thread: autograd launches its kernels from threads of its own.
    _counters, _owned = {}, True
    try:
        yield _counters
    finally:
        _counters, _owned = before


def arrivals(like: Tensor, count: int) -> Tensor:
    """Return at least `count` zeros, int32, for a kernel that leaves them at zero again.

    Programs count themselves in there, to know who is last. Launches share them as far as they cannot overlap: those
    on one stream; a graph that others capture, to be replayed on any stream, gets some per launch, zeroed inside it.
    """
    stream = _stream(like.device)
    if stream is None:
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    # None is ever given up for a larger one: a graph may hold it by address.
    size = max(4096, 1 << (count - 1).bit_length())
    key = like.device, stream, size
    if key not in _counters:
        _counters[key] = torch.zeros(size, dtype=torch.int32, device=like.device)
    return _counters[key]


def _stream(device: torch.device) -> int | None:
    """The current stream, or None while somebody captures it without `own_arrivals`."""
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing() and not _owned:
        return None
    return torch.cuda.current_stream(device).cuda_stream
