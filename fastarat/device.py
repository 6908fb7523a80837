"""Devices and precision: which is meant, what it computes in, and PyTorch's switches for as long as a block lasts."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from fastarat.errors import UserError

_MARGIN = 0.95
"""bf16 rounds to three digits: it must take less than this share of float32's time to be worth that."""
_ROUNDS = (2, 10)
_CLEAR = 1.4
_BUDGET_S = 1.0  # no round begins, from the third on, that would not be done by then

_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


def pick_device(name: Any) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:N", N or a device into a device; a CUDA one has its number.

    Raises: UserError for another name, and for a device this machine has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(name, int) and not isinstance(name, bool) and name >= 0:
        name = f"cuda:{name}"
    given = str(name) if isinstance(name, torch.device) else name
    try:
        if not isinstance(name, (str, torch.device)):
            raise TypeError
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {' '.join(repr(given).split()):.80}: expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {given!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {given!r}: this machine has {torch.cuda.device_count()} CUDA device(s); use cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # what torch.cuda.set_device and others insist on
    return device


def readable(tensor: Tensor) -> bool:
    """Whether values may be read: not while a CUDA graph is captured or code compiled, nor where there are none."""
    if torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False
    return not tensor.is_meta and detect_fake_mode([tensor]) is None


def waits(tensor: Tensor) -> bool:
    """Whether reading values makes the host wait for a device: then once per shape must do; a CPU's are always read."""
    return tensor.is_cuda


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raise UserError for a tensor that lies elsewhere than the model."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise UserError(f"{name} are on {tensor.device}, the model on {device}: write {name}.to({str(device)!r})")


def bf16_support(device: torch.device | str) -> tuple[bool, str]:
    """Return whether `device` computes bf16 in hardware, and the reason in words.

    Where it does not, `--amp` must stay in float32: emulated bf16 convolutions are many times slower than float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return False, "no usable CUDA GPU"
        major, minor = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if supported:
            return True, f"compute capability {major}.{minor} multiplies bf16 in hardware"
        return False, f"compute capability {major}.{minor} has no bf16 arithmetic (8.0 and newer have)"
    if device.type == "cpu":
        sets = _cpu_bf16_sets()
        if sets:
            return True, f"the CPU has {' and '.join(sets)}"
        return False, "the CPU has neither AVX512_BF16 nor AMX, so bf16 would be emulated"
    return False, f"bf16 training on {device.type} is untested"


def _cpu_bf16_sets() -> list[str]:
    """Return the x86 instruction sets with which oneDNN multiplies bf16."""
    known = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX"}
    report = getattr(torch.cpu, "get_capabilities", None)  # not in every supported PyTorch
    if report is not None:
        found = {name for name, present in report().items() if present is True}
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text() if info.exists() else ""
        found = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
    return [label for flag, label in known.items() if flag in found]


def usable_precision(precision: str, device: torch.device, *, why: str = "") -> tuple[str, str]:
    """Return the precision to run in and why. bf16 or fp16 without hardware support stays in float32.

    why: what chose float32 or bf16, if not the user.
    """
    if precision == "fp32":
        return "fp32", f"float32 ({why or 'asked for; --amp for bf16 where that is faster'})"
    if precision == "tf32":
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
            return "tf32", "TF32 convolutions, float32 elsewhere"
        return "fp32", "float32: TF32 needs a CUDA GPU of compute capability 8 or more"
    if precision == "fp16":
        if device.type == "cuda":
            return "fp16", "fp16 convolutions with loss scaling; statistics and losses float32"
        return "fp32", "float32: fp16 training needs a CUDA GPU"
    able, reason = bf16_support(device)
    if not able:
        return "fp32", f"float32, because bf16 would be slower here: {reason}"
    if not why and device.type == "cpu":  # which may still be quicker in float32: nobody has looked
        why = "asked for; --amp only where that is faster"
    return "bf16", f"bf16 convolutions{f' ({why})' if why else ''}; statistics and losses float32"


def fastest_precision(
    device: torch.device,
    build: Callable[[str], Callable[[], object]],
    *,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[str, str]:
    """Return what `--amp` computes in, and why: bf16, but on a CPU only where a training step is faster in it.

    There both are timed in turn and the least of each is compared; without bf16 in hardware, and on a GPU, neither is.

    build: returns a call of the whole step in "fp32" or "bf16", on a batch as large as in training; the first call of
    each counts only where a step takes long and one is far ahead. clock: seconds. say: told that timing begins.
    """
    if device.type != "cpu" or not bf16_support(device)[0]:
        return usable_precision("bf16", device)
    say("--amp: timing a training step in float32 and in bf16")
    began = clock()
    names = ("fp32", "bf16")
    calls = {name: build(name) for name in names}
    least: dict[str, float] = dict.fromkeys(names, math.inf)
    rounds = 0

    def time_once(name: str) -> None:
        start = clock()
        calls[name]()
        least[name] = min(least[name], clock() - start)

    for name in names:  # chooses and prepares the kernels
        time_once(name)
    low, high = sorted(least.values())
    first, (fewest, most) = clock(), _ROUNDS
    if low > _BUDGET_S and high > _CLEAR * low:
        fewest = most = 0  # of steps this long, what is prepared at the first is a small part
    else:
        least = dict.fromkeys(names, math.inf)
    while rounds < fewest or (rounds < most and (clock() - first) * (rounds + 1) / rounds <= _BUDGET_S):
        # Side by side, and each first in every other round, so that what else the machine does meets both.
        for name in names[:: -1 if rounds % 2 else 1]:
            time_once(name)
        rounds += 1
    found = f"here a step takes {_seconds(least['bf16'])} in bf16 and {_seconds(least['fp32'])} in float32"
    timed = f"{f'the least of {rounds}' if rounds else 'once'}, timed in {_seconds(clock() - began)}"
    if least["bf16"] < _MARGIN * least["fp32"]:
        return usable_precision("bf16", device, why=f"--amp: {found}, {timed}")
    little = f", less than {1 - _MARGIN:.0%} faster" if least["bf16"] < least["fp32"] else ""
    return "fp32", f"float32: --amp was asked for, but {found}{little} ({timed})"


def _seconds(duration: float) -> str:
    """34 ms, 5.13 ms, 2.36 s: at most three digits."""
    return f"{1e3 * duration:.3g} ms" if duration < 0.9995 else f"{duration:.3g} s"


@contextmanager
def switched(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes of `owner` these values inside the block, and put the old ones back."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def backend_flags(device: torch.device, precision: str, cudnn_plans: int = 10) -> Iterator[None]:
    """Set what a CUDA device trains with inside the block: TF32 unless `precision` is fp32, and cuDNN's autotuning.

    cudnn_plans: plans that autotuning times per convolution (0: all). PyTorch remembers the winners as long as the
    process lives, by shape and not by this number: whoever trains twice in one process searches once.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul, tf32 = torch.backends.cudnn, torch.backends.cuda.matmul, precision != "fp32"
    products = {"allow_tf32": tf32, "fp32_precision": "tf32" if tf32 else "ieee"}
    # The older TF32 switches too, since others read them, and PyTorch raises where only the newer ones were set.
    with (
        switched(matmul, **products),
        switched(cudnn, allow_tf32=tf32, benchmark=True, benchmark_limit=cudnn_plans),
    ):
        yield


@contextmanager
def float32_flags(tf32: bool) -> Iterator[None]:
    """Make float32 arithmetic exact inside the block, or TF32 on CUDA where `tf32` says so, whatever the caller set."""
    b, cuda = torch.backends, "tf32" if tf32 else "ieee"
    with (
        switched(b.cuda.matmul, fp32_precision=cuda),
        switched(b.cudnn.conv, fp32_precision=cuda),
        switched(b.mkldnn.matmul, fp32_precision="ieee"),
        switched(b.mkldnn.conv, fp32_precision="ieee"),
    ):
        yield


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on this many CPU threads inside the block; None leaves PyTorch's choice.

    Raises: UserError for more than eight times the machine's cores.
    """
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    if count is not None and count > 8 * cores:
        raise UserError(
            f"threads={count}: this machine has {cores} core(s), and more threads than cores slow it "
            f"down; write --threads {cores} or leave it out"
        )
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seeded_apart(device: torch.device) -> AbstractContextManager:
    """Return a context that gives PyTorch's global generators back as they were, whatever is seeded inside."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class OutOfMemory(UserError):
    """The memory did not suffice."""


@contextmanager
def enough_memory(batch_size: int, kept: str = "") -> Iterator[None]:
    """Turn what PyTorch and NumPy raise for want of memory, of the device or the host, into OutOfMemory.

    It names a batch size to try. kept: what to say beside it.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and not _MEMORY.search(text):
            raise
        tried = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", text)
        wanted = f" ({tried[1]} more were asked for)" if tried else ""
        smaller = f"try batch_size={batch_size // 2}, or" if batch_size >= 4 else "try"
        more = f"; {kept}" if kept else ""
        raise OutOfMemory(
            f"out of memory with batch_size={batch_size}{wanted}: {smaller} a smaller network or smaller images{more}"
        ) from error
