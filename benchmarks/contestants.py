"""Who runs in pairs: fast and plain forms of a step, an attack, a kernel or a loader; what a GPU is asked first."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from fastarat.kernels import split_bn, why_not_triton
from torch import Tensor, nn

from benchmarks import gates, layers, plain
from benchmarks.gates import IMAGE_SIZE, NUM_CLASSES, Setup, Unavailable, engine_step, released_loop
from fastarat.bench.bench import forward_flops
from fastarat.bench.harness import Clock, Contestant, Equality, Marks
from fastarat.data import Augment, Split, beton, make_loader
from fastarat.device import bf16_support, switched
from fastarat.engine.graphs import capture
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.specs import Fast

STEP_FORWARDS = 2 * gates.NUM_STEPS + 6
"""Forward-equivalents of an AR-AT step: each attack step a forward and an input gradient, then both halves' 3."""
PHASES = ("attack", "forward", "backward", "optimiser", "metrics")


@dataclass(frozen=True)
class Work:
    """How much one call does: `amount` of `unit`; no credit for work that only one side does."""

    amount: float
    unit: Literal["FLOP", "byte", "image", "kernel"]


class Pairs(NamedTuple):
    """Contestants that do the same work: each of `fast` is compared with `plain`, which is timed once a round."""

    plain: Contestant
    fast: Sequence[Contestant]
    work: Work


class Case(NamedTuple):
    """Named pairs. long: whole steps, for which fewer rounds are enough. first: asked in `first`."""

    name: str
    help: str
    prepare: Callable[[Setup], Pairs]
    long: bool = False
    first: bool = False


def _network_info(setup: Setup, step: TrainStep, flops: int, forwards: int) -> dict[str, Any]:
    return {
        "what": f"{setup.model}, {setup.batch_size} images {IMAGE_SIZE}x{IMAGE_SIZE}, PGD-{setup.num_steps}",
        "baseline": plain.STRUCTURE,
        "precision": setup.precision,
        "images": [setup.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE],
        "fast": f"{setup.precision}, channels-last, {why_not_triton(setup.device) or 'Triton kernels'}",
        "plain": "float32 NCHW, PyTorch's defaults, two forwards, host reads, input gradients only in the attack"
        + (", TF32 convolutions" if setup.device != "cpu" else ""),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "captured": not step.why_eager,
        "epsilon": gates.EPSILON,
        "step_size": gates.STEP_SIZE,
        "num_steps": setup.num_steps,
        "forward_flop_per_image": flops,
        "forwards_per_image": forwards,
    }


def _released(setup: Setup, marks: Marks | None = None) -> Contestant:
    """The released structure's step. A copy of the batch: the loop leaves its noise in it, and a loader's is new."""
    loop, batch = released_loop(setup), gates.random_batch(setup)

    def call() -> float:
        if marks is None:
            return loop(batch.images.clone(), batch.labels)
        marks("start")
        return loop(batch.images.clone(), batch.labels, mark=marks)

    return Contestant("plain", lambda: call, marks=marks)


def _step(setup: Setup, marks: Marks | None = None) -> tuple[Contestant, Work]:
    fast = Fast(precision=setup.precision, capture="auto" if marks is None else "off")
    step, batch = engine_step(setup, fast), gates.random_batch(setup)
    images = batch.laid_out(channels_last=True)
    flops = forward_flops(step.model, batch.images[:1])

    def check() -> Equality:
        if marks is None:
            return gates.check_step(setup)
        seen: list[str] = []
        step.mark = seen.append
        step(images, batch.labels)
        step.mark = marks
        return gates.check_step(setup) | {"phases that were not met": (len({*PHASES} - {*seen}), 0)}

    info = _network_info(setup, step, flops, STEP_FORWARDS)
    if marks is not None:
        info["fast"] += ", eager"
    call = partial(step, images, batch.labels)
    one = Contestant(setup.precision, lambda: call, check, info=info, precision=setup.precision, marks=marks)
    return one, Work(STEP_FORWARDS * flops * setup.batch_size, "FLOP")


def _arat_step(setup: Setup) -> Pairs:
    """fastarat in float32 and in bf16, unless one precision is asked for, against one loop."""
    able, why = bf16_support(setup.device)
    missing = f"no bf16 row: {why}"
    if setup.precision == "bf16" and not able:
        raise Unavailable(missing)
    # Both precisions are held against one loop, timed once a round: two baselines would differ by the machine's mood.
    base = _released(setup)
    # On a GPU the loop's convolutions are in TF32, PyTorch's default: the engine's float32 there is the same.
    single, work = _step(replace(setup, precision=setup.precision or ("fp32" if setup.device == "cpu" else "tf32")))
    fast = [single]
    if not setup.precision:
        skipped = Contestant("bf16", single.build, skipped=missing)
        fast.append(_step(replace(setup, precision="bf16"))[0] if able else skipped)
    return Pairs(base, fast, work)


def _phases(setup: Setup) -> Pairs:
    setup = setup.settled
    ours, theirs = (Marks(torch.device(setup.device)) for _ in "ab")
    fast, work = _step(setup, ours)
    return Pairs(_released(setup, theirs), [fast], work)


def _pgd10(setup: Setup) -> Pairs:
    setup = setup.settled
    step = engine_step(setup, Fast(precision=setup.precision))
    loop, batch = released_loop(setup), gates.random_batch(setup)
    flops, forwards = forward_flops(step.model, batch.images[:1]), 2 * setup.num_steps
    fast = Contestant(
        setup.precision,
        lambda: partial(step.attack, batch.laid_out(channels_last=True), batch.labels),
        lambda: gates.check_attack(setup),
        info=_network_info(setup, step, flops, forwards) | {"mode": "train"},
        precision=setup.precision,
    )
    # From the images themselves: ours, too, is given the noisy batch and draws no noise.
    options = {"epsilon": gates.EPSILON, "step_size": gates.STEP_SIZE, "num_steps": setup.num_steps}
    noise = torch.zeros_like(batch.images)
    network = loop.model.train()
    base = Contestant("plain", lambda: partial(plain.pgd, network, *batch, noise=noise, **options))
    return Pairs(base, [fast], Work(forwards * flops * setup.batch_size, "FLOP"))


def _split_bn(setup: Setup) -> Pairs:
    setup = setup.settled
    device = torch.device(setup.device)
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    shape = (setup.batch_size, 8 if setup.dry else 64, IMAGE_SIZE, IMAGE_SIZE)
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    # Per half: input, residual, gradient of the output. The plain loop holds the halves apart, as it makes them.
    halves = [[draw(*shape) for _ in range(3)] for _ in range(2)]
    norms = [nn.BatchNorm2d(shape[1]).to(device).train() for _ in range(2)]
    with torch.no_grad():
        for norm, (x, residual, _) in zip(norms, halves, strict=True):
            norm.weight.copy_(draw(shape[1]))
            norm.bias.copy_(draw(shape[1]))
            # At its kink the ReLU lets rounding decide whether a gradient passes: no sum may lie there.
            residual[(norm(x) + residual).abs() < 1e-4] += 1e-3
    parameters = [torch.stack([getattr(n, p).detach() for n in norms]).requires_grad_() for p in ("weight", "bias")]

    def laid_out(dtype: torch.dtype) -> list[Tensor]:
        pairs = zip(*halves, strict=True)
        return [torch.cat(pair).to(dtype, memory_format=torch.channels_last) for pair in pairs]

    def fast(x: Tensor, residual: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y, mean, _ = split_bn(x, *parameters, residual, relu=True)
        return y.detach(), *torch.autograd.grad(y, (x, residual, *parameters), dy), mean

    def theirs() -> list[tuple[Tensor, ...]]:
        outputs = []
        for norm, (x, residual, dy) in zip(norms, halves, strict=True):
            x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
            y = torch.relu(norm(x) + residual)
            outputs.append((y.detach(), *torch.autograd.grad(y, (x, residual, norm.weight, norm.bias), dy)))
        return outputs

    def check() -> Equality:
        ours, both = fast(*laid_out(torch.float32)), theirs()
        found = {}
        for i, name in enumerate(("output", "input gradient", "residual gradient", "weight gradient", "bias gradient")):
            wanted = torch.cat([o[i] for o in both]) if i < 3 else torch.stack([o[i] for o in both])
            found[f"float32: {name}, relative"] = ((ours[i] - wanted).norm() / wanted.norm()).item(), 1e-4
        return found

    own = laid_out(dtype)
    info = {
        "what": f"2 x {list(shape)}, BN + add + ReLU, forward and backward, {str(dtype).removeprefix('torch.')}",
        "bytes": "x, residual, y, dy, x, y, dx, dresidual once each, in the fast side's dtype",
        "fast": f"channels-last, {why_not_triton(device) or 'Triton kernels'}",
        "plain": "two nn.BatchNorm2d, float32 NCHW",
        "precision": setup.precision,
    }
    one = Contestant("fast", lambda: partial(fast, *own), check, info=info, precision=setup.precision)
    return Pairs(Contestant("plain", lambda: theirs), [one], Work(8 * own[0].numel() * own[0].element_size(), "byte"))


def _loader(setup: Setup, kind: Literal["resident", "ffcv"]) -> Pairs:
    device = torch.device(setup.device)
    count, batch_size = (64, 16) if setup.dry else (10_240, 128)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    labels = random.integers(0, NUM_CLASSES, count)
    pixels, path = torch.from_numpy(images), None
    if kind == "ffcv":
        path, pixels = Path(tempfile.mkdtemp()) / "train.beton", None
        try:
            beton.write(path, images, labels)
        except UserError as error:
            raise Unavailable(str(error)) from error
    split = Split(pixels, torch.from_numpy(labels), torch.arange(count), (3, IMAGE_SIZE, IMAGE_SIZE), path)
    ours = partial(make_loader, split, batch_size=batch_size, device=device, kind=kind)
    # More workers than cores slow a CPU's loader down, and eight are what research code usually asks for.
    workers = 0 if setup.dry else 2 if device.type == "cpu" else 8

    def theirs(shuffle: bool, padding: int, flip: bool) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            plain.Images(images, labels, padding, flip),
            batch_size,
            shuffle=shuffle,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    fast_loader, plain_loader = ours(shuffle=True, augment=Augment(padding=4, flip=True)), theirs(True, 4, True)
    epoch = iter(range(10**9))

    def fast() -> None:
        for _ in fast_loader.epoch(next(epoch)):
            pass

    def slow() -> None:
        for _ in plain.batches(plain_loader, device):
            pass

    def check() -> Equality:
        worst, seen = 0.0, 0
        unchanged = plain.batches(theirs(False, 0, False), device)
        for batch, (images, labels) in zip(ours().epoch(0), unchanged, strict=True):
            worst = max(worst, (batch.images - images).abs().max().item(), (batch.labels - labels).abs().max().item())
            seen += len(images)
        return {"unshuffled, not augmented: pixels and labels": (worst, 1e-7), "images missing": (count - seen, 0)}

    info = {
        "what": f"an epoch of {count} images {IMAGE_SIZE}x{IMAGE_SIZE}, batches of {batch_size}, crop and flip",
        "fast": f"{kind} loader",
        "plain": f"torch DataLoader over PIL images, {workers} persistent workers (their memory is not counted)",
    }
    one = Contestant("fast", lambda: fast, check, info=info)
    return Pairs(Contestant("plain", lambda: slow), [one], Work(count, "image"))


def _captured(setup: Setup) -> Pairs:
    """The step as one CUDA graph (on a CPU the fake one), and the seconds that cuDNN's autotuning takes before it."""
    setup = setup.settled
    precision = setup.precision if bf16_support(setup.device)[0] else "fp32"
    setup = replace(setup, precision=precision)
    batch = gates.random_batch(setup)
    images = batch.laid_out(channels_last=True)
    fast = Fast(precision=precision, capture="fake" if setup.device == "cpu" else "on")
    eager = replace(fast, capture="off")
    clock, untuned = Clock(torch.device(setup.device)), engine_step(setup, replace(eager, kernels="plain"))
    # Two images first, untuned: loading the libraries is not what is asked for.
    with switched(torch.backends.cudnn, benchmark=False):
        untuned(images[:2].contiguous(memory_format=torch.channels_last), batch.labels[:2])
    first, second = (clock(lambda: untuned(images, batch.labels), 1) for _ in "ab")
    step = engine_step(setup, fast)
    flops = forward_flops(step.model, images[:1])
    info = _network_info(setup, step, flops, STEP_FORWARDS)
    plans = torch.backends.cudnn.benchmark_limit
    info |= {"baseline": "fastarat, eager", "plain": "the same step, eager", "autotuning_s": first - second}
    info["cudnn_plans"] = plans
    info["what"] += f", {plans or 'all'} plans of cuDNN timed" if setup.device != "cpu" else ""
    call, check = partial(step, images, batch.labels), partial(gates.check_captured, setup, fast)
    one = Contestant("fast", lambda: call, check, info=info, precision=precision)
    base = Contestant("plain", lambda: partial(engine_step(setup, eager), images, batch.labels))
    return Pairs(base, [one], Work(STEP_FORWARDS * flops * setup.batch_size, "FLOP"))


def _conv_relu(setup: Setup) -> Pairs:
    """Convolution, bias, add and ReLU as folded attacks have them, two or three calls against one: every layer tried.

    Those that fail are a finding, not a failure: the network then runs them as calls of their own.
    """
    if setup.device == "cpu":
        raise Unavailable("cudnn_convolution_relu needs a GPU")
    setup = setup.settled
    dtype, device = torch.bfloat16 if setup.precision == "bf16" else torch.float32, torch.device(setup.device)
    found = [layers.tried(layer, setup.batch_size, dtype, device) for layer in layers.LAYERS]
    commonest, first = layers.LAYERS[0], found[0]
    arguments = layers.drawn(commonest, setup.batch_size, dtype, device)
    value = os.environ.get(layers.RTC, "")
    info = {
        "what": f"{setup.batch_size} x 64 x 32 x 32, {setup.precision}, {layers.RTC}={value}",
        "fast": "cudnn_convolution_relu",
        "plain": "conv2d with bias, then ReLU",
        "precision": setup.precision,
        "rtc": value,
        "layers": found,
    }
    one = Contestant(
        "fast",
        lambda: partial(layers.cudnn_fused, *arguments),
        lambda: {"output, relative": (first["error"], layers.LARGEST)},
        info=info,
        precision=setup.precision,
        skipped=f"{layers.RTC}={value}: {first['failed']}" if "failed" in first else "",
    )
    work = 2.0 * setup.batch_size * 32 * 32 * 64 * 64 * 9
    return Pairs(Contestant("plain", lambda: partial(layers.apart, *arguments)), [one], Work(work, "FLOP"))


def _launch_gap(setup: Setup) -> Pairs:
    """A hundred kernels of one element: what each, and the gap to the next, takes in a graph and from Python."""
    count, one = 100, torch.zeros(1, device=setup.device)

    def eager(x: Tensor) -> Tensor:
        for _ in range(count):
            x = x + 1
        return x

    graph = capture(eager, (one,), mode="fake" if setup.device == "cpu" else "cuda")
    info = {"what": f"{count} additions to one element", "fast": "one CUDA graph", "plain": "launched from Python"}
    call = partial(graph, one)
    fast = Contestant("fast", lambda: call, lambda: {"sum": (abs(call().item() - count), 0)}, info=info)
    return Pairs(Contestant("plain", lambda: partial(eager, one)), [fast], Work(count, "kernel"))


_ALL = (
    Case("arat-step", "an AR-AT training step in float32 and bf16 against the released structure", _arat_step, True),
    Case("arat-phases", "where both steps spend their time: attack, forward, backward, optimiser", _phases, True),
    Case("pgd10", "one PGD-10 attack in train mode against the released structure's", _pgd10, True),
    Case("split-bn", "split_bn + add + ReLU, both halves, against two nn.BatchNorm2d", _split_bn),
    Case("loader-resident", "the resident loader against a plain DataLoader", partial(_loader, kind="resident")),
    Case("loader-ffcv", "the ffcv loader against a plain DataLoader", partial(_loader, kind="ffcv")),
    Case("captured", "the AR-AT step captured against itself eager, and autotuning's seconds", _captured, True, True),
    Case(
        "conv-relu", "cuDNN's convolution with bias, add and ReLU in one call, layer by layer", _conv_relu, first=True
    ),
    Case("launch-gap", "an empty kernel and its gap, in a graph against from Python", _launch_gap, first=True),
)
CASES: dict[str, Case] = {case.name: case for case in _ALL}

FIRST: Sequence[tuple[str, dict[str, str], tuple[str, ...]]] = (
    ("captured", {}, ("--cudnn-plans", "10")),
    ("conv-relu", {layers.RTC: "0"}, ()),
    ("conv-relu", {layers.RTC: "1"}, ()),
    ("launch-gap", {}, ()),
    ("captured", {}, ("--cudnn-plans", "0")),
)
"""What a GPU is asked first, most telling first: a case, and environment and flags of its process if it needs one."""
