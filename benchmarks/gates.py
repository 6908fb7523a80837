"""The equality tests that contestants must pass before they are timed, and the twins they are held against."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import plain
from fastarat.attacks import Attacked, random_start
from fastarat.bench.harness import Equality
from fastarat.defenses import ARAT, AT, TRADES, Defense
from fastarat.device import float32_flags, seeded_apart, switched
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError, unknown
from fastarat.nets.models import build_model
from fastarat.specs import Attack, Fast

EPSILON, STEP_SIZE, NUM_STEPS = 8 / 255, 2 / 255, 10
IMAGE_SIZE, NUM_CLASSES = 32, 10
PLAIN_MODELS = ("resnet18", "resnet-small")
DEFENSES: dict[str, tuple[Defense, str | None]] = {
    "ar-at": (ARAT(), None),
    "at": (AT(), None),
    "at-eval": (AT(), "eval"),
    "trades": (TRADES(), None),
}
"""Name -> defense, and BatchNorm of its attack where it is not the defense's own."""
PLAINEST = Fast(channels_last=False, kernels="plain", capture="off", fold_bn=False)
"""Our step with every fast path off."""


class Unavailable(Exception):
    """This cannot run on this machine; the text says why."""


@dataclass(frozen=True)
class Setup:
    """What a run asks for.

    precision: of the fast side; None: what each case measures unless told. dry: as small as possible, only to prove
    that everything works. short: of a ladder, only the last few rungs.
    """

    model: str
    batch_size: int
    device: str
    precision: str | None = None
    dry: bool = False
    defense: str = "ar-at"
    num_steps: int = NUM_STEPS
    short: bool = False

    @classmethod
    def parse(cls, text: str, device: str = "cpu", *, dry: bool = False) -> Setup:
        """Read DEFENSE:MODEL:BATCH[:short]."""
        parts = text.split(":")
        if len(parts) not in (3, 4) or not parts[2].isdigit() or int(parts[2]) < 2 or parts[3:] not in ([], ["short"]):
            raise UserError(f"setup {text!r}: expected DEFENSE:MODEL:BATCH[:short], such as ar-at:resnet18:128")
        if parts[0] not in DEFENSES:
            raise unknown("defense", parts[0], DEFENSES)
        model, batch_size, num_steps = ("resnet-small", 4, 2) if dry else (parts[1], int(parts[2]), NUM_STEPS)
        return cls(model, batch_size, device, None, dry, parts[0], num_steps, short=len(parts) == 4)

    @property
    def settled(self) -> Setup:
        """This setup with one precision: bf16 on CUDA, fp32 on a CPU, unless told."""
        return replace(self, precision=self.precision or ("bf16" if self.device != "cpu" else "fp32"))

    @property
    def attack_bn(self) -> str:
        defense, attack_bn = DEFENSES[self.defense]
        return attack_bn or defense.attack_bn


class Batch(NamedTuple):
    """images: float32 [B, 3, 32, 32], NCHW. labels: int64 [B]."""

    images: Tensor
    labels: Tensor

    def laid_out(self, channels_last: bool) -> Tensor:
        return self.images.contiguous(memory_format=torch.channels_last) if channels_last else self.images


def random_batch(setup: Setup, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(setup.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(setup.device)
    return Batch(images, torch.randint(NUM_CLASSES, (setup.batch_size,), generator=generator).to(setup.device))


class _Double(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def engine_step(
    setup: Setup, fast: Fast, num_steps: int | None = None, *, defense: Defense | None = None, double: bool = False
) -> TrainStep:
    """Build our step; equal setups have equal weights. double: in float64, but for the images."""
    num_steps = setup.num_steps if num_steps is None else num_steps
    device = torch.device(setup.device)
    kind, attack_bn = DEFENSES[setup.defense]
    with seeded_apart(device):
        torch.manual_seed(0)
        model = build_model(setup.model, num_classes=NUM_CLASSES, image_size=IMAGE_SIZE).to(device)
        if double:
            model.double().normalize = _Double()
        attack = Attack(epsilon=EPSILON, step_size=STEP_SIZE, num_steps=max(num_steps, 1), bn=attack_bn)
        return TrainStep(model, defense or kind, torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE), attack=attack, fast=fast)


Loop = plain.ARATLoop | plain.SimpleLoop


def released_loop(setup: Setup, num_steps: int | None = None, *, double: bool = False) -> Loop:
    """Build the loop of the released structure with the weights that `engine_step` gives."""
    num_steps = setup.num_steps if num_steps is None else num_steps
    if setup.model not in PLAIN_MODELS:
        raise Unavailable(
            f"the loop of the {plain.STRUCTURE} has no {setup.model}; choose --model {' or '.join(PLAIN_MODELS)}"
        )
    budget = {"epsilon": EPSILON, "step_size": STEP_SIZE, "num_steps": num_steps}
    step = engine_step(setup, PLAINEST)
    stages = [getattr(step.model, f"layer{i}") for i in range(1, step.model.num_stages + 1)]
    first = [stage[0].conv1 for stage in stages]
    network = plain.ResNet([c.out_channels for c in first], len(stages[0]), [c.stride[0] for c in first], NUM_CLASSES)
    if setup.defense == "ar-at":
        predictors = nn.ModuleList(
            plain.predictor(own.layers[-1].out_features) for own in step.companions["predictor_adv"]
        )
        gamma = float(step.companions["balance"].gamma)
        modules = [m.to(setup.device, torch.float64 if double else torch.float32) for m in (network, predictors)]
        loop = plain.ARATLoop(*modules, gamma=gamma, **budget)
    else:
        trades, network = setup.defense == "trades", network.to(setup.device)
        loop = plain.SimpleLoop(network, trades=trades, attack_mode=setup.attack_bn, **budget)
    level(step, loop)
    return loop


def level(step: TrainStep, loop: Loop) -> None:
    """Give the loop the engine's weights and statistics."""
    loop.model.load(step.model.state_dict())
    if isinstance(loop, plain.ARATLoop):
        for own, theirs in zip(step.companions["predictor_adv"], loop.predictors, strict=True):
            theirs.load_state_dict(own.layers.state_dict())


class Outcome(NamedTuple):
    """Adversarial images; loss and weights after a training step; all compared in float64."""

    crafted: Tensor
    loss: float
    state: dict[str, Tensor]


def _state_of(step: TrainStep) -> dict[str, Tensor]:
    found = dict(step.model.state_dict())
    for i, own in enumerate(dict(step.companions.items()).get("predictor_adv", ())):
        found |= {f"predictor {i}.{key}": value for key, value in own.layers.state_dict().items()}
    return {key: value.to(torch.float64, copy=True) for key, value in found.items()}


def _state_of_loop(loop: Loop) -> dict[str, Tensor]:
    """By the engine's names; a loop for one kind of image has a clean branch that it never uses."""
    both = isinstance(loop, plain.ARATLoop)
    found = {plain.shared_key(k): v for k, v in loop.model.state_dict().items() if both or ".clean." not in k}
    for i, theirs in enumerate(loop.predictors if both else ()):
        found |= {f"predictor {i}.{key}": value for key, value in theirs.state_dict().items()}
    return {key: value.to(torch.float64, copy=True) for key, value in found.items()}


QUANTITIES = (
    "adversarial pixels that differ by more than 1e-5, share",
    "loss, relative",
    "weight update, worst tensor, relative",
    "weight update, all tensors together, relative",
    "running statistics, worst tensor, relative",
)
ROUNDING = {
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


def _worse(one: float, other: float) -> float:
    """The larger; NaN is the worst there is, which `max` may pass over."""
    return one if math.isnan(one) or one >= other else other


def _differences(found: Outcome, wanted: Outcome, before: dict[str, Tensor]) -> list[float]:
    """Return the quantities, of what `wanted` has. before: what both began with.

    An update is held against its own size, so that a wrong gradient cannot hide behind the weight.
    """
    worst, running, off, moved = 0.0, 0.0, 0.0, 0.0
    for key, value in wanted.state.items():
        difference = (found.state[key] - value).norm().item()
        if "num_batches" in key:
            running = _worse(running, difference)
        elif "running" in key:
            running = _worse(running, difference / max(value.norm().item(), 1e-12))
        else:
            update = (value - before[key]).norm().item()
            # By tensor as well as in all: a wrong gradient of one small layer drowns in the sum over a ResNet.
            worst = _worse(worst, difference / max(update, 1e-12))
            off, moved = off + difference**2, moved + update**2
    pixels = ((found.crafted.double() - wanted.crafted.double()).abs() > 1e-5).double().mean().item()
    loss = abs(found.loss - wanted.loss) / abs(wanted.loss)
    return [pixels, loss, worst, math.sqrt(off / max(moved, 1e-24)), running]


def step_differences(setup: Setup, *, double: bool, num_steps: int, steps: int = 1) -> dict[str, float]:
    """Take `steps` AR-AT steps on both sides, each from equal weights, and return the largest differences of any.

    Momentum is each side's own. Left to themselves, two runs of one step part: rounding flips a sign, and so on.
    """
    # Eager: a captured step hands over what its warm-up crafted. That the two agree is the engine's own test.
    fast = Fast(precision="fp32" if double else setup.precision, capture="off")
    step = engine_step(setup, fast, num_steps, double=double)
    loop, batch = released_loop(setup, num_steps, double=double), random_batch(setup)
    crafted: list[Tensor] = []
    attack = step.attack

    def remember(images: Tensor, labels: Tensor) -> Attacked:
        # Without steps, what is compared is the training step alone, on equal images.
        attacked = attack(images, labels) if num_steps else Attacked(images.clone(), None)
        crafted.append(attacked.images)
        return attacked

    step.attack = remember
    largest = [0.0] * len(QUANTITIES)
    for _ in range(steps):
        level(step, loop)
        before = _state_of(step)
        # The noisy batch that the step will make, its generator left where it is.
        generator = torch.Generator(setup.device)
        generator.set_state(step.generator.get_state())
        images = batch.laid_out(channels_last=True)
        noisy = random_start(images, epsilon=EPSILON, kind="uniform-unclamped", generator=generator).contiguous()
        loss = sum(t.item() for t in step(images, batch.labels).values())
        theirs = loop(noisy.to(torch.float64 if double else torch.float32), batch.labels, torch.zeros_like(noisy))
        wanted = Outcome(loop.adversarial, theirs, _state_of_loop(loop))
        found = _differences(Outcome(crafted[-1], loss, _state_of(step)), wanted, before)
        largest = [_worse(*pair) for pair in zip(largest, found, strict=True)]
    return dict(zip(QUANTITIES, largest, strict=True))


def check_step(setup: Setup) -> Equality:
    """Compare a whole AR-AT step in float64 on a few images, and its parts in the precision that is timed.

    In float32 rounding flips the sign of a few gradients that are nearly zero, and one ReLU at its kink moves many of
    them a little. One attack step leaves the difference at those pixels, ten carry it into a quarter of all others
    (measured), and one pixel in five thousand moves BN's gradients by a fifth (measured). So only float64 compares the
    whole; as timed, one attack step and, apart from it, the training step on images that are equal.
    """
    few = replace(setup, batch_size=4)
    # The engine's cross-entropies, predictors and images are float32 even around a float64 network.
    limits = (0.0, 1e-5, 1e-3, 1e-3, 1e-5)
    found = step_differences(few, double=True, num_steps=NUM_STEPS)
    checked = {f"float64: {name}": (value, limit) for (name, value), limit in zip(found.items(), limits, strict=True)}
    # The predictors' BatchNorm over two or four rows magnifies bf16's rounding beyond any band (measured: 1.14 of an
    # update at 2 images, 0.72 at 4, and 0.41 to 0.49 from 8 to 128).
    timed = replace(setup, batch_size=max(setup.batch_size, 16)) if setup.precision == "bf16" else setup
    with float32_flags(tf32=False), switched(torch.backends.cudnn, benchmark=False):
        attack, train = (step_differences(timed, double=False, num_steps=n) for n in (1, 0))
    for name, limit in zip(QUANTITIES, ROUNDING[setup.precision], strict=True):
        part, value = ("1 attack step", attack[name]) if "pixels" in name else ("no attack", train[name])
        checked[f"{setup.precision}, {part}: {name}"] = (value, limit)
    return checked


def check_attack(setup: Setup) -> Equality:
    """Compare the attacks alone: ten steps in float64 on a few images, one in the precision that is timed."""
    return {name: found for name, found in check_step(setup).items() if QUANTITIES[0] in name}


def _pinned(setup: Setup, start: Tensor, *, stays: bool) -> Defense:
    """The setup's defense without its own randomness: its attack begins at `start`, its clean batch is the batch.

    stays: the attack ends where it begins, which leaves the training step alone.
    """
    # A copy: DEFENSES holds one instance for everybody, and this one gets methods of its own.
    defense = copy.copy(DEFENSES[setup.defense][0])

    def attack(pgd, forward, images, labels, target, own_start, **options):
        channels_last = own_start.is_contiguous(memory_format=torch.channels_last)
        at = Batch(start.to(own_start), labels).laid_out(channels_last)
        return Attacked(at, None) if stays else pgd(forward, images, labels, target, at)

    # An attribute of the instance hides the class's method; a defense is a frozen dataclass.
    object.__setattr__(defense, "inputs", lambda images, **options: images)
    object.__setattr__(defense, "attack", attack)
    return defense


def _sharpened(model: nn.Module) -> nn.Module:
    """A fresh network answers almost evenly, so that a divergence between two answers vanishes: make it answer."""
    with torch.no_grad():
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.mul_(10)
    return model


def _outcome(setup: Setup, fast: Fast | None, batch: Batch, start: Tensor) -> Outcome:
    """One attack step from `start`, and a training step on `start` itself. fast: None is the released structure."""
    if fast is None:
        attacking, loop = (released_loop(setup, n) for n in (1, 0))
        _sharpened(attacking.model), _sharpened(loop.model)
        crafted = attacking.attack(batch.images, batch.labels, start)
        return Outcome(crafted, loop(batch.images, batch.labels, start), _state_of_loop(loop))
    images = batch.laid_out(fast.channels_last)
    eager = replace(fast, capture="off", compile_loss=False)
    attacking = engine_step(setup, eager, 1, defense=_pinned(setup, start, stays=False))
    step = engine_step(setup, fast, 1, defense=_pinned(setup, start, stays=True))
    _sharpened(attacking.model), _sharpened(step.model)
    crafted = attacking.attack(images, batch.labels).images
    loss = sum(t.item() for t in step(images, batch.labels).values())
    return Outcome(crafted, loss, {key: value.double() for key, value in step.model.state_dict().items()})


def check_rung(setup: Setup, fast: Fast | None, than: Fast = PLAINEST) -> Equality:
    """Compare a form of the step with the plainest, on a few images. fast: None is the released structure.

    Both start from the same weights and the same start of the attack; TF32 is off. One step of the attack, and apart
    from it a training step: rounding flips signs of gradients near zero, and ten steps carry that into every pixel.
    """
    setup = replace(setup, batch_size=8, precision="fp32")
    if fast is None and setup.defense == "ar-at":
        return check_step(setup)
    batch = random_batch(setup)
    noise = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(2)).to(setup.device)
    start = (batch.images + 0.2 * noise).clamp(0, 1)
    with float32_flags(tf32=False), switched(torch.backends.cudnn, benchmark=False):
        before = _sharpened(engine_step(setup, than, 1).model).state_dict()
        before = {key: value.double() for key, value in before.items()}
        found, wanted = (_outcome(setup, form, batch, start) for form in (fast, than))
    values = _differences(found, wanted, before)
    if fast is None and setup.defense == "trades":
        values[-1] = 0.0  # its loop sends the clean batch forward twice in the loss, which moves statistics once more
    limits = ROUNDING["bf16" if fast is not None and fast.precision == "bf16" else "fp32"]
    parts = ["1 attack step", *["training step"] * 4]
    return {f"{p}: {q}": (v, most) for p, q, v, most in zip(parts, QUANTITIES, values, limits, strict=True)}


def check_captured(setup: Setup, fast: Fast) -> Equality:
    """Compare a captured step, its attack and its random start included, with itself run eagerly: two replays.

    Both draw the same noise, and cuDNN is held to deterministic algorithms, so that little but an error of the capture
    is left to tell them apart. After ten attack steps the pixels are not compared: whatever rounding is left spreads to
    all of them. With one step they are, and the bands are narrower.
    """
    setup = replace(setup, batch_size=min(setup.batch_size, 16))
    half = fast.precision == "bf16"
    bands = {
        1: ROUNDING["tf32" if half else "fp32"],
        setup.num_steps: (math.inf, *ROUNDING["bf16" if half else "fp32"][1:]),
    }
    checked = {}
    for num_steps, limits in bands.items():
        with float32_flags(tf32=False), switched(torch.backends.cudnn, benchmark=False, deterministic=True):
            found = _twin_differences(setup, fast, num_steps)
        for quantity, value, limit in zip(QUANTITIES, found, limits, strict=True):
            if limit < math.inf:
                checked[f"captured against eager, {num_steps} attack step(s): {quantity}"] = (value, limit)
    return checked


def _twin_differences(setup: Setup, fast: Fast, num_steps: int) -> list[float]:
    """Take two steps captured and eagerly, each on a batch of its own and from equal weights; return the largest."""
    twins = [engine_step(setup, form, num_steps) for form in (fast, replace(fast, capture="off"))]
    crafted = [_keep_crafted(step, random_batch(setup)) for step in twins]
    largest = [0.0] * len(QUANTITIES)
    for number in (1, 2):
        batch = random_batch(setup, seed=number)
        # In place: a graph holds the weights by address.
        twins[0].model.load_state_dict(twins[1].model.state_dict())
        twins[0].companions.load_state_dict(twins[1].companions.state_dict())
        before = _state_of(twins[1])
        losses = [
            sum(t.item() for t in step(batch.laid_out(fast.channels_last), batch.labels).values()) for step in twins
        ]
        ours, theirs = (
            Outcome(images.clone(), loss, _state_of(step))
            for step, images, loss in zip(twins, crafted, losses, strict=True)
        )
        largest = [_worse(*pair) for pair in zip(largest, _differences(ours, theirs, before), strict=True)]
    return largest


def _keep_crafted(step: TrainStep, example: Batch) -> Tensor:
    """Return a tensor that each step, replays included, leaves its adversarial images in."""
    kept, attack = torch.empty_like(example.images), step.attack

    def remember(images: Tensor, labels: Tensor) -> Attacked:
        attacked = attack(images, labels)
        kept.copy_(attacked.images)
        return attacked

    step.attack = remember
    return kept
