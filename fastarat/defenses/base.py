"""What a defense is: hyper-parameters, how it attacks, and a loss. One class, one file, about thirty lines."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.losses import hard, smoothed
from fastarat.nets.attacker import autocast, mode_of
from fastarat.nets.batchnorm import check_groups, route_of
from fastarat.nets.taps import Taps, forward_with_features
from fastarat.specs import Attack
from fastarat.values import EPSILON, checked_budget, settle

_Companion = TypeVar("_Companion", bound=nn.Module)
# None in a tensor's place: a loss reads only what its own forward has put there, and there it is a tensor.
_UNSET: Any = None


class Views(NamedTuple):
    """What a loss sees: tensors only, so that it can be compiled whole and worked out by hand.

    labels: int64 [B]. logits_clean, logits_adv: float [B, K] or None. features_clean, features_adv: tuples of
    float [B, d]. kappa: int64 [B] or None. num_steps: PGD steps. progress: 0-d float in [0, 1], share of the run that
    is done. epoch: 0-d float, the current epoch from 1. Both are float32, or float64 beside a float64 network.
    extra: further tensors of the defense, by name. soft: float [B, K], shares of the classes, where labels are smoothed
    or images mixed, or None; `labels` are then the largest of what was mixed.
    """

    labels: Tensor
    logits_clean: Tensor = _UNSET
    logits_adv: Tensor = _UNSET
    features_clean: tuple[Tensor, ...] = ()
    features_adv: tuple[Tensor, ...] = ()
    kappa: Tensor = _UNSET
    num_steps: int = 0
    progress: Tensor = _UNSET
    epoch: Tensor = _UNSET
    extra: dict[str, Tensor] = {}
    soft: Tensor = _UNSET

    @property
    def targets(self) -> Tensor:
        """What cross-entropies are taken against: `soft` where there is one, else `labels`."""
        return self.labels if self.soft is None else self.soft


def network_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of what is computed beside a network: float64 for a float64 one, float32 for any other."""
    first = next(model.parameters(), None)
    return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32


def part_of(companions: nn.ModuleDict, name: str, kind: type[_Companion]) -> _Companion:
    """Return the companion `name`, known to be a `kind`."""
    found = companions[name]
    assert isinstance(found, kind), f"companion {name} is a {type(found).__name__}, not a {kind.__name__}"
    return found


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms, what is minimised: a 0-d float."""
    return reduce(torch.add, terms.values())


class Forward:
    """The engine's forward, handed to defenses: BatchNorm branch, precision and features are its business.

    forward(images, "adv") -> (logits [B, K], ()); forward(torch.cat([clean, adv]), "clean", "adv", layers=...)
    -> (logits [2B, K], one feature tensor [2B, d] per layer).

    epsilon, num_steps: of the attack. generator: of everything random in the step. progress, epoch: 0-d device
    tensors, so that a captured step sees them move. still: no running statistic moves. weights: makes what the model's
    forwards use in place of its parameters, by their names; None for the parameters themselves. smoothing: of the
    targets of a loss's cross-entropies. batch_mean: makes, of one number per image of those at hand, the mean over the
    batch of all processes; None where the batch is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str,
        attack: Attack,
        generator: torch.Generator,
        smoothing: float = 0.0,
        batch_mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.precision, self.route, self.still = model, precision, route_of(model), False
        self.num_steps, self.generator = attack.num_steps, generator
        self.epsilon: float | Tensor = attack.epsilon
        self.weights: Callable[[], dict[str, Tensor]] | None = None
        self.smoothing = smoothing
        self.batch_mean = batch_mean
        dtype = network_dtype(model)
        self.progress = torch.zeros((), device=generator.device, dtype=dtype)
        self.epoch = torch.ones((), device=generator.device, dtype=dtype)

    def but(self, *, model: nn.Module | None = None, still: bool = False) -> Forward:
        """Return the same forward through another network, or one that leaves the running statistics alone."""
        other = copy.copy(self)
        other.still = still
        if model is not None:
            other.model, other.route, other.weights = model, route_of(model), None
        return other

    def views(self, labels: Tensor, **tensors: Any) -> Views:
        """Build `Views` with labels, their soft form, num_steps, progress and epoch filled in.

        labels: as the step was given them, int64 [B] or float [B, K].
        """
        soft = _UNSET
        if self.smoothing or labels.is_floating_point():
            logits = next(t for t in map(tensors.get, ("logits_adv", "logits_clean")) if t is not None)
            soft = smoothed(labels, self.smoothing, logits.shape[1], self.progress.dtype)
        where = {"num_steps": self.num_steps, "progress": self.progress, "epoch": self.epoch}
        return Views(hard(labels), soft=soft, **where, **tensors)

    def share(self, each: Tensor) -> dict[str, Tensor]:
        """Return {"share": mean of `each` here over its mean in the whole batch}, for `weighed`.

        each: float [B], what a loss's weights are before they are divided by their mean.
        """
        assert self.batch_mean is not None
        return {"share": each.mean() / self.batch_mean(each).clamp_min(1e-30)}

    def companion(self, module: nn.Module, images: Tensor) -> Tensor:
        """Run another network (a teacher) in the engine's precision. images: float32 [B, C, H, W]."""
        with autocast(images, self.precision):
            return module(images)

    def __call__(
        self,
        images: Tensor,
        *branches: str,
        layers: Iterable[str] = (),
        relu: bool = True,
        pool: bool = True,
        updates: tuple[str, ...] | None = None,
        training: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        taps = Taps(tuple(layers), relu, pool) if layers else None
        check_groups(branches, updates)
        through = self.route.through(*branches, updates=() if self.still else updates)
        with mode_of(self.model, training), through, autocast(images, self.precision):
            weights = None if self.weights is None else self.weights()
            logits = forward_with_features(self.model, images, taps, weights)
        return logits, () if taps is None else taps.ordered()


def weighed(loss: Tensor, views: Views) -> Tensor:
    """Turn a loss whose weights are normalised over the images at hand into this rank's part of the batch's."""
    return loss * views.extra["share"].to(loss.dtype) if "share" in views.extra else loss


class Passes(NamedTuple):
    """Batches of B images that a training pass, the attack apart, sends forward and back; those of a teacher."""

    forwards: int
    backwards: int
    teacher_forwards: int = 0
    teacher_backwards: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What, beside a defense's own fields, decides whether a run is as released; the defaults are most releases'.

    epsilon, step_size: pixel units. model: name, as in `build_model`. image_size: pixels of the smaller side. recipe:
    name of the schedule; lr, epochs, batch_size: in the end, whatever they come from. start: of the attack, if given.
    """

    norm: str = "linf"
    epsilon: float = EPSILON
    step_size: float = checked_budget(EPSILON).step_size
    model: str = "resnet18"
    image_size: int = 32
    recipe: str = "arat"
    lr: float = 0.1
    epochs: int = 100
    batch_size: int = 128
    normalize: bool = False
    num_steps: int = 10
    start: str | None = None


def as_typed(value: float) -> str:
    """Write a length in pixel units as one types it: 8/255, or 0.031 where it is no fraction of 255."""
    top = value * 255
    whole = math.isclose(top, round(top), rel_tol=1e-9) and round(top) > 0
    return f"{round(top)}/255" if whole else f"{value:.5g}"


@dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of every defense; the fields of a subclass are its hyper-parameters, with the paper's defaults.

    Values take the type their field declares ("6" and "8/255" are numbers), and lie in the `range` its metadata may
    hold ("[0, inf)"); a `__post_init__` of a subclass calls this one first.
    A subclass sets the class constants that differ, and writes `loss`. State lives only in the modules returned by
    `companions` (as parameters or buffers): it is then checkpointed, moved and seen by the compiled loss.
    """

    name: ClassVar[str] = ""
    objective: ClassVar[str] = "ce"
    """What the attack maximises: "ce" or "kl" (against the clean logits)."""
    attack_bn: ClassVar[str] = "eval"
    """BN during the attack: "eval"; "train" (running statistics move too); "train-frozen"."""
    start: ClassVar[str] = "uniform"
    """Random start of the attack, as in `attacks.random_start`."""
    attacks: ClassVar[bool] = True
    """False for standard training: no attack at all."""
    needs_clean: ClassVar[bool] = False
    """The training forward takes [clean; adv] rather than adv alone."""
    counts_kappa: ClassVar[bool] = False
    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "hard"
    """What the classes of images may be: "hard", one each, since `loss` reads `views.labels`; "smoothed", where its
    cross-entropies read `views.targets`, but something else asks for an image's class; "mixed", any shares of classes.
    """
    regularizers: ClassVar[tuple[str, ...]] = ()
    """Names of the loss terms that pull adversarial outputs or features to clean ones; the others classify."""
    formula: ClassVar[str] = ""
    """The loss in one line, for the run card."""
    updates: ClassVar[tuple[str, ...] | None] = None
    """Order in which the training forward's running statistics are updated; None: clean, then adv."""
    why_eager: ClassVar[str] = ""
    """Why this defense's step cannot be captured as one graph; empty when it can."""
    weighs_batch: ClassVar[bool] = False
    """Whether the loss is no mean over images, because it normalises something over the batch (`Forward.share`)."""
    starts_from: ClassVar[str] = ""
    """Name of the field that holds a `standard` run to start from, for a defense that needs one.

    `fastarat.train` loads that run into the model (`fastarat.runs.load_start`) before it asks for companions.
    """
    start_otherwise: ClassVar[str] = ""
    """What to do instead of naming such a run, as the error that none is named ends; empty when there is nothing."""
    chosen_by: ClassVar[Literal["robust", "clean"]] = "robust"
    """Accuracy on validation images that chooses the best checkpoint; the other one decides between equals."""
    recipe: ClassVar[str] = "arat"
    """Name of the schedule in `fastarat.schedules` used when none is asked for."""
    released_budget: ClassVar[tuple[float, float]] = (8 / 255, 2 / 255)
    """(epsilon, step size) of the released code, in pixel units. A run's own default stays 8/255 and 2/255 for every
    defense, so that their numbers compare; where the release differs, `departures` says so."""
    under_l2: ClassVar[str] = (
        "published for L-infinity: under L2 the attack is the common one, from a random direction by steps along the "
        "normalised gradient"
    )
    """What `departures` says of a run under L2; empty where the release has the same attack."""
    also_released: ClassVar[dict[str, tuple]] = {}
    """Values other than the default which the release has, too, by the setting's dotted name."""

    def __post_init__(self) -> None:
        settle(self, "defense.")

    @property
    def splits(self) -> bool:
        """Whether the network gets one BatchNorm set per branch."""
        return False

    @property
    def needs_start(self) -> bool:
        """Whether these hyper-parameters need the run that `starts_from` speaks of."""
        return bool(self.starts_from)

    def start_kind(self, norm: str) -> str:
        """Return the random start for this norm."""
        return "l2" if norm == "l2" else self.start

    def bn_mode(self, norm: str) -> str:
        """Return the BN mode of the attack for this norm."""
        return self.attack_bn

    def completed(self, attack: Attack) -> Attack:
        """Return `attack` with what it leaves to the defense, and its step size, filled in."""
        return dataclasses.replace(
            attack.stepping(),
            bn=attack.bn or self.bn_mode(attack.norm),
            start=attack.start or self.start_kind(attack.norm),
            objective=attack.objective or self.objective,
        )

    def describe(self, norm: str) -> dict[str, str]:
        """Lines this defense adds to the run card; a subclass puts its own after these."""
        return {}

    def departures(self, run: Settings) -> tuple[str, ...]:
        """Where a run with these settings departs from the release, a sentence each: what differs, and its mend.

        Only what applies to this run: an option at its default is as released unless a sentence says otherwise. The
        sentences go on the run card, and no docstring repeats them. A subclass puts its own after these.
        """
        if not self.attacks:
            return ()
        if run.norm != "linf":
            return (self.under_l2,) if self.under_l2 else ()
        if all(map(math.isclose, (run.epsilon, run.step_size), self.released_budget)):
            return ()
        epsilon, step_size = map(as_typed, self.released_budget)
        flags = f"--attack.epsilon {epsilon} --attack.step-size {step_size}"
        return (
            f"epsilon {as_typed(run.epsilon)}, step {as_typed(run.step_size)}: published with {epsilon} and "
            f"{step_size} ({flags})",
        )

    def equals_default(self, run: Settings) -> dict[str, object]:
        """Values that mean in such a run what leaving the setting out means, by its dotted name."""
        return {}

    def passes(self) -> Passes:
        """Return what the training pass needs; a defense whose forward or backward is its own says so here."""
        batches = 2 if self.needs_clean else 1
        return Passes(batches, batches)

    def why_hard(self, *, mixed: bool, objective: str | Callable | None = None) -> str:
        """Why labels cannot be smoothed (or, if `mixed`, mixed) with this defense and attack; "" where they can.

        objective: of the attack, the defense's own unless given.
        """
        named, owners = self.name or type(self).__name__, type(self).__mro__
        # A subclass that writes its own loss says so itself: the one it derives from spoke of another.
        loss, targets = (next(i for i, c in enumerate(owners) if name in vars(c)) for name in ("loss", "targets"))
        allowed = "hard" if loss < targets else self.targets
        if mixed and self.attacks and (objective or self.objective) == "cw":
            return "the attack's objective cw is a margin to the one class of an image"
        if allowed == "mixed" or (allowed == "smoothed" and not mixed):
            return ""
        if allowed == "smoothed":
            return f"{named} asks of each image whether its one class is met"
        return f"the loss of {named} is of one class per image, not of shares of classes"

    def companions(self, model: nn.Module, example: Tensor) -> nn.ModuleDict:
        """Build further modules (predictors, teachers, buffers). example: float32 [2, C, H, W] in [0, 1].

        model: the network as training begins, the weights of `starts_from` loaded.
        """
        return nn.ModuleDict()

    def inputs(
        self, images: Tensor, *, epsilon: float | Tensor, norm: str, generator: torch.Generator | None
    ) -> Tensor:
        """Return the batch this defense calls clean: centre of the attack and input of the clean branch."""
        return images

    def before_epoch(self, companions: nn.ModuleDict, probe: Callable[[str, int], Tensor], epoch: int) -> None:
        """Prepare an epoch (1-based).

        probe(branch, n): accuracy (0-d float32) in eval mode on about n freshly augmented training images.
        """

    def attack(
        self,
        pgd: Callable[..., Attacked],
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        target: Tensor,
        start: Tensor,
        *,
        run: Forward,
    ) -> Attacked:
        """Craft adversarial images from one start; the default is plain PGD.

        pgd(forward, images, labels, target, start) has epsilon, step size, steps and objective bound
        (`pgd.keywords`). forward: points -> logits in the attack's BN mode, parameters frozen. target: labels, or
        clean logits for "kl". run: for its epoch, progress and generator.
        """
        return pgd(forward, images, labels, target, start)

    def forward(
        self, run: Forward, companions: nn.ModuleDict, images: Tensor, labels: Tensor, attacked: Attacked | None
    ) -> Views:
        """Run the training forward(s) and collect what `loss` needs. images: float32 [B, C, H, W] from `inputs`.

        labels: for `run.views`; int64 [B], or float [B, K] where `targets` is "mixed".
        """
        if attacked is None:
            logits, _ = run(images, "adv")
            return run.views(labels, logits_clean=logits)
        if not self.needs_clean:
            logits, _ = run(attacked.images, "adv")
            return run.views(labels, logits_adv=logits, kappa=attacked.kappa)
        logits, _ = run(torch.cat([images, attacked.images]), "clean", "adv", updates=self.updates)
        clean, adv = logits.chunk(2)
        return run.views(labels, logits_clean=clean, logits_adv=adv, kappa=attacked.kappa)

    def heads(self, companions: nn.ModuleDict, views: Views) -> Views:
        """Apply small companions (predictors) to the features; runs with `loss`, inside what is compiled."""
        return views

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Return the named terms, already weighted; their sum is minimised, each one is logged."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, views) -> dict of scalar terms")

    def backward(
        self, terms: dict[str, Tensor], model: nn.Module, scale: Callable[[Tensor], Tensor], views: Views
    ) -> None:
        """Put gradients into `.grad`, which is None before.

        terms: as `loss` returned them. scale: multiplies by the fp16 loss scale (identity otherwise). views: what the
        terms came from, for a defense that needs the gradient of something else.
        """
        scale(total(terms)).backward()

    def after_step(self, companions: nn.ModuleDict, model: nn.Module, step: Tensor) -> None:
        """Follow an optimiser step. step: 0-d int64, steps done so far.

        What it writes to the model's weights, it writes in place, not through `.data`: nobody would notice.
        """


__all__ = [
    "Attacked",
    "Defense",
    "Forward",
    "Passes",
    "Settings",
    "Views",
    "as_typed",
    "network_dtype",
    "part_of",
    "total",
    "weighed",
]
