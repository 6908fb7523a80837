"""`fastarat bench`: time by phase, TFLOP/s, share of the machine's own rate and memory of a training step.

The loop that is timed is the trainer's (resident loader, augmentation, step) on random images.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastarat.bench.harness import (
    Ceiling,
    Clock,
    Marks,
    Race,
    count_launches,
    matmul_ceiling,
    opened,
    peak_memory,
    placed,
    quartiles,
    race,
    race_phases,
    warmed,
)
from fastarat.card import fast_paths
from fastarat.config import Config, from_dict, resolve_defense
from fastarat.data import Augment, Split, make_loader
from fastarat.defenses import Defense
from fastarat.device import backend_flags, enough_memory, fastest_precision, pick_device, seeded_apart, usable_precision
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.nets.models import build_model
from fastarat.runs import load_start
from fastarat.specs import Attack, Fast, known, setting
from fastarat.values import Precision, settle

EPOCH_IMAGES = 50_000
"""Images of the epoch that times are given for: CIFAR-10's training set."""
H200_BF16 = 790e12
"""Dense bf16 matrix rate to expect of an H200, FLOP/s: a constant to hold results against, not measured here."""
_PHASES = ("data", "attack", "forward", "backward", "optimiser", "metrics")


class Cost(NamedTuple):
    """Work a method needs per image, in forward passes F of the trained network, and of its teacher if it has one.

    A backward to the input counts 1 F, one that also makes weight gradients 2 F. Only what the method needs: work that
    an implementation wastes earns no credit. The attack's last input gradient reaches the stem; the training pass's
    stem gradient to the image, which nobody needs, is 0.3 % of a ResNet-18 and is counted all the same.
    """

    attack: float
    training: float
    teacher: float
    formula: str

    @property
    def forwards(self) -> float:
        """F per image of the trained network."""
        return self.attack + self.training


def cost_of(
    defense: Defense, *, num_steps: int = 10, num_restarts: int = 1, objective: str | None = None, awp: bool = False
) -> Cost:
    """Count what a step of `defense` needs per image.

    K attack steps are 2K (a forward and an input gradient each), times the restarts, of which each then also costs a
    forward to be compared; "kl" takes one forward for the clean logits. The training pass is 3 per batch that is sent
    forward and back. So AT is 2K + 3 = 23, AR-AT and MART 2K + 6 = 26, TRADES 2K + 1 + 6 = 27 for K = 10. What the
    training pass takes is the defense's own word, `Defense.passes`.
    """
    forwards, backwards, teacher_forwards, teacher_backwards = defense.passes()
    restarts = f"{num_restarts} x " if num_restarts > 1 else ""
    terms = []
    attack = 0
    if defense.attacks:
        attack = num_restarts * 2 * num_steps
        terms.append(f"{restarts}2 x {num_steps} attack")
        if (objective or defense.objective) == "kl":
            attack += 1
            terms.append("1 clean logits")
        if num_restarts > 1:
            attack += num_restarts
            terms.append(f"{num_restarts} to compare the restarts")
    training = forwards + 2 * backwards
    terms.append(f"{forwards} forward + 2 x {backwards} backward")
    if awp and defense.attacks:
        # AWP's ascent is a training pass of its own, whose gradients only move the weights apart.
        training *= 2
        terms.append("the same for AWP")
    teacher = teacher_forwards + 2 * teacher_backwards
    return Cost(attack, training, teacher, " + ".join(terms) + (f" (+ {teacher} of the teacher)" if teacher else ""))


def forwards_of(config: Config) -> float:
    """Count the forwards per image of a run's step, its teacher's among them."""
    attack = config.attack
    cost = cost_of(
        config.defense,
        num_steps=attack.num_steps,
        num_restarts=attack.num_restarts,
        objective=attack.objective,
        awp=config.awp is not None,
    )
    return cost.forwards + cost.teacher


def forward_flops(model: nn.Module, images: Tensor) -> int:
    """Count multiplications and additions of `model`'s convolutions and linear layers on `images`, by hooks."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        total += 2 * output.numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(count) for m in layers]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def step_flops(step: TrainStep, example: Tensor) -> tuple[float, Cost, int]:
    """Return FLOP per image of a training step by `cost_of`, that cost, and FLOP of one forward.

    example: float32 [1, C, H, W].
    """
    cost = cost_of(
        step.defense,
        num_steps=step.spec.num_steps,
        num_restarts=step.spec.num_restarts,
        objective=step.spec.objective,
        awp=step.perturbation is not None,
    )
    # Copies: hooks and mode changes must not touch the network that is timed.
    flops = forward_flops(copy.deepcopy(step.model), example)
    teachers = [m for m in step.companions.children() if any(isinstance(c, nn.Conv2d) for c in m.modules())]
    of_teachers = sum(forward_flops(copy.deepcopy(m), example) for m in teachers) if cost.teacher else 0
    return cost.forwards * flops + cost.teacher * of_teachers, cost, flops


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Fast):
    """What `bench` measures. Fields that `Config` has too mean the same."""

    defense: str = setting("ar-at", "defenses, comma-separated, as in fastarat train")
    model: str = setting("resnet18", "network, as in fastarat train")
    batch_size: int | None = setting(None, "images per step (default: 128; 16 on a CPU)")
    image_size: int = setting(32, "pixels of each side of the random images")
    num_classes: int = setting(10, "classes")
    precision: Precision | None = setting(None, "default: bf16 on a GPU, fp32 on a CPU")
    amp: bool | None = setting(None, "as in fastarat train: bf16, on a CPU only where it is faster; --no-amp for fp32")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N")
    awp: float | None = setting(
        None, "gamma_w of adversarial weight perturbation, a share of each weight's norm, such as 0.005", "(0, 1)"
    )
    repeats: int | None = setting(None, "samples (default: 20; 5 on a CPU)")
    steps: int | None = setting(None, "steps per sample (default: half a second's worth)")
    threads: int | None = setting(None, "CPU threads of PyTorch (default: its own choice)")
    attack: Attack = field(default_factory=Attack)

    def fast(self, precision: str) -> Fast:
        """The `Fast` among these fields, in `precision`."""
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(Fast)}
        own["precision"] = precision
        return Fast(**own)

    def __post_init__(self) -> None:
        if isinstance(self.attack, dict):
            object.__setattr__(self, "attack", from_dict(self.attack, Attack, "attack.", "bench"))
        settle(self)
        least = {"batch_size": 2, "image_size": 1, "repeats": 1, "steps": 1, "threads": 1, "num_classes": 2}
        for name, low in least.items():
            if (value := getattr(self, name)) is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected {low} or more")


def bench(
    config: BenchConfig | None = None,
    defenses: Sequence[Defense] | None = None,
    *,
    command: str = "",
    on_result: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure training steps on random images.

    Args:
        config: default `BenchConfig()`: AR-AT, ResNet-18, 32x32.
        defenses: replace those `config` names.
        command: kept in the record.
        on_result: called with the record so far after each defense, and again when its launches are counted.
    Returns: the record: machine, config, and per defense all samples, medians and quartiles.
    Raises: UserError for what cannot be measured.
    """
    config = config or BenchConfig()
    if defenses is None:
        defenses = [resolve_defense(name.strip())() for name in config.defense.split(",")]
    device = pick_device(config.device)
    cuda = device.type == "cuda"
    config = dataclasses.replace(
        config,
        batch_size=config.batch_size or (128 if cuda else 16),
        precision=asked_precision(config, cuda=cuda),
        repeats=config.repeats or (20 if cuda else 5),
    )
    with placed(device, config.threads), seeded_apart(device), enough_memory(known(config.batch_size)):
        record = opened("bench", command, device, data="random images", config=dataclasses.asdict(config))
        for defense in defenses:
            precision, note = _chosen(config, defense, device)
            with backend_flags(device, precision, config.cudnn_plans):
                record["results"].append(_measured(config, defense, device, precision) | {"precision_note": note})
            on_result(record)
        # Apart from the above, because nothing may be timed once a profiler has run.
        for defense, result in zip(defenses, record["results"], strict=True):
            with backend_flags(device, result["precision"], config.cudnn_plans):
                result |= count_launches(partial(_eager, config, defense, device, result["precision"]), device)
            on_result(record)
    return record


def asked_precision(config: BenchConfig, *, cuda: bool) -> Precision | None:
    """Return the precision asked for, by name before `--amp`; None where `--amp` has yet to find it."""
    if config.amp and config.precision is None:
        return "bf16" if cuda else None
    return config.precision or ("bf16" if cuda and config.amp is None else "fp32")


def _chosen(config: BenchConfig, defense: Defense, device: torch.device) -> tuple[str, str]:
    """Return what the step of `defense` is measured in, and why."""
    if config.precision is not None:
        return usable_precision(config.precision, device)
    images, labels = _batch(config, device)

    def build(precision: str) -> Callable[[], object]:
        step = make_step(dataclasses.replace(config, compile_loss=False), defense, device, precision)
        step.set_lr(0.0)
        return lambda: step(images, labels)

    return fastest_precision(device, build)


def _batch(config: BenchConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images float32 [B, 3, H, W], channels-last, and labels int64 [B]."""
    generator = torch.Generator(device).manual_seed(1)
    shape = (known(config.batch_size), 3, config.image_size, config.image_size)
    images = torch.rand(shape, generator=generator, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(config.num_classes, shape[:1], generator=generator, device=device)


def random_split(count: int, shape: tuple[int, int, int], num_classes: int) -> Split:
    """Return random uint8 images and labels as a training split. shape: (C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, *shape[1:], shape[0]), dtype=torch.uint8, generator=generator)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return Split(pixels, labels, torch.arange(count), shape)


def make_step(config: BenchConfig, defense: Defense, device: torch.device, precision: str) -> TrainStep:
    """Build the step that `config` describes, the same weights each time; its batch size and precision are not read."""
    with seeded_apart(device):
        torch.manual_seed(0)
        model = build_model(config.model, num_classes=config.num_classes, image_size=config.image_size).to(device)
        load_start(defense, model)
        example = torch.empty(2, 3, config.image_size, config.image_size)
        fast = config.fast(precision)
        return TrainStep(model, defense, example, attack=config.attack, fast=fast, awp=config.awp)


def _measured(config: BenchConfig, defense: Defense, device: torch.device, precision: str) -> dict[str, Any]:
    clock, size, side, rounds = Clock(device), known(config.batch_size), config.image_size, known(config.repeats)
    split = random_split(size * (64 if device.type == "cuda" else 4), (3, side, side), config.num_classes)
    options: dict[str, Any] = {"shuffle": True, "augment": Augment(4, True), "drop_last": True}
    loader = make_loader(split, batch_size=size, device=device, kind="resident", **options)
    batches = chain.from_iterable(map(loader.epoch, count()))
    made: list[TrainStep] = []

    # Built inside: `warmed` counts building, compiling and capturing as what comes before the first step.
    def build() -> Callable[[], None]:
        made.append(make_step(config, defense, device, precision))
        return once

    def once() -> None:
        batch = next(batches)
        made[0].set_lr(0.01)
        made[0].forward.progress.fill_(0.5)
        made[0](batch.images, batch.labels)

    _, seconds = warmed(build, device)
    step = made[0]
    ceiling = matmul_ceiling(device)
    timed = race(
        {"loop": once}, clock, ceilings=[ceiling], rounds=rounds, shortest_s=0.5, calls_per_sample=config.steps
    )
    found = {
        "precision": precision,
        "captured": not step.why_eager,
        "why_eager": step.why_eager,
        "fast_paths": fast_paths(step)[0],
        "repeats": config.repeats,
        "steps_per_sample": timed.calls["loop"],
        **seconds,
        "memory": peak_memory(once, device),
        "data_samples_s": [clock(lambda: next(batches), 4) for _ in range(rounds + 1)][1:],
    }
    found["phase_samples_s"], found["phases_of"] = phase_samples(config, defense, device, precision)
    flops, cost, forward = step_flops(step, torch.zeros(1, *split.shape, device=device))
    found["cost"] = cost._asdict() | {"forwards": cost.forwards, "forward_flop": forward, "flop_per_image": flops}
    name = defense.name or type(defense).__name__
    what = f"{name}, {config.model}, {size} images {config.image_size}x{config.image_size}, "
    what += f"PGD-{config.attack.num_steps}, {precision}"
    return {"defense": name, "what": what, **found, **_numbers(found, timed, ceiling, flops * size, size)}


def _numbers(found: dict[str, Any], timed: Race, ceiling: Ceiling, work: float, size: int) -> dict[str, Any]:
    """What follows from the samples. work: FLOP of a step."""
    loop, matmul = timed.samples["loop"], timed.samples[ceiling.name]
    phases = {"data": found["data_samples_s"], **found["phase_samples_s"]}
    return {
        "samples_s": {"loop": loop, "matmul": matmul},
        "ms": quartiles(loop, 1e3),
        "epoch_s": quartiles(loop, EPOCH_IMAGES / size),
        "images_per_s": quartiles([size / s for s in loop]),
        "tflops": quartiles([work / s / 1e12 for s in loop]),
        "peak": {"name": ceiling.name, "tflops": quartiles([ceiling.amount / s / 1e12 for s in matmul])},
        "mfu": timed.share("loop", work, ceiling),
        "phase_ms": {name: quartiles(v, 1e3) for name, v in phases.items()},
    }


def _eager(config: BenchConfig, defense: Defense, device: torch.device, precision: str) -> Callable[[], object]:
    """Build a step like the measured one, uncaptured: it starts the same kernels one by one."""
    step = make_step(dataclasses.replace(config, capture="off"), defense, device, precision)
    return partial(step, *_batch(config, device))


def phase_samples(
    config: BenchConfig, defense: Defense, device: torch.device, precision: str
) -> tuple[dict[str, list[float]], str]:
    """Time the phases of a step like the measured one, each of its marks a node of the graph if it is captured."""
    (images, labels), reason = _batch(config, device), ""
    for capture in dict.fromkeys((config.capture, "off")):
        # A step of its own: events in its graph cost a little, and the loop that is timed as a whole shall have none.
        step = make_step(dataclasses.replace(config, capture=capture), defense, device, precision)
        step.mark = marks = Marks(device)
        try:
            found = race_phases({"step": (lambda step=step: step(images, labels), marks)}, rounds=known(config.repeats))
        except (RuntimeError, UserError) as error:
            if capture == "off":
                raise
            reason = f" (marks inside the graph failed: {str(error).splitlines()[0]})"
            continue
        samples = {phase: s for phase, s in found["step"].items() if phase != "attack" or defense.attacks}
        return samples, ("the same step uncaptured" + reason) if step.why_eager else "the captured step"
    raise AssertionError("an eager step has phases")


def render(record: dict[str, Any]) -> str:
    """Return a record of `bench` as a table for a terminal: medians, and quartiles in brackets."""
    where = record["machine"]
    lines = [
        f"{where['device']}, torch {where['torch']}"
        + ("" if "driver_version" in where else f", {where['threads']} threads")
        + f"; {record['data']}",
    ]
    for r in record["results"]:
        rows = {
            "": r["what"],
            "precision": r["precision_note"],
            "fast paths": ", ".join(r["fast_paths"]) or "none",
            "captured": "yes" if r["captured"] else f"no: {r['why_eager']}",
            f"epoch of {EPOCH_IMAGES:,} images": cell(r["epoch_s"]) + " s",
            "step": cell(r["ms"]) + " ms, data included",
            "images/s": cell(r["images_per_s"]),
            "work": f"{r['cost']['forwards']:g} forwards per image = {r['cost']['formula']}; "
            f"{r['cost']['flop_per_image'] / 1e9:.3g} GFLOP",
            "TFLOP/s": cell(r["tflops"]),
            "machine's rate": f"{cell(r['peak']['tflops'])} TFLOP/s, {r['peak']['name']}, in the same run",
            "MFU": f"{r['mfu']['median']:.1%} ({r['mfu']['q1']:.1%} to {r['mfu']['q3']:.1%})",
            "phases": f"of {r['phases_of']}",
            **{f"  {name}": cell(r["phase_ms"][name]) + " ms" for name in _PHASES if name in r["phase_ms"]},
            "peak memory": "not measured"
            if r["memory"]["peak_bytes"] is None
            else f"{r['memory']['peak_bytes'] / 2**20:,.0f} MiB ({r['memory']['method']})",
            "per step, eager": launched(r),
            "before the first timed step": f"{r['warmup_s']:.1f} s (building, compiling, autotuning, capturing)"
            + (f", {r['first_call_s']:.1f} s of it the first call" if "first_call_s" in r else ""),
        }
        if "H200" in where["device"]:
            rows["share of 790 TFLOP/s"] = f"{r['tflops']['median'] * 1e12 / H200_BF16:.1%} (an H200's usual rate)"
        width = max(map(len, rows))
        lines += ["", *(f"{key:<{width}}  {value}" for key, value in rows.items())]
    return "\n".join(lines)


def launched(result: dict[str, Any]) -> str:
    """Say what a step starts, as `count_launches` found it."""
    return ", ".join(f"{count:,} {kind}" for kind, count in result.get("launches", {}).items()) or "not counted"


def cell(q: dict[str, float]) -> str:
    """Format quartiles: median (q1 to q3), with as many digits as they deserve."""
    style = ",.0f" if abs(q["median"]) >= 100 else ".3g"
    return f"{q['median']:{style}} ({q['q1']:{style}} to {q['q3']:{style}})"
