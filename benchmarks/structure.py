"""What a training step asks of a GPU: kernels, bytes, fills, casts, counted on fake CUDA tensors. No GPU is used.

`python -m benchmarks structure` starts `benchmarks.fake_cuda`, which loads the device and calls `main` here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import sysconfig
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from dataclasses import dataclass, field, fields
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastarat
from benchmarks import fake_cuda, launches
from benchmarks.launches import CASTS, FILLS, HOW, Launch
from fastarat.bench.harness import FORMAT
from fastarat.defenses import DEFENSES
from fastarat.engine import guards
from fastarat.errors import UserError, unknown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "structure.json"
FLOPS = 790e12
"""Of a matrix product in bf16, per second: what the roofline takes an H100 or H200 to reach."""
BANDWIDTH = {"h100": 3.0e12, "h200": 4.3e12}
"""Bytes per second."""
FUSED = "why_not_conv_bias_relu"
LARGE = 64 * 1024
"""Elements of a tensor whose layout matters."""
OPTIONS: dict[str, dict[str, Any]] = {
    "awp": {"awp": 0.005},
    "eval": {"bn": "eval"},
    "l2": {"norm": "l2", "epsilon": 128 / 255},
    "restarts": {"num_restarts": 2},
    "unfolded": {"fold_bn": False},
}
"""What a case's fourth word passes to TrainStep."""
CASES = (
    *(f"{name}/resnet18/128" for name in DEFENSES),
    "ar-at/resnet18/512",
    "ar-at/preactresnet18/128",
    "ar-at/wrn-34-10/128",
    "ar-at/resnet18/128/awp",
    "ar-at/resnet18/128/l2",
    "ar-at/resnet18/128/restarts",
    "at/resnet18/128/eval",
    "trades/resnet18/128/unfolded",
)
"""defense/model/batch, with one of OPTIONS behind it."""


class Fault(Exception):
    """Something that a captured step must not do, and where it does it."""


@dataclass
class Seen:
    """What was counted in a phase; fills, casts and misplaced tensors with who asked for them."""

    operations: int = 0
    launches: list[Launch] = field(default_factory=list)
    fills: Counter[str] = field(default_factory=Counter)
    casts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Seen) -> Seen:
        return Seen(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Watch(TorchDispatchMode):
    """Counts what is dispatched inside the block; `mark` books it under the phase that ends.

    Raises: (inside) Fault for what waits for the device or mixes devices; launches.Unpriced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: dict[str, Seen] = {}
        self._now = Seen()

    def mark(self, phase: str) -> None:
        if self._now.operations:
            self.phases[phase] = self._now
        self._now = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not launches.works(func):
            return func(*args, **kwargs)
        self._check_devices(func, args, kwargs)
        self._now.operations += 1
        if func.namespace == "fastarat":
            out = self._ours(func, args, kwargs)
        else:
            out = self._of_torch(func, args, kwargs)
            self._now.launches.extend(launches.aten_launches(func, args, kwargs, out))
            name = launches.base_name(func)
            if name in FILLS:
                self._now.fills[place()] += 1
            if name in CASTS and _dtypes(args[0] if name == "_to_copy" else args[1]) != _dtypes(out):
                self._now.casts[place()] += 1
        for t in _tensors(out):
            if _misplaced(t):
                self._now.layouts[f"{place()}: {func.name()} leaves {list(t.shape)} with strides {t.stride()}"] += 1
        return out

    def _check_devices(self, func: Any, args: Any, kwargs: Any) -> None:
        devices = {str(t.device) for t in _tensors((args, kwargs))}
        if kwargs.get("device") is not None:
            devices.add(str(torch.empty(0, device=kwargs["device"]).device))
        if devices - {"cuda:0"}:
            raise Fault(f"{place()}: {func.name()} works on {' and '.join(sorted(devices))}: expected cuda:0 alone")

    def _of_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return _FAKES.get(launches.base_name(func), func)(*args, **kwargs)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise Fault(
                f"{place()}: {func.name()} needs a value that only the device has ({type(error).__name__}: {first})"
            ) from error

    def _ours(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the body of one of our operations, in which `_caught` sees the launches."""
        promised = func(*args, **kwargs)
        with self, _caught(self._now.launches):
            out = torch._library.custom_ops.OPDEFS[func.name()]._init_fn(*args, **kwargs)
        for kept, said in zip(_tensors(out), _tensors(promised), strict=True):
            if (kept.shape, kept.dtype, kept.stride()) != (said.shape, said.dtype, said.stride()):
                raise Fault(
                    f"{func.name()} returns {kept.dtype} {list(kept.shape)} {kept.stride()}, and its fake form "
                    f"{said.dtype} {list(said.shape)} {said.stride()}"
                )
        return out


def _convolved(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
    stride, padding, dilation, groups = more[-4:]
    return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, (0, 0), groups)


# What torch has no fake form of. The optimiser's changes its tensors in place.
_FAKES: dict[str, Callable[..., Any]] = {
    "_fused_sgd_": lambda *args, **kwargs: None,
    "cudnn_convolution_relu": _convolved,
    "cudnn_convolution_add_relu": _convolved,
}


@contextlib.contextmanager
def _caught(into: list[Launch]) -> Iterator[None]:
    """Write launches of Triton kernels down in place of making them."""

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: into.append(launches.triton_launch(kernel, args, options))

    with mock.patch.object(triton.JITFunction, "__getitem__", launcher):
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _dtypes(tree: Any) -> list[torch.dtype]:
    return [t.dtype for t in _tensors(tree)]


def _misplaced(t: Tensor) -> bool:
    images = t.dim() == 4 and t.shape[1] > 1 and t.shape[2] * t.shape[3] > 1 and t.numel() >= LARGE
    return images and not t.is_contiguous(memory_format=torch.channels_last)


_NOT_PLACES = (
    str(Path(torch.__file__).parent),
    sysconfig.get_path("stdlib"),
    *(str(Path(__file__).with_name(name)) for name in ("fake_cuda.py", "launches.py", "structure.py")),
)


def place() -> str:
    """File and function of the caller's caller that is neither torch nor this: who asked for an operation."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*_NOT_PLACES, "<")):
            path = Path(frame.filename)
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            return f"{shown} {frame.name}"
    return "torch"


def watched(step: fastarat.TrainStep, batch: int, size: int = 32) -> Watch:
    """Run two steps on fake images, the first unseen (it makes the optimiser's buffers). Inside `pretended`.

    Raises: Fault, launches.Unpriced.
    """
    device = step.device
    for group in step.optimizer.param_groups:  # as a captured step has it
        group["lr"] = torch.full((), 0.1, device=device)
    images = torch.rand(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    # In this thread, so that who asked for an operation can be told during the backward, too.
    with torch.autograd.set_multithreading_enabled(False):
        with Watch():
            step(images, labels)
        with Watch() as watch:
            step.mark = watch.mark
            step(images, labels)
    return watch


def built(case: str) -> tuple[fastarat.TrainStep, int]:
    """Return the step of a case, and its batch size. Inside `pretended`. Raises: UserError for a case not understood."""
    words = case.split("/")
    if len(words) not in (3, 4) or not words[2].isdecimal():
        raise UserError(f"case {case!r}: expected defense/model/batch, and perhaps one of {', '.join(OPTIONS)} behind")
    for word, kind, known in ((words[0], "defense", DEFENSES), (words[-1], "option", {**OPTIONS, words[2]: {}})):
        if word not in known:
            raise unknown(kind, word, [*known])
    with torch.device("cuda:0"):
        model = fastarat.build_model(words[1], num_classes=10)
    defense = DEFENSES[words[0]]()
    if defense.needs_start:
        model.started_from = "memory"
    options = OPTIONS.get(words[-1], {})
    step = fastarat.TrainStep(model, defense, torch.empty(2, 3, 32, 32), capture="off", precision="bf16", **options)
    return step, int(words[2])


def _pretended() -> contextlib.AbstractContextManager[None]:
    """A device, on which cuDNN's fused convolution is there and nobody looks at the model's first logits."""
    answers: dict[str, Any] = {f"{guards.__name__}.check_no_probabilities": lambda logits: None}
    asked = [m for m in sys.modules if m.startswith("fastarat.") and hasattr(sys.modules[m], FUSED)]
    answers |= {f"{name}.{FUSED}": lambda device, dtype: None for name in asked}
    return fake_cuda.pretended(**answers)


def count(case: str) -> dict[str, Any]:
    """Count one case. Returns: what `structure.json` holds of it. Raises: Fault, launches.Unpriced, UserError."""
    with _pretended():
        step, batch = built(case)
        return record(watched(step, batch))


def record(watch: Watch) -> dict[str, Any]:
    """Return counts as `structure.json` holds them: rounded so that equal steps give equal numbers."""
    whole = sum(watch.phases.values(), Seen())
    moved: Counter[str] = Counter()
    for launch in whole.launches:
        moved[launch.name] += launch.read + launch.written
    times = Counter(launch.name for launch in whole.launches)
    return {
        **_numbers(whole),
        "phases": {phase: _numbers(seen) for phase, seen in watch.phases.items()},
        "most_bytes": {name: {"kernels": times[name], "gb": round(n / 1e9, 3)} for name, n in moved.most_common(10)},
        **{f"{kind}_at": dict(sorted(getattr(whole, kind).items())) for kind in ("fills", "casts", "layouts")},
    }


def _numbers(seen: Seen) -> dict[str, Any]:
    found: dict[str, Any] = {"operations": seen.operations, "kernels": len(seen.launches)}
    found |= {kind: getattr(seen, kind).total() for kind in ("fills", "casts", "layouts")}
    found["gb"] = round(sum(one.read + one.written for one in seen.launches) / 1e9, 2)
    found["tflop"] = round(sum(one.flop for one in seen.launches) / 1e12, 3)
    for card, bandwidth in BANDWIDTH.items():
        seconds = sum(max((one.read + one.written) / bandwidth, one.flop / FLOPS) for one in seen.launches)
        found[f"{card}_ms"] = round(1e3 * seconds, 2)
    return found



def breakdown(watch: Watch) -> str:
    """Return kernels, GB read and written, and TFLOP by name as lines of text, the most bytes first."""
    by_name: dict[str, list[Launch]] = {}
    for seen in watch.phases.values():
        for one in seen.launches:
            by_name.setdefault(one.name, []).append(one)
    rows = [
        (sum(x.read for x in ones) / 1e9, sum(x.written for x in ones) / 1e9, sum(x.flop for x in ones) / 1e12, name)
        for name, ones in by_name.items()
    ]
    lines = [f"{'kernel':<32}{'kernels':>8}{'GB read':>10}{'written':>10}{'TFLOP':>8}"]
    for read, written, tflop, name in sorted(rows, key=lambda r: -r[0] - r[1]):
        lines.append(f"{name:<32}{len(by_name[name]):>8}{read:>10.3f}{written:>10.3f}{tflop:>8.3f}")
    return "\n".join(lines)
