"""One speed-up at a time: a loop as the method was released, then our step with each fast path added to the one before.

Every rung must agree with the plainest form of the step (in float32, on a few images) wherever the mathematics is the
same; the times of one that does not are printed nowhere. All rungs are timed in interleaved rounds on one batch of
random images that rests on the device. What the arithmetic of the workload predicts for each speed-up is printed beside
what was measured.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastarat.kernels import why_not_fold, why_not_triton
from torch import Tensor, nn

from benchmarks import cases, plain, tables
from fastarat import bench
from fastarat.attacks import Attacked
from fastarat.bench import EPOCH_IMAGES, BenchConfig, Clock, cell, quartiles
from fastarat.defenses import ARAT, AT, TRADES, Defense
from fastarat.device import bf16_support
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError, unknown
from fastarat.specs import Attack

DEFENSES: dict[str, tuple[Defense, str | None]] = {
    "ar-at": (ARAT(), None),
    "at": (AT(), None),
    "at-eval": (AT(), "eval"),
    "trades": (TRADES(), None),
}
"""Name -> defense, and BatchNorm of its attack where it is not the defense's own."""
MATRIX = [
    "ar-at:resnet18:128",
    "trades:resnet18:128",
    "ar-at:resnet18:512:short",
    "at:resnet18:128:short",
    "at-eval:resnet18:128:short",
    "ar-at:resnet18:256:short",
    "ar-at:preactresnet18:128:short",
    "ar-at:wrn-34-10:128:short",
    "trades:wrn-34-10:128:short",
]
"""Most informative first: a time budget cuts from the end."""
PLAINEST: dict[str, Any] = {
    "precision": "fp32",
    "channels_last": False,
    "kernels": "plain",
    "capture": False,
    "compile_loss": False,
    "fold": False,
    "optimizer": "torch",
}
"""Options of our step with every fast path off."""
_BUILT_FIRST = ("graph", "released", "bf16", "step", "triton", "fold", "sgd", "channels-last", "compile")
_FEW = 8  # images of the equality checks
_COMPILING_S = 45


class Predicted(NamedTuple):
    """ms per step a speed-up should save: a prediction from arithmetic, for one H200, ResNet-18, batch 128, PGD-10.

    item: its number in the ranked list of speed-ups the predictions come from. low, high: None where the list gives
    no number of its own. note: what the prediction assumes.
    """

    item: int
    low: float | None
    high: float | None
    note: str = ""


PREDICTED = {
    "step": Predicted(6, 0.4, 0.4, "one forward on [clean; adv]; host reads go with item 1"),
    "channels-last": Predicted(2, None, None, "counted with bf16"),
    "bf16": Predicted(2, 23, 23, "of device time, channels-last included; an eager host may hide it"),
    "triton": Predicted(3, 3.6, 3.6, "once the host is out of the way"),
    "graph": Predicted(1, 13, 13, "more on a slow host"),
    "fold": Predicted(14, 4.3, 4.3),
    "sgd": Predicted(11, 0.1, 0.15, "against SGD in five passes; against a fused SGD and a cast, 0.016"),
    "compile": Predicted(16, 0.05, 0.1),
}


class Setup(NamedTuple):
    """What a ladder is climbed with. short: only the last few rungs."""

    defense: str
    model: str
    batch_size: int
    short: bool = False

    @classmethod
    def parse(cls, text: str) -> Setup:
        parts = text.split(":")
        if len(parts) not in (3, 4) or not parts[2].isdigit() or int(parts[2]) < 2 or parts[3:] not in ([], ["short"]):
            raise UserError(f"setup {text!r}: expected DEFENSE:MODEL:BATCH or DEFENSE:MODEL:BATCH:short, {MATRIX[0]}")
        if parts[0] not in DEFENSES:
            raise unknown("defense", parts[0], DEFENSES)
        return cls(parts[0], parts[1], int(parts[2]), len(parts) == 4)


@dataclass(frozen=True)
class Rung:
    """One form of the step. options: of TrainStep; None is the released structure. skipped: why it is not there."""

    name: str
    adds: str
    options: dict[str, Any] | None = None
    skipped: str = ""


def rungs(setup: Setup, device: torch.device, *, dry: bool = False) -> list[Rung]:
    """Return the ladder of `setup`: each rung has all options of the one before."""
    cuda = device.type == "cuda"
    options = PLAINEST | {"precision": "tf32" if cuda else "fp32"}
    found: list[Rung] = []

    def add(name: str, adds: str, skipped: str | None = None, **changes: Any) -> None:
        if not skipped:
            options.update(changes)
        found.append(Rung(name, adds, None if name == "released" else dict(options), skipped or ""))

    no_loop = "" if setup.model in cases.PLAIN_MODELS else f"no loop of the {plain.STRUCTURE} for {setup.model}"
    adds = (
        f"{plain.STRUCTURE}: NCHW, PyTorch's defaults, a forward per batch, host reads, input gradients in the attack"
    )
    add("released", adds, no_loop)
    add("step", "our step, eager: one forward on [clean; adv], no host reads")
    add("channels-last", "channels-last", channels_last=True)
    able, why = bf16_support(device)
    add("bf16", "bf16 with weights cast once per step", "" if able else why, precision="bf16")
    add(
        "triton",
        "fused BN + add + ReLU, PGD update and stem gradient in Triton",
        why_not_triton(device),
        kernels="auto",
    )
    if cuda or not dry:
        add("graph", "the whole step as one CUDA graph", "" if cuda else "a CPU has no CUDA graphs", capture=True)
    else:
        add("graph", "fake capture in place of a CUDA graph", capture="fake")
    if _attack_bn(setup) == "eval":
        dtype = torch.bfloat16 if options["precision"] == "bf16" else torch.float32
        add("fold", "BatchNorm folded into the attack's convolutions", why_not_fold(device, dtype), fold=True)
    low = "" if options["precision"] == "bf16" and cuda else "no bf16 weights to write"
    add("sgd", "SGD that writes the attack's bf16 weights in its own pass", low, optimizer="fastarat")
    compiles = "" if cuda else "compiling for a CPU takes longer than it can save"
    add("compile", "compiled loss", compiles, compile_loss=True)
    return [r for r in found if not setup.short or r.name in ("triton", "graph", "fold")]


def _attack_bn(setup: Setup) -> str:
    defense, attack_bn = DEFENSES[setup.defense]
    return attack_bn or defense.attack_bn


class SimpleLoop:
    """AT and TRADES with the structure of released codes, on `plain.ResNet`'s adversarial branch alone.

    Both attacks differentiate by the image alone, as TRADES' does; some AT codes make weight gradients as well.
    trades: the attack is in eval mode and recomputes the clean logits at every step; the clean batch goes forward twice
    in the loss. Otherwise AT: everything in `attack_mode`, "train" or "eval".
    """

    def __init__(
        self, model: plain.ResNet, *, trades: bool, attack_mode: str, num_steps: int, beta: float = 6.0
    ) -> None:
        self.model, self.trades, self.attack_mode = model, trades, attack_mode
        self.num_steps, self.beta = num_steps, beta
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.total_loss, self.correct = 0.0, 0

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images, "adv")

    def attack(self, images: Tensor, labels: Tensor, start: Tensor | None = None) -> Tensor:
        self.model.train(self.attack_mode == "train")
        epsilon, step_size = cases.EPSILON, cases.STEP_SIZE
        if start is None and self.trades:
            start = images + 0.001 * torch.randn_like(images)
        elif start is None:
            start = torch.clamp(images + torch.empty_like(images).uniform_(-epsilon, epsilon), 0, 1)
        adv = start.detach()
        for _ in range(self.num_steps):
            adv.requires_grad_()
            with torch.enable_grad():
                if self.trades:
                    log_adv, clean = F.log_softmax(self.logits(adv), 1), F.softmax(self.logits(images), 1)
                    loss = F.kl_div(log_adv, clean, reduction="sum")
                else:
                    loss = F.cross_entropy(self.logits(adv), labels)
            grad = torch.autograd.grad(loss, [adv])[0]
            adv = adv.detach() + step_size * torch.sign(grad.detach())
            adv = torch.min(torch.max(adv, images - epsilon), images + epsilon)
            adv = torch.clamp(adv, 0, 1)
        return adv.detach()

    def __call__(self, images: Tensor, labels: Tensor, start: Tensor | None = None) -> float:
        adv = self.attack(images, labels, start)
        self.model.train()
        self.optimizer.zero_grad()
        if self.trades:
            logits = self.logits(images)
            robust = F.kl_div(F.log_softmax(self.logits(adv), 1), F.softmax(self.logits(images), 1), reduction="sum")
            loss = F.cross_entropy(logits, labels) + self.beta * robust / len(images)
        else:
            logits = self.logits(adv)
            loss = F.cross_entropy(logits, labels)
        if math.isnan(loss.item()):
            raise FloatingPointError("the loss is NaN")
        loss.backward()
        self.optimizer.step()
        self.total_loss += loss.item()
        self.correct += (logits.argmax(1) == labels).sum().item()
        return loss.item()


class Batch(NamedTuple):
    images: Tensor  # NCHW
    labels: Tensor


def random_batch(count: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, cases.IMAGE_SIZE, cases.IMAGE_SIZE, generator=generator).to(device)
    return Batch(images, torch.randint(cases.NUM_CLASSES, (count,), generator=generator).to(device))


def make_step(
    setup: Setup, options: dict[str, Any], device: torch.device, num_steps: int, defense: Defense | None = None
) -> TrainStep:
    """Build the rung's step; equal setups have equal weights."""
    config = BenchConfig(
        model=setup.model,
        num_classes=cases.NUM_CLASSES,
        channels_last=options["channels_last"],
        kernels=options["kernels"],
        capture={True: "on", False: "off"}.get(options["capture"], options["capture"]),
        compile_loss=options["compile_loss"],
        fold_bn=options["fold"],
        optimizer=options["optimizer"],
        attack=Attack(num_steps=num_steps, bn=DEFENSES[setup.defense][1]),
    )
    return bench.make_step(config, defense or DEFENSES[setup.defense][0], device, options["precision"])


def released_loop(setup: Setup, device: torch.device, num_steps: int) -> tuple[Callable[..., Any], plain.ResNet]:
    """Build the loop of the released structure with the weights that `make_step` gives."""
    if setup.defense == "ar-at":
        size = cases.Size(setup.model, setup.batch_size, str(device), "fp32")
        twins = cases._twins(size, num_steps=num_steps, eager=True)
        return twins.loop, twins.loop.model
    ours = make_step(setup, PLAINEST, device, 1).model
    state = ours.state_dict()
    stages = [getattr(ours, f"layer{i}")[0].conv1 for i in range(1, ours.num_stages + 1)]
    network = plain.ResNet(
        [c.out_channels for c in stages], len(ours.layer1), [c.stride[0] for c in stages], cases.NUM_CLASSES
    ).to(device)
    shared = {key: key.replace(".adv.", ".").replace(".clean.", ".") for key in network.state_dict()}
    network.load_state_dict({key: state[name] for key, name in shared.items()})
    trades = setup.defense == "trades"
    return SimpleLoop(network, trades=trades, attack_mode=_attack_bn(setup), num_steps=num_steps), network


# --- equality -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Compare without TF32, and without autotuning plans for a batch size that is never timed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with cases._ieee():
            yield
    finally:
        torch.backends.cudnn.benchmark = before


class Outcome(NamedTuple):
    """Adversarial images of one attack step from a given start; loss and state after a training step on that start."""

    crafted: Tensor
    loss: float
    state: dict[str, Tensor]


def _pinned(setup: Setup, start: Tensor, *, stays: bool) -> Defense:
    """The setup's defense without its own randomness: its attack begins at `start`, its clean batch is the batch.

    stays: the attack ends where it begins, which leaves the training step alone.
    """
    defense = copy.copy(DEFENSES[setup.defense][0])

    def attack(pgd, forward, images, labels, target, own_start, **options):
        at = start.to(own_start).contiguous(memory_format=_format_of(own_start))
        return Attacked(at, None) if stays else pgd(forward, images, labels, target, at)

    object.__setattr__(defense, "inputs", lambda images, **options: images)
    object.__setattr__(defense, "attack", attack)
    return defense


def _format_of(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _sharpened(model: nn.Module) -> nn.Module:
    """A fresh network answers almost evenly, so that a divergence between two answers vanishes: make it answer."""
    with torch.no_grad():
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.mul_(10)
    return model


def _outcome(setup: Setup, options: dict[str, Any], batch: Batch, start: Tensor) -> Outcome:
    device = batch.images.device
    images = batch.images
    if options["channels_last"]:
        images = images.contiguous(memory_format=torch.channels_last)
    eager = options | {"capture": False, "compile_loss": False}
    attacking, step = (
        make_step(setup, o, device, 1, _pinned(setup, start, stays=stays))
        for o, stays in ((eager, False), (options, True))
    )
    _sharpened(attacking.model), _sharpened(step.model)
    crafted = attacking.attack(images, batch.labels).images
    loss = sum(t.item() for t in step(images, batch.labels).values())
    return Outcome(crafted.float().contiguous(), loss, {k: v.double() for k, v in step.model.state_dict().items()})


def _released_outcome(setup: Setup, batch: Batch, start: Tensor) -> Outcome:
    device = batch.images.device
    (attacking, attacked), (loop, network) = (released_loop(setup, device, n) for n in (1, 0))
    _sharpened(attacked), _sharpened(network)
    crafted = attacking.attack(batch.images, batch.labels, start)
    loss = loop(batch.images, batch.labels, start)
    state = {plain.shared_key(k): v.double() for k, v in network.state_dict().items() if ".clean." not in k}
    return Outcome(crafted, loss, state)


def _differences(found: Outcome, wanted: Outcome, before: dict[str, Tensor], statistics_too: bool) -> list[float]:
    pixels = ((found.crafted - wanted.crafted).abs() > 1e-5).double().mean().item()
    pairs = {key: (found.state[key], value) for key, value in wanted.state.items() if "num_batches" not in key}
    *updates, running = cases.state_differences(pairs, before)
    loss = abs(found.loss - wanted.loss) / abs(wanted.loss)
    return [pixels, loss, *updates, running if statistics_too else 0.0]


_QUANTITIES = (
    "1 attack step: share of pixels that differ by more than 1e-5",
    "training step: loss, relative",
    "training step: weight update, worst tensor, relative",
    "training step: weight update, all tensors together, relative",
    "training step: running statistics, worst tensor, relative",
)


def equality(setup: Setup, rung: Rung, device: torch.device) -> dict[str, tuple[float, float]]:
    """Compare a rung with the plainest step; {quantity: (difference, largest accepted)}.

    Both start from the same weights and the same start of the attack; TF32 is off. One step of the attack, and apart
    from it a training step: rounding flips signs of gradients near zero, and ten steps carry that into every pixel.
    """
    with _exact():
        if rung.options is None and setup.defense == "ar-at":
            return cases._check_step(cases.Size(setup.model, _FEW, str(device), "fp32"))
        batch = random_batch(_FEW, device)
        noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(2)).to(device)
        start = (batch.images + 0.2 * noise).clamp(0, 1)
        wanted = _outcome(setup, PLAINEST, batch, start)
        before = _sharpened(make_step(setup, PLAINEST, device, 1).model).state_dict()
        before = {k: v.double() for k, v in before.items()}
        found = (
            _released_outcome(setup, batch, start)
            if rung.options is None
            else _outcome(setup, rung.options, batch, start)
        )
    limits = cases._ROUNDING["bf16" if rung.options and rung.options["precision"] == "bf16" else "fp32"]
    # TRADES' loop sends the clean batch forward twice in the loss, which moves running statistics once more.
    same_statistics = rung.options is not None or setup.defense != "trades"
    values = _differences(found, wanted, before, same_statistics)
    return {name: (value, limit) for name, value, limit in zip(_QUANTITIES, values, limits, strict=True)}


# --- time -----------------------------------------------------------------------------------------------------------


def climb(
    setup: Setup,
    device: torch.device,
    *,
    repeats: int,
    deadline: float,
    num_steps: int = 10,
    dry: bool = False,
    on_rung: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Build, check and time every rung of `setup`.

    deadline: of time.monotonic(); after it no rung is built and, from the third on, no round begins. on_rung: called
    with the result so far once a rung has been built, so that a run stopped by the clock leaves something.
    """
    clock = Clock(device)
    batch = random_batch(setup.batch_size, device)
    images = {
        False: batch.images,
        True: batch.images.contiguous(memory_format=torch.channels_last),
    }
    ladder = rungs(setup, device, dry=dry)
    results = {rung.name: {"name": rung.name, "adds": rung.adds} for rung in ladder}
    found: dict[str, Any] = {
        "setup": setup._asdict(),
        "what": f"{setup.defense}, {setup.model}, {setup.batch_size} images, PGD-{num_steps}",
        "rungs": list(results.values()),
    }
    calls: dict[str, Callable[[], object]] = {}
    work: float | None = None
    for rung in sorted(ladder, key=lambda rung: _BUILT_FIRST.index(rung.name)):
        result = results[rung.name]
        # Inductor may take most of a minute, and the rounds of the others must still fit.
        least = _COMPILING_S if rung.name == "compile" and not rung.skipped and not dry else 0
        if rung.skipped or (calls and time.monotonic() + least > deadline):
            result["skipped"] = rung.skipped or "out of time"
            continue
        try:
            result["equality"] = equality(setup, rung, device)
            broken = {name: v for name, (v, limit) in result["equality"].items() if not v <= limit}
            if broken:  # its times are kept for whoever looks into it, and no table prints them
                result["unequal"] = broken
            call, result["warmup_s"], result["memory"], step = _built(setup, rung, device, batch, images, num_steps)
            result["alone_ms"] = quartiles([clock(call, 1) for _ in range(3)], 1e3)
            result["launches"] = bench.launches(call, device)
            if step is not None and work is None:
                example = torch.zeros(1, 3, cases.IMAGE_SIZE, cases.IMAGE_SIZE, device=device)
                per_image, cost, _ = bench.step_flops(step, example)
                work = per_image * setup.batch_size
            calls[rung.name] = call
        except Exception as error:  # whatever one rung runs into, the others are worth having
            traceback.print_exc()
            result["failed"] = first_line(error)
        on_rung(found)
    calls = {rung.name: calls[rung.name] for rung in ladder if rung.name in calls}
    if not calls or work is None:
        return found
    ceiling = bench.matmul_ceiling(device, small=dry)
    found |= {"cost": cost._asdict() | {"forwards": cost.forwards, "flop_per_image": work / setup.batch_size}}

    def on_round(samples: dict[str, list[float]], peaks: list[float], inner: dict[str, int]) -> None:
        """Put into `found` what is known after a round, so that a run stopped by the clock leaves its last one."""
        rates = [ceiling.amount / s for s in peaks]
        found["peak"] = {"name": ceiling.name, "samples_s": peaks, "tflops": quartiles(rates, 1e-12)}
        found["rounds"] = len(peaks)
        first = found["rungs"][0]
        released = None if "unequal" in first else samples.get("released")
        previous: list[float] | None = None
        for result in found["rungs"]:
            times = samples.get(result["name"])
            if times is None:
                continue
            result |= {
                "steps_per_sample": inner[result["name"]],
                "samples_s": times,
                "ms": quartiles(times, 1e3),
                "epoch_s": quartiles(times, EPOCH_IMAGES / setup.batch_size),
                "images_per_s": setup.batch_size / statistics.median(times),
                "tflops": work / statistics.median(times) / 1e12,
                "mfu": statistics.median(work / s / r for s, r in zip(times, rates, strict=True)),
            }
            if released is not None:
                result["ratio"] = quartiles([a / b for a, b in zip(released, times, strict=True)])
            if previous is not None:
                result["gain_ms"] = quartiles([a - b for a, b in zip(previous, times, strict=True)], 1e3)
            if result["name"] in PREDICTED and _predictions_hold(setup, num_steps):
                result["predicted"] = PREDICTED[result["name"]]._asdict()
            previous = previous if "unequal" in result else times
        on_rung(found)

    _rounds(calls, clock, ceiling, repeats, deadline, on_round)
    return found


def _predictions_hold(setup: Setup, num_steps: int) -> bool:
    return setup.model == "resnet18" and setup.batch_size == 128 and num_steps == 10


def _built(
    setup: Setup, rung: Rung, device: torch.device, batch: Batch, images: dict[bool, Tensor], num_steps: int
) -> tuple[Callable[[], object], float, dict[str, Any], TrainStep | None]:
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device) if cuda else 0
    started = time.perf_counter()
    step = None
    if rung.options is None:
        loop, _ = released_loop(setup, device, num_steps)

        def call() -> object:
            return loop(batch.images.clone(), batch.labels)  # AR-AT's leaves its noise in the batch
    else:
        step = make_step(setup, rung.options, device, num_steps)
        own = images[rung.options["channels_last"]]

        def call() -> object:
            return step(own, batch.labels)

    for _ in range(2):
        call()
    bench.synchronize(device)
    warmup_s = time.perf_counter() - started
    memory: dict[str, Any] = {"method": "not measured: all rungs share one process", "peak_bytes": None}
    if cuda:
        memory = bench.peak_memory(call, device)
        memory = {**memory, "peak_bytes": memory["peak_bytes"] - before}
    return call, warmup_s, memory, step


def _rounds(
    calls: dict[str, Callable[[], object]],
    clock: Clock,
    ceiling: bench.Ceiling,
    repeats: int,
    deadline: float,
    on_round: Callable[[dict[str, list[float]], list[float], dict[str, int]], None],
) -> None:
    """Time every call in each round, in an order that rotates; also the machine's matrix rate."""
    shortest = 0.1 if clock.device.type == "cuda" else 0.0
    inner = {name: max(1, math.ceil(shortest / clock(call, 1))) for name, call in calls.items()}
    peak_calls = max(1, math.ceil(0.01 / min(clock(ceiling.call, 1) for _ in range(3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    peaks: list[float] = []
    names = list(calls)
    for number in range(repeats):
        if time.monotonic() > deadline and number >= min(3, repeats):
            break
        peak = clock(ceiling.call, peak_calls)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock(calls[name], inner[name]))
        peaks.append(peak)
        on_round(samples, peaks, inner)


# --- command line ---------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str]) -> int:
    """Run `python -m benchmarks ladder`. Returns 1 when a rung is unequal or failed."""
    parser = Parser(prog="python -m benchmarks ladder", description=__doc__, allow_abbrev=False)
    parser.add_argument("setups", nargs="*", metavar="DEFENSE:MODEL:BATCH[:short]", help=f"default: {' '.join(MATRIX)}")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new setup starts")
    parser.add_argument("--repeats", type=int, help="rounds (default: 20; 5 on a CPU, 2 dry)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/ladder.json"), help="default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="tiny sizes and two rounds, to prove the machinery")
    args = parser.parse_args(argv)
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: expected 1 or more")
    setups = [Setup.parse(text) for text in args.setups or MATRIX]
    if args.dry:
        setups = list(dict.fromkeys(s._replace(model="resnet-small", batch_size=4) for s in setups))
    device = bench.pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    repeats = args.repeats or (2 if args.dry else 20 if cuda else 5)
    record: dict[str, Any] = {
        "format": bench.FORMAT,
        "kind": "ladder",
        "command": shlex.join(["python", "-m", "benchmarks", "ladder", *argv]),
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "data": "random images",
        "dry": args.dry,
        "machine": bench.machine(device),
        "predictions": {name: p._asdict() for name, p in PREDICTED.items()},
        "results": [],
    }
    started, failed = time.monotonic(), False
    # TF32 is PyTorch's own default for convolutions; the float32 forms of the checks switch it off themselves.
    with bench.backend_flags(device, "tf32"):
        for setup in setups:
            if time.monotonic() - started > args.budget:
                record["results"].append({"setup": setup._asdict(), "skipped": "out of time"})
                print(f"{setup}: out of time", flush=True)
                continue
            done = list(record["results"])

            def keep(found: dict[str, Any], done: list = done) -> None:
                record["results"] = [*done, found]
                bench.write_record(record, args.out)

            try:
                found = climb(
                    setup,
                    device,
                    repeats=repeats,
                    deadline=started + args.budget,
                    num_steps=2 if args.dry else cases.NUM_STEPS,
                    dry=args.dry,
                    on_rung=keep,
                )
            except RuntimeError as error:  # a GPU that has failed once fails every later call as well
                traceback.print_exc()
                found = {"setup": setup._asdict(), "what": str(setup), "rungs": [], "failed": first_line(error)}
            failed |= "failed" in found or any("unequal" in r or "failed" in r for r in found["rungs"])
            keep(found)
            print(summary(found), flush=True)
            gc.collect()
    bench.write_record(record, args.out)
    print(f"wrote {args.out}")
    return int(failed)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def summary(found: dict[str, Any]) -> str:
    """One line per rung."""
    lines = [found["what"] + (f": {found['failed']}" if "failed" in found else "")]
    for r in found["rungs"]:
        state = next((f"{k}: {r[k]}" for k in ("skipped", "failed") if k in r), "")
        if "unequal" in r:
            state = tables.unequal(r)
        elif "ms" in r:
            state = f"{cell(r['ms'])} ms, {cell(r['epoch_s'])} s/epoch, {r['tflops']:.3g} TFLOP/s, MFU {r['mfu']:.1%}"
            if "ratio" in r:
                state += f", {cell(r['ratio'])} times as fast as the {plain.STRUCTURE}"
            if "gain_ms" in r:
                state += f", saves {cell(r['gain_ms'])} ms"
            if "predicted" in r:
                state += f" (predicted for an H200: {tables.predicted(r['predicted'])})"
        lines.append(f"  {r['name']:<14} {state}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
