"""What the step is made of: rates of the machine, convolutions, BatchNorm against its peers, one profile.

Small calls are timed as replays of a CUDA graph of many of them, so that launching them from Python does not count.
Peers that are not installed are skipped by name; none is needed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastarat.kernels import split_bn, stem_applies, stem_input_grad, why_not_triton
from fastarat.optim import SGD
from torch import Tensor, nn

from benchmarks import cases
from benchmarks.ladder import Parser, Setup, first_line, make_step, random_batch
from fastarat import bench
from fastarat.attacks import PGD
from fastarat.bench import Clock, cell, quartiles
from fastarat.device import bf16_support
from fastarat.engine.graphs import no_collection
from fastarat.errors import UserError, unknown
from fastarat.nets.models import build_model

STAGES = ((64, 32), (128, 16), (256, 8), (512, 4))
"""Channels and side of ResNet-18's four stages on 32x32 images."""
PREDICTED_NET_US = {128: (304, 330, 378), 256: (544, 608, 716), 512: (1032, 1168, 1334)}
"""Batch -> microseconds of all of ResNet-18's convolutions (forward, input gradient, weight gradient): a prediction
from tiles, waves and cache traffic for an H200, before any loss of cuDNN's own."""


class Ground(NamedTuple):
    """Where a probe runs. dtype: what the network's convolutions use here. dry: as small as possible."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    dry: bool
    deadline: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


class Skipped(Exception):
    """This probe cannot run here; the text says why."""


def timed(calls: Callable[[], object] | Sequence[Callable[[], object]], on: Ground) -> dict[str, Any]:
    """Time calls that do the same work, each on tensors of its own; seconds of one.

    On a GPU a graph of about two milliseconds' worth of them is replayed; what cannot be captured is timed eagerly,
    and says so.
    """
    calls = [calls] if callable(calls) else list(calls)
    clock = Clock(on.device)
    for call in calls[:3]:
        call()
    took = min(clock(calls[0], 1) for _ in range(3))
    count = max(len(calls), min(200, math.ceil(2e-3 / max(took, 1e-7)))) if on.cuda else 1
    run, per_run, how = _looped(calls, count), count, "eager"
    if on.cuda:
        try:
            run, how = _captured(calls, count, on.device), "graph"
        except RuntimeError as error:
            how = f"eager ({first_line(error)})"
    clock(run, 1)
    samples = [clock(run, 1) / per_run for _ in range(on.repeats)]
    return {"us": quartiles(samples, 1e6), "samples_s": samples, "timed": how, "calls_per_sample": per_run}


def _looped(calls: Sequence[Callable[[], object]], count: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(count):
            calls[i % len(calls)]()

    return run


def _captured(calls: Sequence[Callable[[], object]], count: int, device: torch.device) -> Callable[[], None]:
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with no_collection(), torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            calls[i % len(calls)]()
    return graph.replay


# --- rates ----------------------------------------------------------------------------------------------------------


def rates(on: Ground) -> list[dict[str, Any]]:
    """The machine's matrix and copy rates, and what a graph pays for each small kernel."""
    ceiling = bench.matmul_ceiling(on.device, small=on.dry)
    matmul = timed(ceiling.call, on)
    count = 2**16 if on.dry else 2**28 if on.cuda else 2**25
    source = torch.randn(count, device=on.device)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), on)
    one = torch.zeros(1, device=on.device)
    gap = timed(lambda: one.add_(1), on)
    return [
        {"what": ceiling.name, **matmul, "tflops": ceiling.amount / _median_s(matmul) / 1e12},
        {"what": f"copy of {4 * count / 1e6:.0f} MB", **copied, "gb_per_s": 8 * count / _median_s(copied) / 1e9},
        {"what": "one-element add after another: a kernel and its gap", **gap},
    ]


def _median_s(row: dict[str, Any]) -> float:
    return statistics.median(row["samples_s"])


# --- convolutions ---------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A convolution of a network and how often it occurs."""

    name: str
    cin: int
    cout: int
    kernel: int
    stride: int
    side: int
    count: int = 1

    def flop(self, batch: int) -> float:
        return 2.0 * batch * (self.side // self.stride) ** 2 * self.cout * self.cin * self.kernel**2


def layers_of(model: str) -> list[Layer]:
    """Return the distinct convolutions of a network on 32x32 images, in the order of a forward."""
    network = build_model(model, num_classes=cases.NUM_CLASSES)
    found: dict[tuple[int, ...], Layer] = {}

    def see(name: str, module: nn.Conv2d, inputs: tuple, output: Tensor) -> None:
        key = (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], inputs[0].shape[2])
        known = found.get(key)
        found[key] = Layer(name, *key) if known is None else known._replace(count=known.count + 1)

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(partial(see, name))
    with torch.no_grad():
        network(torch.zeros(2, 3, cases.IMAGE_SIZE, cases.IMAGE_SIZE))
    return list(found.values())


_MASKS = {"input gradient": [True, False, False], "weight gradient": [False, True, False]}


def _conv_calls(layer: Layer, batch: int, dtype: torch.dtype, on: Ground, layout: torch.memory_format):
    pad = layer.kernel // 2
    out = layer.side // layer.stride

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=on.device).to(dtype).contiguous(memory_format=layout)

    x, dy = draw(batch, layer.cin, layer.side, layer.side), draw(batch, layer.cout, out, out)
    w = draw(layer.cout, layer.cin, layer.kernel, layer.kernel)
    stride, padding = [layer.stride] * 2, [pad] * 2

    def backward(mask: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(dy, x, w, None, stride, padding, [1, 1], False, [0, 0], 1, mask)

    return {
        "forward": lambda: F.conv2d(x, w, None, stride, padding),
        **{name: partial(backward, mask) for name, mask in _MASKS.items()},
    }


def convolutions(on: Ground, cudnn: str = "autotuned") -> list[dict[str, Any]]:
    """Each distinct convolution of ResNet-18: forward, input and weight gradient, and their sums over the network."""
    if on.cuda:
        # A plan found one way is kept for the shape, so the two ways never share a process.
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = cudnn == "autotuned", 0
    model, batches = ("resnet-small", (4,)) if on.dry else ("resnet18", (128, 256) if on.cuda else (16,))
    rows = []
    for batch in batches:
        totals: dict[str, float] = {}
        for layer in layers_of(model):
            for op, call in _conv_calls(layer, batch, on.dtype, on, torch.channels_last).items():
                if on.out_of_time:
                    return [*rows, {"what": "out of time"}]
                row = timed(call, on)
                flop = layer.flop(batch)
                name = f"{layer.name} {layer.cin}->{layer.cout} {layer.kernel}x{layer.kernel}/{layer.stride}"
                rows.append(
                    {
                        "what": f"{name}, {op}",
                        "batch": batch,
                        "count": layer.count,
                        "cudnn": cudnn if on.cuda else "no cuDNN",
                        **row,
                        "tflops": flop / _median_s(row) / 1e12,
                    }
                )
                totals[op] = totals.get(op, 0.0) + layer.count * _median_s(row) * 1e6
        predicted = PREDICTED_NET_US.get(batch) if model == "resnet18" else None
        for i, (op, total) in enumerate(totals.items()):
            rows.append(
                {
                    "what": f"all of {model}, {op}",
                    "batch": batch,
                    "cudnn": cudnn if on.cuda else "no cuDNN",
                    "sum_us": total,
                    **({"predicted_us": predicted[i]} if predicted else {}),
                }
            )
    return rows


def both_cudnn_ways(on: Ground) -> list[dict[str, Any]]:
    """Convolutions with cuDNN's first guess (in a process of its own) and with every plan tried."""
    rows = []
    if on.cuda:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "heuristics.json"
            seconds = max(10.0, min(60.0, (on.deadline - time.monotonic()) / 2))
            command = [sys.executable, "-m", "benchmarks", "probe", "conv", "--cudnn", "heuristics", "--out", str(out)]
            command += ["--device", str(on.device), "--repeats", str(on.repeats), "--budget", str(seconds)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 30)
                failure = done.stderr.strip()[-500:] if done.returncode else ""
            except subprocess.TimeoutExpired as error:
                failure = first_line(error)
            if failure:
                rows.append({"what": "cuDNN's first guess", "failed": failure})
            else:
                rows += json.loads(out.read_text())["results"][0]["rows"]
    return rows + convolutions(on)


def stem(on: Ground) -> list[dict[str, Any]]:
    """The stem's input gradient alone, which the attack needs at each step: three channels fit no tile."""
    batch = 4 if on.dry else 128 if on.cuda else 16
    forms = [
        ("as it is", 3, on.dtype, torch.channels_last),
        ("input padded to 8 channels", 8, on.dtype, torch.channels_last),
        ("NCHW", 3, on.dtype, torch.contiguous_format),
        ("float32 channels-last", 3, torch.float32, torch.channels_last),
        ("float32 NCHW", 3, torch.float32, torch.contiguous_format),
    ]
    rows = []
    for name, channels, dtype, layout in forms:
        layer = Layer("stem", channels, 64, 3, 1, cases.IMAGE_SIZE)
        row = timed(_conv_calls(layer, batch, dtype, on, layout)["input gradient"], on)
        needed = Layer("stem", 3, 64, 3, 1, cases.IMAGE_SIZE).flop(batch)
        what = f"{name}, {_name(dtype)}, batch {batch}"
        rows.append({"what": what, **row, "tflops": needed / _median_s(row) / 1e12})
    dy = torch.randn(batch, 64, cases.IMAGE_SIZE, cases.IMAGE_SIZE, device=on.device).to(on.dtype)
    dy, weight = (
        dy.contiguous(memory_format=torch.channels_last),
        torch.randn(64, 3, 3, 3, device=on.device).to(on.dtype),
    )
    ours: dict[str, Any] = {"what": f"fastarat's kernel, {_name(on.dtype)}, batch {batch}"}
    if stem_applies(dy, weight):
        ours |= timed(lambda: stem_input_grad(dy, weight), on)
        ours["tflops"] = needed / _median_s(ours) / 1e12
    else:
        ours["skipped"] = "it is for half precision on a GPU"
    return [*rows, ours]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def folded(on: Ground) -> list[dict[str, Any]]:
    """Convolution, bias and ReLU, as folded attacks have them: two calls against cuDNN's one."""
    if not on.cuda:
        raise Skipped("cudnn_convolution_relu needs a GPU")
    rows = []
    for channels, side in STAGES:
        x = torch.randn(128, channels, side, side, device=on.device).to(on.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randn(channels, channels, 3, 3, device=on.device).to(on.dtype)
        w = w.contiguous(memory_format=torch.channels_last)
        b = torch.randn(channels, device=on.device).to(on.dtype)
        flop = Layer("", channels, channels, 3, 1, side).flop(128)
        for what, call in (
            ("conv + bias, ReLU", lambda x=x, w=w, b=b: torch.relu(F.conv2d(x, w, b, 1, 1))),
            (
                "cudnn_convolution_relu",
                lambda x=x, w=w, b=b: torch.cudnn_convolution_relu(x, w, b, [1, 1], [1, 1], [1, 1], 1),
            ),
        ):
            row: dict[str, Any] = {"what": f"{what}, {channels} channels, {side}x{side}, {_name(on.dtype)}"}
            try:
                row |= timed(call, on)
                row["tflops"] = flop / _median_s(row) / 1e12
            except RuntimeError as error:
                row["failed"] = first_line(error)
            rows.append(row)
    return rows


# --- BatchNorm ------------------------------------------------------------------------------------------------------


def batchnorm(on: Ground) -> list[dict[str, Any]]:
    """BN + residual add + ReLU, forward and backward, at ResNet-18's four stages: ours against its peers.

    Bytes: x, residual, y, dy, x, y, dx, dresidual once each. "warm": one set of tensors again and again, which a cache
    may hold; "cold": sets in turn, together several times a large cache.
    """
    stages = [(8, 8)] if on.dry else STAGES
    batches = (2,) if on.dry else (128, 512) if on.cuda else (16,)
    rows = []
    for batch in batches:
        for channels, side in stages:
            if on.out_of_time:
                return [*rows, {"what": "out of time"}]
            shape = (batch, channels, side, side)
            moved = 8 * math.prod(shape) * on.dtype.itemsize
            fresh = partial(_bn_tensors, shape, on)
            for name, make in _BN_PEERS.items():
                if name == "compiled" and (not on.cuda or batch != batches[0]):
                    continue  # half a minute each on a CPU
                row = {"what": name, "shape": list(shape), "dtype": _name(on.dtype), "bytes": moved}
                rows.append(row)
                try:
                    call = make(channels, on)
                    one = fresh()
                    row |= timed(lambda call=call, one=one: call(*one), on)
                    row["gb_per_s"] = moved / _median_s(row) / 1e9
                    if on.cuda:
                        sets = [fresh() for _ in range(min(64, max(2, math.ceil(512e6 / moved))))]
                        cold = timed([partial(call, *tensors) for tensors in sets], on)
                        row["cold_us"], row["cold_gb_per_s"] = cold["us"], moved / _median_s(cold) / 1e9
                except Skipped as reason:
                    row["skipped"] = str(reason)
                except Exception as error:  # a peer's trouble is its own
                    row["failed"] = first_line(error)
    return rows


def _bn_tensors(shape: tuple[int, ...], on: Ground) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.randn(shape, device=on.device).to(on.dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )


BnCall = Callable[[Tensor, Tensor, Tensor], object]


def _with_gradients(forward: Callable[[Tensor, Tensor], Tensor], parameters: Sequence[Tensor]) -> BnCall:
    def call(x: Tensor, residual: Tensor, dy: Tensor) -> object:
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        return torch.autograd.grad(forward(x, residual), (x, residual, *parameters), dy)

    return call


def _bn_ours(channels: int, on: Ground, groups: int = 1) -> BnCall:
    weight = torch.ones(groups, channels, device=on.device, requires_grad=True)
    bias = torch.zeros(groups, channels, device=on.device, requires_grad=True)
    return _with_gradients(lambda x, r: split_bn(x, weight, bias, r, relu=True).y, (weight, bias))


def _bn_torch(channels: int, on: Ground, compiled: bool = False) -> BnCall:
    norm = nn.BatchNorm2d(channels).to(on.device).train()

    def forward(x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(norm(x) + residual)

    if compiled:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, options={"triton.cudagraphs": False})
    return _with_gradients(forward, (norm.weight, norm.bias))


def _bn_apex(channels: int, on: Ground) -> BnCall:
    if not on.cuda or importlib.util.find_spec("apex") is None:
        raise Skipped("NVIDIA Apex is not installed" if on.cuda else "NVIDIA Apex's BatchNorm needs a GPU")
    try:
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC
    except Exception as error:  # another project owns the name on the package index
        raise Skipped(f"apex.contrib.groupbn does not import ({first_line(error)})") from error
    norm = BatchNorm2d_NHWC(channels, fuse_relu=True).to(on.device).train()

    def call(x: Tensor, residual: Tensor, dy: Tensor) -> object:
        # It takes fp16 [N, H, W, C]; the casts below are views but for the dtype, made once per tensor set.
        x, residual, dy = (_half_nhwc(t) for t in (x, residual, dy))
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        return torch.autograd.grad(norm(x, residual), (x, residual, norm.weight, norm.bias), dy)

    halves: dict[int, Tensor] = {}

    def _half_nhwc(t: Tensor) -> Tensor:
        if id(t) not in halves:
            halves[id(t)] = t.permute(0, 2, 3, 1).half().contiguous()
        return halves[id(t)]

    return call


_BN_PEERS: dict[str, Callable[[int, Ground], BnCall]] = {
    "split_bn, one group": _bn_ours,
    "split_bn, two groups": partial(_bn_ours, groups=2),
    "nn.BatchNorm2d, add, ReLU": _bn_torch,
    "compiled": partial(_bn_torch, compiled=True),
    "Apex groupbn (fp16)": _bn_apex,
}


def batchnorm_backend(on: Ground) -> list[dict[str, Any]]:
    """Which implementation PyTorch picks for nn.BatchNorm2d at each stage."""
    select = getattr(torch._C, "_select_batch_norm_backend", None)
    if select is None:
        raise Skipped("this PyTorch does not say")
    rows = []
    for channels, side in STAGES:
        x = torch.randn(2, channels, side, side, device=on.device).to(on.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        stats = [torch.ones(channels, device=on.device) for _ in range(4)]
        rows.append(
            {
                "what": f"{channels} channels, {side}x{side}, {_name(on.dtype)} channels-last",
                "backend": str(select(x, *stats, True, 1e-5)),
            }
        )
    return rows


# --- optimiser, attack, whole step ----------------------------------------------------------------------------------


def optimisers(on: Ground) -> list[dict[str, Any]]:
    """SGD with momentum and weight decay on ResNet-18: weight and momentum read and written, gradient read.

    Where it says bf16, half as wide a copy of the convolutions' and the classifier's weights is written too.
    """
    model = build_model("resnet-small" if on.dry else "resnet18", num_classes=cases.NUM_CLASSES).to(on.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.randn_like(p)
    moved = 20 * sum(p.numel() for p in parameters)
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4}
    made: dict[str, Callable[[], Any]] = {
        "torch SGD, foreach": lambda: torch.optim.SGD(parameters, lr=1e-3, foreach=True, **options),
        "torch SGD, fused": lambda: torch.optim.SGD(parameters, lr=1e-3, fused=True, **options),
        "torch SGD, fused, rate on the device": lambda: torch.optim.SGD(
            parameters, lr=torch.tensor(1e-3, device=on.device), fused=True, **options
        ),
        "Apex FusedSGD": lambda: _apex_sgd(parameters, options, on),
        "torch SGD, fused, then weights cast to bf16": lambda: _casting_sgd(parameters, options, "plain"),
        "fastarat SGD, bf16 weights in the same pass": lambda: _casting_sgd(parameters, options, "auto"),
    }
    copied = 2 * sum(p.numel() for p in parameters if p.dim() >= 2)
    rows = []
    for name, make in made.items():
        row: dict[str, Any] = {"what": name, "bytes": moved + copied * ("bf16" in name)}
        rows.append(row)
        try:
            row |= timed(make().step, on)
            row["gb_per_s"] = row["bytes"] / _median_s(row) / 1e9
        except Skipped as reason:
            row["skipped"] = str(reason)
        except Exception as error:
            row["failed"] = first_line(error)
    return rows


def _casting_sgd(parameters: list[nn.Parameter], options: dict[str, Any], backend: str) -> SGD:
    optimizer = SGD(parameters, lr=1e-3, backend=backend, **options)
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16, requires_grad=False) for p in parameters if p.dim() >= 2}
    optimizer.keep_copies(copies)
    return optimizer


def _apex_sgd(parameters: list[nn.Parameter], options: dict[str, Any], on: Ground) -> torch.optim.Optimizer:
    if not on.cuda or importlib.util.find_spec("apex") is None:
        raise Skipped("NVIDIA Apex is not installed" if on.cuda else "NVIDIA Apex's FusedSGD needs a GPU")
    try:
        from apex.optimizers import FusedSGD
    except Exception as error:
        raise Skipped(f"apex.optimizers does not import ({first_line(error)})") from error
    return FusedSGD(parameters, lr=1e-3, **options)


def attacks(on: Ground) -> list[dict[str, Any]]:
    """PGD-10 in eval mode and float32 on one network: ours, ours captured, and torchattacks'."""
    name, batch = ("resnet-small", 4) if on.dry else ("resnet18", 128 if on.cuda else 16)
    torch.manual_seed(0)
    model = build_model(name, num_classes=cases.NUM_CLASSES).to(on.device, memory_format=torch.channels_last).eval()
    images, labels = random_batch(batch, on.device)
    images = images.contiguous(memory_format=torch.channels_last)
    options = {"epsilon": cases.EPSILON, "step_size": cases.STEP_SIZE, "num_steps": 2 if on.dry else cases.NUM_STEPS}
    ours = PGD(model, mode="eval", **options)
    eager = on._replace(repeats=min(on.repeats, 5))

    def row(what: str, run: Callable[[], Tensor], timing: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            loss = F.cross_entropy(model(run()), labels).item() - F.cross_entropy(model(images), labels).item()
        return {"what": f"{what}, {name}, batch {batch}", **timing, "loss_increase": loss}

    def attack() -> Tensor:
        return ours(images, labels).images

    rows = [row("fastarat", attack, _eagerly(attack, eager))]
    if on.cuda:
        from fastarat.engine.graphs import capture

        graph = capture(ours, (images, labels), generators=(ours.generator,))
        rows.append(
            row("fastarat, captured", lambda: graph(images, labels).images, _eagerly(lambda: graph(images, labels), on))
        )
    if importlib.util.find_spec("torchattacks") is None:
        return [*rows, {"what": "torchattacks PGD", "skipped": "torchattacks is not installed"}]
    try:
        import torchattacks

        theirs = torchattacks.PGD(
            model, eps=options["epsilon"], alpha=options["step_size"], steps=options["num_steps"], random_start=True
        )
        rows.append(
            row("torchattacks PGD", lambda: theirs(images, labels), _eagerly(lambda: theirs(images, labels), eager))
        )
    except Exception as error:
        rows.append({"what": "torchattacks PGD", "failed": first_line(error)})
    return rows


def _eagerly(call: Callable[[], object], on: Ground) -> dict[str, Any]:
    clock = Clock(on.device)
    call()
    samples = [clock(call, 1) for _ in range(on.repeats)]
    return {"us": quartiles(samples, 1e6), "samples_s": samples, "timed": "call by call", "calls_per_sample": 1}


def profile(on: Ground) -> list[dict[str, Any]]:
    """One AR-AT step as it is trained here, by kernel (by operation on a CPU): which take the time, and the gaps."""
    model, batch, steps = ("resnet-small", 4, 2) if on.dry else ("resnet18", 128 if on.cuda else 16, cases.NUM_STEPS)
    options = {
        "precision": "bf16" if on.dtype == torch.bfloat16 else "fp32",
        "channels_last": True,
        "kernels": "auto",
        "capture": "auto",
        "compile_loss": False,
        "fold": True,
        "optimizer": "fastarat",
    }
    with bench.backend_flags(on.device, options["precision"]):
        step = make_step(Setup("ar-at", model, batch), options, on.device, steps)
        images, labels = random_batch(batch, on.device)
        images = images.contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            step(images, labels)
        events = bench.profiled(lambda: step(images, labels), on.device)
    return profile_rows(events, f"AR-AT, {model}, batch {batch}, {'captured' if not step.why_eager else 'eager'}")


def profile_rows(events: list[bench.Event], what: str, top: int = 20) -> list[dict[str, Any]]:
    """Sum events by name, largest first, after a row on the whole: span, busy time (overlaps counted once), gaps."""
    if not events:
        return [{"what": what, "failed": "the profiler saw nothing"}]
    busy = last = 0.0
    for e in sorted(events, key=lambda e: e.start_us):
        end = e.start_us + e.took_us
        busy += max(0.0, end - max(last, e.start_us))
        last = max(last, end)
    span = last - min(e.start_us for e in events)
    by_name: dict[str, list[float]] = {}
    for e in events:
        by_name.setdefault(e.name, []).append(e.took_us)
    rows = [
        {
            "what": what,
            "events": len(events),
            "span_us": span,
            "busy_us": busy,
            "gap_share": 1 - busy / span if span else 0.0,
            "timed": "under the profiler, which slows the host",
        }
    ]
    for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:top]:
        rows.append({"what": name[:100], "events": len(times), "sum_us": sum(times), "share": sum(times) / busy})
    return rows


PROBES: dict[str, tuple[Callable[[Ground], list[dict[str, Any]]], str]] = {
    "rates": (rates, "matrix product, copy, and a graph's small kernels"),
    "profile": (profile, "one AR-AT step, kernel by kernel"),
    "bn": (batchnorm, "BN + add + ReLU against nn.BatchNorm2d, its compiled form and Apex"),
    "stem": (stem, "the stem's input gradient"),
    "conv": (both_cudnn_ways, "every convolution of ResNet-18, by cuDNN's guess and autotuned"),
    "sgd": (optimisers, "SGD: foreach, fused, Apex"),
    "folded": (folded, "conv + bias + ReLU as one call"),
    "backend": (batchnorm_backend, "what PyTorch picks for nn.BatchNorm2d"),
    "pgd": (attacks, "PGD-10 against torchattacks'"),
}


def main(argv: Sequence[str]) -> int:
    """Run `python -m benchmarks probe`. Returns 1 when a probe failed."""
    names = ", ".join(PROBES)
    parser = Parser(prog="python -m benchmarks probe", description=__doc__, allow_abbrev=False)
    parser.add_argument("probes", nargs="*", metavar="PROBE", help=f"default: all ({names})")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new probe starts")
    parser.add_argument("--repeats", type=int, help="samples (default: 20; 5 on a CPU, 2 dry)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/probe.json"), help="default: %(default)s")
    parser.add_argument("--cudnn", choices=("autotuned", "heuristics"), help="of the probe conv alone (default: both)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes and two samples, to prove the machinery")
    args = parser.parse_args(argv)
    for name in args.probes:
        if name not in PROBES:
            raise unknown("probe", name, PROBES)
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected 1 or more")
    device = bench.pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = args.cudnn != "heuristics", 0
    on = Ground(
        device,
        torch.bfloat16 if bf16_support(device)[0] else torch.float32,
        args.repeats or (2 if args.dry else 20 if cuda else 5),
        args.dry,
        time.monotonic() + args.budget,
    )
    record: dict[str, Any] = {
        "format": bench.FORMAT,
        "kind": "probe",
        "command": shlex.join(["python", "-m", "benchmarks", "probe", *argv]),
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": "random tensors",
        "dry": args.dry,
        "machine": bench.machine(device) | {"kernels": why_not_triton(device) or "Triton"},
        "results": [],
    }
    failed = False
    for name in args.probes or PROBES:
        run, about = PROBES[name]
        if name == "conv" and args.cudnn:
            run = partial(convolutions, cudnn=args.cudnn)
        found: dict[str, Any] = {"probe": name, "about": about}
        try:
            if on.out_of_time:
                raise Skipped("out of time")
            found["rows"] = run(on)
        except Skipped as reason:
            found["skipped"] = str(reason)
        except Exception as error:  # the other probes are worth having
            traceback.print_exc()
            found["failed"], failed = first_line(error), True
        record["results"].append(found)
        bench.write_record(record, args.out)
        print(summary(found), flush=True)
    print(f"wrote {args.out}")
    return int(failed)


def summary(found: dict[str, Any]) -> str:
    """One line per row."""
    state = next((f" {k}: {found[k]}" for k in ("skipped", "failed") if k in found), "")
    lines = [f"{found['probe']}: {found['about']}{state}"]
    return "\n".join([*lines, *(f"  {line(row)}" for row in found.get("rows", ()))])


def line(row: dict[str, Any]) -> str:
    """Say a row in words: every number it holds, with its unit."""
    parts = [str(row["what"])]
    if "shape" in row:
        parts.append("x".join(map(str, row["shape"])))
    if "batch" in row:
        parts.append(f"batch {row['batch']}, {row['cudnn']}")
    for key, text in (
        ("us", lambda q: f"{cell(q)} us"),
        ("sum_us", lambda v: f"{v:,.0f} us in all"),
        ("predicted_us", lambda v: f"predicted for an H200: {v} us"),
        ("tflops", lambda v: f"{v:.3g} TFLOP/s"),
        ("gb_per_s", lambda v: f"{v:,.3g} GB/s"),
        ("cold_us", lambda q: f"cold {cell(q)} us"),
        ("cold_gb_per_s", lambda v: f"cold {v:,.3g} GB/s"),
        ("events", lambda v: f"{v:,} times"),
        ("span_us", lambda v: f"span {v:,.0f} us"),
        ("busy_us", lambda v: f"busy {v:,.0f} us"),
        ("gap_share", lambda v: f"gaps {v:.1%}"),
        ("share", lambda v: f"{v:.1%}"),
        ("loss_increase", lambda v: f"raises the loss by {v:.3g}"),
        ("backend", str),
        ("skipped", lambda v: f"skipped: {v}"),
        ("failed", lambda v: f"failed: {v}"),
    ):
        if key in row:
            parts.append(text(row[key]))
    if row.get("timed", "graph").startswith("eager ("):
        parts.append(row["timed"])
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
