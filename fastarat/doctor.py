"""What this machine will use, and for everything it will not: the reason and the mend (`fastarat doctor`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import timeit
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from fastarat.device import bf16_support

Status = Literal["used", "not used", "missing"]
Found = tuple[Status, str, str]
Look = Callable[[torch.device], Found]

APEX_MEND = (
    "clone https://github.com/NVIDIA/apex and there run "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."
)


class Check(NamedTuple):
    """One part of the machine: "used", "not used" (broken, or not for this device), "missing" (not installed).

    detail: version and what it does here, or the reason it is not used. mend: what to do about it, or "".
    """

    name: str
    status: Status
    detail: str
    mend: str = ""


def diagnose(device: torch.device | str | None = None) -> list[Check]:
    """Return one check per optional speed-up and tool; a broken package is reported, never raised.

    device: the one training would use; default: the first CUDA GPU, else the CPU.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checks = []
    for name, look in PARTS.items():
        try:
            checks.append(Check(name, *look(device)))
        except Exception as error:  # a doctor that dies of the patient's illness helps nobody
            checks.append(Check(name, "not used", f"the check itself failed: {_one_line(error)}"))
    return checks


def render(checks: list[Check]) -> str:
    """Return the checks as aligned plain text, each mend on its own line, and a closing count."""
    width = max(len(c.name) for c in checks)
    lines = []
    for c in checks:
        lines.append(f"{c.name:<{width}}  {c.status:<8}  {c.detail}")
        if c.mend:
            lines.append(f"{'':<{width}}  {'':<8}  -> {c.mend}")
    counts = [f"{sum(c.status == s for c in checks)} {s}" for s in Status.__args__]
    lines.append(f"{', '.join(counts)}. Training works without whatever is not used.")
    return "\n".join(lines)


def _pytorch(device: torch.device) -> Found:
    return "used", f"{torch.__version__}, Python {platform.python_version()}, training on {device}", ""


def _gpu(device: torch.device) -> Found:
    if torch.cuda.is_available():
        shown = torch.cuda.get_device_properties(device if device.type == "cuda" else 0)
        detail = (
            f"{shown.name}, compute capability {shown.major}.{shown.minor}, "
            f"{shown.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {torch.cuda.device_count()} in all"
        )
        if device.type == "cuda":
            return "used", detail, ""
        return "not used", f"{detail}; this run is on {device}", "leave --device out, or give --device cuda"
    if torch.version.cuda is None:
        mend = "on a machine with an NVIDIA GPU, install PyTorch's CUDA build (pytorch.org/get-started)"
        return "not used", "this PyTorch was built without CUDA", mend
    mend = "check that nvidia-smi lists one, that its driver supports this CUDA, and CUDA_VISIBLE_DEVICES"
    return "not used", f"PyTorch was built for CUDA {torch.version.cuda} but finds no usable GPU", mend


def _triton(device: torch.device) -> Found:
    from fastarat.kernels import why_not_triton

    reason = why_not_triton(device)
    version = version_of("triton")
    if reason is None:
        does = "fused split BatchNorm, PGD update, folding, the stem's input gradient"
        return "used", f"{version}: {does}", ""
    if device.type != "cuda":
        return "not used", reason, "run on an NVIDIA GPU; on a CPU the plain PyTorch twins are the fast way"
    return ("not used" if version else "missing"), reason, "pip install 'triton>=3.6' (Linux)"


def _cuda_graphs(device: torch.device) -> Found:
    if device.type == "cuda" and torch.cuda.is_available():
        return "used", "captured once and replayed: the attack, and the whole step where the defense allows", ""
    return "not used", f"{device.type} has no CUDA graphs: steps run eagerly", "run on an NVIDIA GPU"


def _folding(device: torch.device) -> Found:
    from fastarat.kernels import conv_kinds, why_not_fold

    dtype = torch.bfloat16 if bf16_support(device)[0] else torch.float32
    reason = why_not_fold(device, dtype)
    mend = "a newer PyTorch brings a newer cuDNN, which may have it"
    if reason is None:
        detail = "in eval-mode attacks BatchNorm is folded into the convolutions, once per step"
        apart = {} if device.type != "cuda" else {k: why for k, why in conv_kinds(device, dtype).items() if why}
        if not apart:
            return "used", detail, ""
        reasons = "; ".join(f"{kind}: {why}" for kind, why in apart.items())
        return "used", f"{detail}; bias and ReLU apart from some ({reasons})", mend
    return "not used", f"{reason}; eval-mode attacks run the fused BatchNorm instead", mend


def _bf16(device: torch.device) -> Found:
    supported, reason = bf16_support(device)
    if device.type == "cpu":
        reason += f"; here a bf16 convolution takes {_bf16_slowdown():.1f} times as long as a float32 one"
    if supported:
        timed = "; --amp times a training step in both and keeps the faster" if device.type == "cpu" else ""
        return "used", reason + timed, ""
    return "not used", f"{reason}; --amp stays in float32", "a GPU of compute capability 8.0 or newer has it"


def _bf16_slowdown() -> float:
    """Return the time of one small bf16 convolution in units of the float32 one (best of three each)."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        shapes = (8, 32, 16, 16), (32, 32, 3, 3)
        x, weight = (torch.rand(s).to(dtype).contiguous(memory_format=torch.channels_last) for s in shapes)
        walls = timeit.repeat(partial(F.conv2d, x, weight, padding=1), number=1, repeat=4)
        best[dtype] = min(walls[1:])  # the first one chooses and prepares the kernel
    return best[torch.bfloat16] / best[torch.float32]


def _cpu(device: torch.device) -> Found:
    threads = torch.get_num_threads()
    # Those that this process may run on.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{threads} threads on {cores} cores, {capability}; weights and images are channels-last"
    if threads > cores:
        return "used", detail, f"more threads than cores slow each other down: set OMP_NUM_THREADS={cores}"
    if device.type == "cpu" and threads < cores // 2:
        return "used", detail, f"most cores are idle: unset OMP_NUM_THREADS, or set it to {cores}"
    return "used", detail, ""


def _apex(device: torch.device) -> Found:
    instead = "PyTorch's fused SGD is used"
    found = importlib.util.find_spec("apex")
    if found is None:
        mend = APEX_MEND if device.type == "cuda" else "nothing to do on a CPU: FusedSGD needs CUDA"
        return "missing", f"not installed; {instead}", mend
    # The name on the public package index belongs to another project, which has no optimizers.
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not any((folder / "optimizers").exists() or (folder / "optimizers.py").exists() for folder in folders):
        other = f"the installed 'apex' is another project (it has no apex.optimizers.FusedSGD); {instead}"
        return "not used", other, f"pip uninstall apex, then {APEX_MEND}"
    module, problem = _try_import("apex.optimizers")
    if module is None or not hasattr(module, "FusedSGD"):
        return "not used", f"{problem or 'apex.optimizers has no FusedSGD'}; {instead}", APEX_MEND
    applier, problem = _try_import("apex.multi_tensor_apply")
    if applier is None or not applier.multi_tensor_applier.available:
        return "not used", f"{problem or 'installed without its CUDA extensions'}; {instead}", APEX_MEND
    if device.type != "cuda":
        return "not used", f"FusedSGD runs on CUDA only; {instead}", "run on an NVIDIA GPU"
    return "used", f"{version_of('apex')}: FusedSGD", ""


def _autoattack(device: torch.device) -> Found:
    problems = []
    for name in ("pyautoattack", "autoattack"):
        module, problem = _try_import(name)
        if module is not None:
            return "used", f"{version_of(name, module)} ({name}), the authors' code", ""
        problems.append((name, problem))
    broken = [f"{name} {problem}" for name, problem in problems if problem != "not installed"]
    mend = "pip install pyautoattack"
    if broken:
        return "not used", "; ".join(broken), f"{mend} --force-reinstall"
    return "missing", "not installed; clean and PGD accuracy still work", mend


def _package(module: str, use: str, instead: str, mend: str) -> Look:
    """Return the check of a package that is used wherever it imports."""

    def look(device: torch.device) -> Found:
        found, problem = _try_import(module)
        version = version_of(module.split(".")[-1], found)
        if found is not None:
            return "used", f"{version}: {use}", ""
        return ("not used" if version else "missing"), f"{problem}; {instead}", mend

    return look


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """Return the module, or None and one line that says why not."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        # A missing dependency of an installed package raises the same error; only the name tells the two apart.
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return None, "not installed"
        return None, f"is installed but fails to import: {_one_line(error)}"
    except Exception as error:
        return None, f"is installed but fails to import: {_one_line(error)}"


def version_of(package: str, module: ModuleType | None = None) -> str:
    """Return the version of an installed package, or "" when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "of unknown version")) if module is not None else ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


PARTS: dict[str, Look] = {
    "PyTorch": _pytorch,
    "GPU": _gpu,
    "Triton kernels": _triton,
    "CUDA graphs": _cuda_graphs,
    "BN folding": _folding,
    "bf16 (--amp)": _bf16,
    "CPU": _cpu,
    "FFCV": _package(
        "ffcv",
        "streams .beton files and sets too large for the device",
        "the resident loader keeps the data set on the device",
        "apt-get install libopencv-dev libturbojpeg0-dev pkg-config (Debian, Ubuntu), then "
        "pip install 'fastarat[ffcv]'",
    ),
    "NVIDIA Apex": _apex,
    "AutoAttack": _autoattack,
    "timm": _package(
        "timm",
        "--model timm:NAME",
        "the built-in networks need nothing",
        "pip install 'fastarat[timm]'; torch and torchvision must be builds of the same release",
    ),
    "TensorBoard": _package(
        "torch.utils.tensorboard",
        "RUN/tensorboard",
        "metrics.jsonl holds the same numbers",
        "pip install tensorboard",
    ),
}
"""What is looked at, by the name printed before it."""
