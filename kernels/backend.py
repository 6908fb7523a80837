"""Which of the two twins, Triton or plain PyTorch, serves a tensor, and why."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "plain"]
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
        raise ValueError(f"backend={backend!r} is unknown: write 'auto', 'triton' or 'plain'")
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
    supported = tensor.dtype in TRITON_DTYPES
    if backend == "triton" and not supported:
        names = ", ".join(str(d).removeprefix("torch.") for d in TRITON_DTYPES)
        raise TypeError(f"{what} is {tensor.dtype}: the Triton kernels take {names}; write backend='plain'")
    return _use_triton(backend, str(tensor.device)) and supported
