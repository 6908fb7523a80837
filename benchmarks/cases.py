"""The pairs: what each case builds, how it proves both sides equal, and how much work one call is."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from fastarat.kernels import split_bn, why_not_triton
from torch import Tensor, nn

from benchmarks import plain
from fastarat.attacks import Attacked, random_start
from fastarat.bench import forward_flops, report_phases
from fastarat.data import Augment, Batch, Split, beton, make_loader
from fastarat.defenses import ARAT
from fastarat.device import bf16_support
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.nets.models import build_model

EPSILON, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 10
IMAGE_SIZE, NUM_CLASSES = 32, 10
PLAIN_MODELS = ("resnet18", "resnet-small")
STEP_FORWARDS = 2 * NUM_STEPS + 6
"""Forward-equivalents of an AR-AT step: each attack step a forward and an input gradient, then both halves' 3."""


class Unavailable(Exception):
    """This case cannot run on this machine; the text says why."""


@dataclass(frozen=True)
class Size:
    """What a run asks for.

    precision: of the fast side; None: what each case measures unless told. dry: as small as possible, only to prove
    that everything works.
    """

    model: str
    batch_size: int
    device: str
    precision: str | None = None
    dry: bool = False

    @property
    def settled(self) -> Size:
        """This size with one precision: bf16 on CUDA, fp32 on a CPU, unless told."""
        return replace(self, precision=self.precision or ("bf16" if self.device != "cpu" else "fp32"))


@dataclass(frozen=True)
class Work:
    """How much one call does: `amount` of `unit`; no credit for work that only one side does."""

    amount: float
    unit: Literal["FLOP", "byte", "image"]


@dataclass(frozen=True)
class Pair:
    """Two ways to do the same thing.

    check: returns {quantity: (difference found, largest accepted)}. info: shapes, dtypes and settings for the JSON.
    precision: of the fast side. phases: instead of timing fast and plain whole, times the phases that each reports to
    the function it is given.
    """

    fast: Callable[[], object]
    plain: Callable[[], object]
    check: Callable[[], dict[str, tuple[float, float]]]
    work: Work
    info: dict[str, Any]
    precision: str = "fp32"
    phases: dict[str, Callable[[Callable[[str], None]], object]] | None = None


class Case(NamedTuple):
    """A named pair, or several that share their plain side: it is then timed once a round, beside all fast sides.

    prepare: in its list, what cannot run here is the Unavailable that says why. long: whole steps, for which fewer
    rounds are enough.
    """

    name: str
    help: str
    prepare: Callable[[Size], Sequence[Pair | Unavailable]]
    long: bool = False


class _Twins(NamedTuple):
    """The engine's step and the loop of the released structure, from the same weights, with a batch for each."""

    step: TrainStep
    loop: plain.ARATLoop
    images: Tensor  # channels-last
    images_nchw: Tensor
    labels: Tensor


class _Double(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def _twins(size: Size, *, double: bool = False, num_steps: int = NUM_STEPS, eager: bool = False) -> _Twins:
    if size.model not in PLAIN_MODELS:
        raise Unavailable(
            f"the loop of the {plain.STRUCTURE} has no {size.model}; choose --model {' or '.join(PLAIN_MODELS)}"
        )
    device = torch.device(size.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = build_model(size.model, num_classes=NUM_CLASSES, image_size=IMAGE_SIZE).to(device)
        images = torch.rand(size.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        labels = torch.randint(NUM_CLASSES, (size.batch_size,), device=device)
        if double:
            model.double()
            model.normalize = _Double()  # the engine's images stay float32
        step = TrainStep(
            model,
            ARAT(),
            images,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True),
            epsilon=EPSILON,
            step_size=STEP_SIZE,
            num_steps=max(num_steps, 1),
            precision="fp32" if double else size.precision,
            capture=False if eager else "auto",
        )
        if num_steps == 0:  # the training step alone, on equal images
            step.attack = lambda images, labels, mode=None: Attacked(images.clone(), None)
    stages = [getattr(step.model, f"layer{i}") for i in range(1, step.model.num_stages + 1)]
    first = [stage[0].conv1 for stage in stages]
    network = plain.ResNet([c.out_channels for c in first], len(stages[0]), [c.stride[0] for c in first], NUM_CLASSES)
    network.to(device)
    predictors = nn.ModuleList()
    for ours in step.companions["predictor_adv"]:
        predictors.append(plain.predictor(ours.layers[-1].out_features).to(device))
    if double:
        network.double()
        predictors.double()
    gamma = float(step.companions["balance"].gamma)
    loop = plain.ARATLoop(network, predictors, epsilon=EPSILON, step_size=STEP_SIZE, num_steps=num_steps, gamma=gamma)
    twins = _Twins(step, loop, images.contiguous(memory_format=torch.channels_last), images, labels)
    _level(twins)
    return twins


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    """Keep TF32 out of a comparison; the timed loops run with PyTorch's defaults."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _next_inputs(step: TrainStep, images: Tensor) -> Tensor:
    """Return the noisy batch that the next step will make of `images`, leaving its generator where it is."""
    generator = torch.Generator(images.device)
    generator.set_state(step.generator.get_state())
    return random_start(images, epsilon=EPSILON, kind="uniform-unclamped", generator=generator)


def _states(twins: _Twins) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> the engine's and the loop's value, float64 copies, of each weight and statistic."""
    ours = twins.step.model.state_dict()
    found = {key: (ours[plain.shared_key(key)], value) for key, value in twins.loop.model.state_dict().items()}
    for i, (own, theirs) in enumerate(zip(twins.step.companions["predictor_adv"], twins.loop.predictors, strict=True)):
        own_state = own.layers.state_dict()
        found |= {f"predictor {i}.{key}": (own_state[key], value) for key, value in theirs.state_dict().items()}
    return {key: tuple(v.to(torch.float64, copy=True) for v in pair) for key, pair in found.items()}


def _level(twins: _Twins) -> None:
    """Give the loop the engine's weights and statistics."""
    twins.loop.model.load(twins.step.model.state_dict())
    for own, theirs in zip(twins.step.companions["predictor_adv"], twins.loop.predictors, strict=True):
        theirs.load_state_dict(own.layers.state_dict())


_QUANTITIES = (
    "adversarial pixels that differ by more than 1e-5, share",
    "loss, relative",
    "weight update, worst tensor, relative",
    "weight update, all tensors together, relative",
    "running statistics, worst tensor, relative",
)


def _step_differences(size: Size, *, double: bool, num_steps: int, steps: int = 1) -> dict[str, float]:
    """Take `steps` steps on both sides, each from equal weights, and return the largest differences of any.

    Momentum is each side's own. Left to themselves, two runs of one step part: rounding flips a sign, and so on.
    """
    # Eager: a captured step hands over what its warm-up crafted. That the two agree is the engine's own test.
    twins = _twins(size, double=double, num_steps=num_steps, eager=True)
    step, loop = twins.step, twins.loop
    crafted: list[Tensor] = []
    attack = step.attack

    def remember(images: Tensor, labels: Tensor, mode: str | None = None) -> Attacked:
        attacked = attack(images, labels, mode)
        crafted.append(attacked.images)
        return attacked

    step.attack = remember
    largest = [0.0] * len(_QUANTITIES)
    for _ in range(steps):
        _level(twins)
        before = _states(twins)
        noisy = _next_inputs(step, twins.images).contiguous()
        ours = sum(t.item() for t in step(twins.images, twins.labels).values())
        theirs = loop(noisy.to(torch.float64 if double else torch.float32), twins.labels, torch.zeros_like(noisy))
        pixels = (crafted[-1].double() - loop.adversarial.double()).abs()
        found = [(pixels > 1e-5).double().mean().item(), abs(ours - theirs) / abs(theirs)]
        found += state_differences(_states(twins), {key: value for key, (_, value) in before.items()})
        largest = [max(pair) for pair in zip(largest, found, strict=True)]
    return dict(zip(_QUANTITIES, largest, strict=True))


def state_differences(pairs: dict[str, tuple[Tensor, Tensor]], before: dict[str, Tensor]) -> list[float]:
    """Return the relative differences of weight updates, worst tensor and all together, and of running statistics.

    pairs: name -> value found, value wanted. before: name -> what both began with. An update is held against its own
    size, so that a wrong gradient cannot hide behind the weight.
    """
    worst, running, off, moved = 0.0, 0.0, 0.0, 0.0
    for key, (found, wanted) in pairs.items():
        difference = (found - wanted).norm().item()
        if "num_batches" in key:
            running = max(running, difference)
        elif "running" in key:
            running = max(running, difference / max(wanted.norm().item(), 1e-12))
        else:
            update = (wanted - before[key]).norm().item()
            worst = max(worst, difference / max(update, 1e-12))
            off, moved = off + difference**2, moved + update**2
    return [worst, math.sqrt(off / max(moved, 1e-24)), running]


def _check_step(size: Size) -> dict[str, tuple[float, float]]:
    """Compare a whole step in float64 on a few images, and its parts in the precision that is timed.

    In float32 rounding flips the sign of a few gradients that are nearly zero, and one ReLU at its kink moves many of
    them a little. One attack step leaves the difference at those pixels, ten carry it into a quarter of all others
    (measured), and one pixel in five thousand moves BN's gradients by a fifth (measured). So only float64 compares the
    whole; as timed, one attack step and, apart from it, the training step on images that are equal.
    """
    few = replace(size, batch_size=4)
    # The engine's cross-entropies, predictors and images are float32 even around a float64 network.
    limits = (0.0, 1e-5, 1e-3, 1e-3, 1e-5)
    found = _step_differences(few, double=True, num_steps=NUM_STEPS)
    checked = {f"float64: {name}": (value, limit) for (name, value), limit in zip(found.items(), limits, strict=True)}
    # The predictors' BatchNorm over two or four rows magnifies bf16's rounding beyond any band (measured: 1.14 of an
    # update at 2 images, 0.72 at 4, and 0.41 to 0.49 from 8 to 128).
    timed = replace(size, batch_size=max(size.batch_size, 16)) if size.precision == "bf16" else size
    with _ieee():
        attack = _step_differences(timed, double=False, num_steps=1)
        train = _step_differences(timed, double=False, num_steps=0)
    for name, limit in zip(train, _ROUNDING[size.precision], strict=True):
        if "pixels" in name:
            checked[f"{size.precision}, 1 attack step: {name}"] = (attack[name], limit)
        else:
            checked[f"{size.precision}, no attack: {name}"] = (train[name], limit)
    return checked


_ROUNDING = {
    "fp32": (0.01, 1e-4, 0.05, 0.02, 1e-3),
    "tf32": (0.1, 0.01, 0.3, 0.2, 0.02),
    "bf16": (0.25, 0.01, 1.0, 0.65, 0.02),
}
"""Accepted differences from the float32 loop as timed, in the order of the quantities.

The bf16 band lies above what rounding alone was seen to do (0.13, 0.0015, 0.66, 0.49, 0.005) and below the least
mistakes tried: gamma 10 % off (loss 0.08), steps of the attack half as long again (pixels 0.98), half the learning rate
(all tensors 1.06), the clean half in the adversarial BatchNorm (statistics 1). It says that this is the same training
in bf16, not that bf16 costs no accuracy.
"""


def _network_info(size: Size, twins: _Twins, flops: int) -> dict[str, Any]:
    reason = why_not_triton(size.device)
    return {
        "what": f"{size.model}, {size.batch_size} images {IMAGE_SIZE}x{IMAGE_SIZE}, PGD-{NUM_STEPS}",
        "baseline": plain.STRUCTURE,
        "precision": size.precision,
        "images": list(twins.images.shape),
        "fast": f"{size.precision}, channels-last, {reason or 'Triton kernels'}",
        "plain": "float32 NCHW, PyTorch's defaults, two forwards, host reads, input gradients only in the attack"
        + (", TF32 convolutions" if size.device != "cpu" else ""),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "captured": not twins.step.why_eager,
        "epsilon": EPSILON,
        "step_size": STEP_SIZE,
        "num_steps": NUM_STEPS,
        "forward_flop_per_image": flops,
    }


def _step_pair(size: Size) -> Pair:
    twins = _twins(size)
    step, loop = twins.step, twins.loop
    flops = forward_flops(step.model, twins.images[:1])
    return Pair(
        fast=lambda: step(twins.images, twins.labels),
        # A copy: the loop leaves its noise in the batch, and a loader hands over a new one at every step.
        plain=lambda: loop(twins.images_nchw.clone(), twins.labels),
        check=lambda: _check_step(size),
        work=Work(STEP_FORWARDS * flops * size.batch_size, "FLOP"),
        info=_network_info(size, twins, flops) | {"forwards_per_image": STEP_FORWARDS},
        precision=size.precision,
    )


def _arat_step(size: Size) -> list[Pair | Unavailable]:
    """fastarat in float32 and in bf16, unless one precision is asked for, against one loop."""
    able, why = bf16_support(size.device)
    missing = Unavailable(f"no bf16 row: {why}")
    if size.precision:
        if size.precision == "bf16" and not able:
            raise missing
        return [_step_pair(size)]
    # On a GPU the loop's convolutions are in TF32, PyTorch's default: the engine's float32 there is the same.
    single = _step_pair(replace(size, precision="fp32" if size.device == "cpu" else "tf32"))
    if not able:
        return [single, missing]
    return [single, replace(_step_pair(replace(size, precision="bf16")), plain=single.plain)]


def _phases(size: Size) -> list[Pair]:
    size = size.settled
    pair, twins = _step_pair(size), _twins(size, eager=True)
    step, loop = twins.step, twins.loop
    mark: Callable[[str], None] = _unmarked

    report_phases(step, lambda name: mark(name))

    def fast(marks: Callable[[str], None]) -> None:
        nonlocal mark
        mark = marks
        step(twins.images, twins.labels)
        mark = _unmarked

    def check() -> dict[str, tuple[float, float]]:
        seen: list[str] = []
        fast(seen.append)
        missing = {"attack", "forward", "backward", "optimiser", "metrics"} - set(seen)
        return pair.check() | {"phases that were not met": (len(missing), 0)}

    both = {"fast": fast, "plain": lambda marks: loop(twins.images_nchw.clone(), twins.labels, mark=marks)}
    info = pair.info | {"fast": pair.info["fast"] + ", eager"}
    return [replace(pair, check=check, phases=both, info=info)]


def _unmarked(name: str) -> None:
    """Time nothing."""


def _pgd10(size: Size) -> list[Pair]:
    size = size.settled
    twins = _twins(size)
    step, loop = twins.step, twins.loop
    flops = forward_flops(step.model, twins.images[:1])
    # The engine's attack is given the noisy batch: none is drawn here either.
    options = {"epsilon": EPSILON, "step_size": STEP_SIZE, "num_steps": NUM_STEPS}
    none = torch.zeros_like(twins.images_nchw)

    def check() -> dict[str, tuple[float, float]]:
        checked = {}
        for double, num_steps, limit in ((True, NUM_STEPS, 0.0), (False, 1, _ROUNDING[size.precision][0])):
            fresh = _twins(replace(size, batch_size=4) if double else size, double=double, num_steps=num_steps)
            ours = fresh.step.attack(fresh.images, fresh.labels).images
            images = fresh.images_nchw.double() if double else fresh.images_nchw
            with _ieee():
                model, changed = fresh.loop.model.train(), {"num_steps": num_steps, "noise": torch.zeros_like(images)}
                theirs = plain.pgd(model, images, fresh.labels, **options | changed)
            share = ((ours.double() - theirs.double()).abs() > 1e-5).double().mean().item()
            name = "float64" if double else f"{size.precision}, 1 attack step"
            checked[f"{name}: adversarial pixels that differ by more than 1e-5, share"] = (share, limit)
        return checked

    pair = Pair(
        fast=lambda: step.attack(twins.images, twins.labels),
        plain=lambda: plain.pgd(loop.model.train(), twins.images_nchw, twins.labels, noise=none, **options),
        check=check,
        work=Work(2 * NUM_STEPS * flops * size.batch_size, "FLOP"),
        info=_network_info(size, twins, flops) | {"forwards_per_image": 2 * NUM_STEPS, "mode": "train"},
        precision=size.precision,
    )
    return [pair]


def _split_bn(size: Size) -> list[Pair]:
    size = size.settled
    device = torch.device(size.device)
    dtype = torch.bfloat16 if size.precision == "bf16" else torch.float32
    shape = (size.batch_size, 8 if size.dry else 64, IMAGE_SIZE, IMAGE_SIZE)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    # Per half: input, residual, gradient of the output. The plain loop holds the halves apart, as it makes them.
    halves = [[draw(*shape) for _ in range(3)] for _ in range(2)]
    norms = [nn.BatchNorm2d(shape[1]).to(device).train() for _ in range(2)]
    with torch.no_grad():
        for norm, (x, residual, _) in zip(norms, halves, strict=True):
            norm.weight.copy_(draw(shape[1]))
            norm.bias.copy_(draw(shape[1]))
            # At its kink the ReLU lets rounding decide whether a gradient passes: no sum may lie there.
            residual[(norm(x) + residual).abs() < 1e-4] += 1e-3
    weight, bias = (torch.stack([getattr(n, p).detach().clone() for n in norms]) for p in ("weight", "bias"))
    weight.requires_grad_()
    bias.requires_grad_()

    def laid_out(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return torch.cat(tensors).to(dtype, memory_format=torch.channels_last)

    x, residual, dy = (laid_out(pair, dtype) for pair in zip(*halves, strict=True))

    def fast(x: Tensor = x, residual: Tensor = residual, dy: Tensor = dy) -> tuple[Tensor, ...]:
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y, mean, _ = split_bn(x, weight, bias, residual, relu=True)
        return y.detach(), *torch.autograd.grad(y, (x, residual, weight, bias), dy), mean

    def theirs() -> list[tuple[Tensor, ...]]:
        outputs = []
        for norm, (x, residual, dy) in zip(norms, halves, strict=True):
            x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
            y = torch.relu(norm(x) + residual)
            outputs.append((y.detach(), *torch.autograd.grad(y, (x, residual, norm.weight, norm.bias), dy)))
        return outputs

    def check() -> dict[str, tuple[float, float]]:
        ours = fast(*(laid_out(pair, torch.float32) for pair in zip(*halves, strict=True)))
        found = {}
        for i, name in enumerate(("output", "input gradient", "residual gradient", "weight gradient", "bias gradient")):
            parts = [o[i] for o in theirs()]
            expected = torch.cat(parts) if i < 3 else torch.stack(parts)
            found[f"float32: {name}, relative"] = ((ours[i] - expected).norm() / expected.norm()).item(), 1e-4
        return found

    moved = 8 * x.numel() * x.element_size()
    pair = Pair(
        fast=fast,
        plain=theirs,
        check=check,
        work=Work(moved, "byte"),
        info={
            "what": f"2 x {list(shape)}, BN + add + ReLU, forward and backward, {str(dtype).removeprefix('torch.')}",
            "bytes": "x, residual, y, dy, x, y, dx, dresidual once each, in the fast side's dtype",
            "fast": f"channels-last, {why_not_triton(device) or 'Triton kernels'}",
            "plain": "two nn.BatchNorm2d, float32 NCHW",
            "precision": size.precision,
        },
        precision=size.precision,
    )
    return [pair]


def _loader(size: Size, kind: Literal["resident", "ffcv"]) -> list[Pair]:
    device = torch.device(size.device)
    count, batch_size = (64, 16) if size.dry else (10_240, 128)
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
    workers = 0 if size.dry else 2 if device.type == "cpu" else 8

    def theirs(shuffle: bool, padding: int, flip: bool) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            plain.Images(images, labels, padding, flip),
            batch_size,
            shuffle=shuffle,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    fast_loader = ours(shuffle=True, augment=Augment(padding=4, flip=True))
    plain_loader = theirs(True, 4, True)
    epoch = iter(range(10**9))

    def fast() -> None:
        for _ in fast_loader.epoch(next(epoch)):
            pass

    def slow() -> None:
        for _ in plain.batches(plain_loader, device):
            pass

    def check() -> dict[str, tuple[float, float]]:
        worst, seen = 0.0, 0
        pairs: Iterator[tuple[Batch, tuple[Tensor, Tensor]]] = zip(
            ours().epoch(0), plain.batches(theirs(False, 0, False), device), strict=True
        )
        for batch, (expected, expected_labels) in pairs:
            worst = max(worst, (batch.images - expected).abs().max().item())
            worst = max(worst, (batch.labels - expected_labels).abs().max().item())
            seen += len(expected)
        return {"unshuffled, not augmented: pixels and labels": (worst, 1e-7), "images missing": (count - seen, 0)}

    pair = Pair(
        fast=fast,
        plain=slow,
        check=check,
        work=Work(count, "image"),
        info={
            "what": f"an epoch of {count} images {IMAGE_SIZE}x{IMAGE_SIZE}, batches of {batch_size}, crop and flip",
            "fast": f"{kind} loader",
            "plain": f"torch DataLoader over PIL images, {workers} persistent workers (their memory is not counted)",
        },
    )
    return [pair]


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "arat-step",
            "an AR-AT training step in float32 and bf16 against the released structure",
            _arat_step,
            long=True,
        ),
        Case("arat-phases", "where both steps spend their time: attack, forward, backward, optimiser", _phases, True),
        Case("pgd10", "one PGD-10 attack in train mode against the released structure's", _pgd10, long=True),
        Case("split-bn", "split_bn + add + ReLU, both halves, against two nn.BatchNorm2d", _split_bn),
        Case("loader-resident", "the resident loader against a plain DataLoader", partial(_loader, kind="resident")),
        Case("loader-ffcv", "the ffcv loader against a plain DataLoader", partial(_loader, kind="ffcv")),
    )
}
