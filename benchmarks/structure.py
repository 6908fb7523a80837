"""What a training step asks of a GPU: kernels, bytes, fills, casts, counted on fake CUDA tensors. No GPU is used.

`python -m benchmarks structure` starts `benchmarks.fake_cuda`, which loads the device and calls `main` here.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import json
import os
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._library.custom_ops
import triton
from fastarat.kernels.backend import arrivals
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
    "cooperative": {"kernels": "cooperative"},
    "eval": {"bn": "eval"},
    "l2": {"norm": "l2", "epsilon": 128 / 255},
    "restarts": {"num_restarts": 2},
    "unfolded": {"fold_bn": False},
}
"""What a word behind a case's batch size passes to TrainStep."""
CASES = (
    *(f"{name}/resnet18/128" for name in DEFENSES),
    "ar-at/resnet18/512",
    "ar-at/preactresnet18/128",
    "ar-at/wrn-34-10/128",
    "ar-at/resnet18/128/cooperative",
    "ar-at/resnet18/128/awp",
    "ar-at/resnet18/128/l2",
    "ar-at/resnet18/128/restarts",
    "at/resnet18/128/eval",
    "trades/resnet18/128/unfolded",
)
"""defense/model/batch, with words of OPTIONS behind it."""


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

    counting: False only lends torch the fake forms that it lacks.
    Raises: (inside) Fault for what waits for the device or mixes devices; launches.Unpriced.
    """

    def __init__(self, counting: bool = True) -> None:
        super().__init__()
        self.counting = counting
        self.phases: dict[str, Seen] = {}
        self._now = Seen()

    def mark(self, phase: str) -> None:
        if self._now.operations:
            self.phases[phase] = self._now
        self._now = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for thousands of times a step
        if not self.counting:
            return self._of_torch(func, args, kwargs)
        if func.namespace == "aten" and _composite(func.name()):
            # Inside our operations, below autograd, torch leaves taking an operation apart to whoever listens.
            with self:
                return func.decompose(*args, **kwargs)
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
            before, after = (args[0], out) if name == "_to_copy" else (args[1:2], args[0])
            if name in CASTS and _dtypes(before) != _dtypes(after):
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
            raise Fault(f"{place(True)}: {func.name()} works on {' and '.join(sorted(devices))}: expected cuda:0 alone")

    def _of_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return (_FAKES.get(launches.base_name(func)) or func)(*args, **kwargs)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise Fault(
                f"{place(True)}: {func.name()} needs a value that only the device has ({type(error).__name__}: {first})"
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


@functools.cache
def _composite(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


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


def place(line: bool = False) -> str:
    """Who asked for the operation at hand: file, line if wanted, and function; the innermost but torch's and these."""
    frame = inspect.currentframe()
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if not path.startswith((*_NOT_PLACES, "<")):
            shown = os.path.relpath(path, ROOT) if path.startswith(str(ROOT)) else path
            return f"{shown}{f':{frame.f_lineno}' if line else ''} {name}"
        frame = frame.f_back
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
        with Watch(counting=False):
            step(images, labels)
        arrivals(images, 1)  # as a step before this one has made them
        with Watch() as watch:
            step.mark = watch.mark
            step(images, labels)
    return watch


def pretended() -> contextlib.AbstractContextManager[None]:
    """A device, on which cuDNN's fused convolution is there and nobody looks at the model's first logits."""

    def waits(*_: Any) -> None:
        raise Fault(f"{place(True)}: torch.cuda.synchronize waits for the device")

    answers: dict[str, Any] = {f"{guards.__name__}.check_no_probabilities": lambda logits: None}
    answers["torch.cuda.synchronize"] = waits
    asked = [m for m in sys.modules if m.startswith("fastarat.") and hasattr(sys.modules[m], FUSED)]
    answers |= {f"{name}.{FUSED}": lambda device, dtype, kind=None: None for name in asked}
    return fake_cuda.pretended(**answers)


def counted(case: str) -> Watch:
    """Count one case. Raises: UserError for a case that is not understood; Fault, launches.Unpriced."""
    defense, model, batch, *words = case.split("/") if case.count("/") >= 2 else ("", "", "")
    if not batch.isdecimal():
        raise UserError(f"case {case!r}: expected defense/model/batch, such as {CASES[0]}")
    if defense not in DEFENSES:
        raise unknown("defense", defense, [*DEFENSES])
    for word in words:
        if word not in OPTIONS:
            raise unknown("word of a case", word, [*OPTIONS])
    options = {key: value for word in words for key, value in OPTIONS[word].items()}
    with pretended():
        return watched(step_of(DEFENSES[defense](), model, **options), int(batch))


def step_of(defense: fastarat.Defense, model: str = "resnet18", **options: Any) -> fastarat.TrainStep:
    """Build a bf16 step for images 32x32 on the fake device. Inside `pretended`."""
    with torch.device("cuda:0"):
        network = fastarat.build_model(model, num_classes=10)
    if defense.needs_start:
        network.started_from = "memory"  # pyright: ignore[reportArgumentType]
    return fastarat.TrainStep(network, defense, torch.empty(2, 3, 32, 32), capture="off", precision="bf16", **options)


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
    lines = [f"{'kernel':<32}{'kernels':>8}{'GB read':>10}{'written':>10}{'TFLOP':>8}"]
    for name, ones in sorted(by_name.items(), key=lambda item: -sum(x.read + x.written for x in item[1])):
        read, written, flop = (sum(getattr(x, what) for x in ones) for what in ("read", "written", "flop"))
        lines.append(f"{name:<32}{len(ones):>8}{read / 1e9:>10.3f}{written / 1e9:>10.3f}{flop / 1e12:>8.3f}")
    return "\n".join(lines)


def differences(found: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Say in a line each where a case's counts differ from the table's; of fills, casts and layouts, at whose call."""
    said = []
    for name in found:
        if name.endswith("_at"):
            before, now = Counter(committed.get(name, {})), Counter(found[name])
            said += [f"{n} more {name[:-3]} than in the table at {at}" for at, n in (now - before).items()]
            said += [f"{n} fewer {name[:-3]} than in the table at {at}" for at, n in (before - now).items()]
        elif not isinstance(found[name], dict) and found[name] != committed.get(name):
            said.append(f"{name} {found[name]:,}, in the table {committed.get(name, 'none')}")
        elif name == "phases" and found[name] != committed.get(name):
            moved = [p for p in found[name] if found[name][p] != committed.get(name, {}).get(p)]
            said.append(f"in the phases {', '.join(moved)}")
    return said


def main(argv: Sequence[str]) -> int:
    """Count cases. Returns 0, 1 for a fault or (--check) a difference, 2 for a mistake to mend."""
    about = f"Count what a training step asks of a GPU, on a machine without one. {HOW}"
    parser = argparse.ArgumentParser(prog="python -m benchmarks structure", description=about, allow_abbrev=False)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"defense/model/batch[/{'|'.join(OPTIONS)}]")
    parser.add_argument("--out", type=Path, help="JSON to write; cases of it that are not counted now stay")
    parser.add_argument("--check", action="store_true", help=f"hold the counts against {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--kernels", action="store_true", help="print kernels and bytes by name, too")
    args = parser.parse_args(argv)
    committed = json.loads(RESULTS.read_text())["cases"] if args.check else {}
    found: dict[str, Any] = {}
    failed = 0
    try:
        for case in args.cases or CASES:
            watch = counted(case)
            found[case] = record(watch)
            print(f"{case:<32}" + ", ".join(f"{k} {v:,}" for k, v in found[case].items() if not isinstance(v, dict)))
            if args.kernels:
                print(breakdown(watch))
            for line in differences(found[case], committed.get(case, {})) if args.check else ():
                failed = 1
                print(f"  {line}")
    except (Fault, launches.Unpriced) as error:
        print(f"{case}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if args.out:
        write(found, args.out)
        print(f"wrote {args.out}")
    return failed


def write(found: dict[str, Any], out: Path) -> None:
    """Write counts as a result file; what it held of other cases, and its block "before", stay."""
    held = json.loads(out.read_text()) if out.exists() else {}
    of_all = {**held.get("cases", {}), **found}
    made = {
        "format": FORMAT,
        "kind": "structure",
        "torch": torch.__version__,
        "how": HOW,
        "roofline": {"flop_per_s": FLOPS, "bytes_per_s": BANDWIDTH},
        "cases": {case: of_all[case] for case in sorted(of_all, key=lambda c: (c not in CASES, c))},
        **{key: held[key] for key in ("before",) if key in held},
    }
    out.write_text(f"{_laid_out(made, 3)}\n")


def _laid_out(tree: Any, levels: int) -> str:
    """JSON with a line for each entry of the outer levels, so that a change of one number shows as one line."""
    if not isinstance(tree, dict) or not levels:
        return json.dumps(tree)
    lines = [f"{json.dumps(key)}: {_laid_out(value, levels - 1)}" for key, value in tree.items()]
    return "{\n" + textwrap.indent(",\n".join(lines), " ") + "\n}"
