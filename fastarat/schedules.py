"""Learning-rate recipes by name, each a pure function of epoch and step.

Epochs count from 1. Sources: the released code named in each recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastarat.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published schedule.

    epochs: run length of the release. lr, weight_decay: its values (weight decay on every parameter).
    drops: (first epoch, factor) pairs, the factor of `lr` from that epoch on. warmup: factor in epoch 1.
    per_step: a drop takes effect at the first step whose fractional epoch (t + 1)/steps reaches it.
    unscaled: run lengths for which the milestones stay as published; at any other they scale with the length, to the
    nearest epoch.
    momentum, nesterov: of SGD.
    one_cycle: share of the run in which the learning rate rises from lr/25 to lr, to fall to lr/250000 in the rest;
    along cosines, one step per epoch, momentum going from 0.95 to 0.85 and back. 0: no such cycle.
    cosine: after the warm-up the learning rate falls to 0 along half a cosine, step by step.
    rises: epochs of `epochs` in which it rises to its value along a line before; other lengths scale it.
    fixed: the drops are those of one person's run: no length scales them.
    """

    epochs: int
    lr: float = 0.1
    weight_decay: float = 5e-4
    drops: tuple[tuple[int, float], ...] = ()
    warmup: float = 1.0
    per_step: bool = False
    unscaled: tuple[int, ...] = ()
    momentum: float = 0.9
    nesterov: bool = False
    one_cycle: float = 0.0
    cosine: bool = False
    rises: int = 0
    fixed: bool = False
    source: str = ""

    def warm_up(self, epochs: int, warmup: int | None = None) -> int:
        """Epochs in which the learning rate rises along a line: `warmup`, or the recipe's own. As in `lr_at`."""
        return math.floor(self.rises * epochs / self.epochs + 0.5) if warmup is None else warmup

    def factor(self, epoch: int, step: int, steps: int, epochs: int, warmup: int | None = None) -> float:
        """The share of `lr` at `step` (from 0) of `steps` in `epoch` (from 1) of `epochs`. warmup: as in `lr_at`."""
        if self.one_cycle:
            return self.cycled(epoch, epochs, first=1 / 25, top=1.0, last=1 / 250_000)
        rising = self.warm_up(epochs, warmup)
        if self.cosine and epoch > rising:
            # As optax's cosine_decay_schedule: the first step after the warm-up has the full rate.
            share = (epoch - 1 - rising + step / steps) / (epochs - rising)
            return (1 + math.cos(math.pi * share)) / 2
        # None is not 0: None leaves the recipe's own first epoch as it is, 0 takes it away.
        if warmup is None and epoch == 1 and self.warmup != 1.0:
            return self.warmup
        # The released codes that go by the step set its rate before it, from the epoch's share that it will complete.
        position = (epoch - 1) + ((step + 1) / steps if self.per_step else 0.0)
        current = 1.0
        for first, factor in self.drops_in(epochs):
            if position >= first - 1 - 1e-9:  # a stretched milestone may lie a rounding above its step
                current = factor
        if rising and epoch <= rising:
            current *= (epoch - 1 + (step + 1) / steps) / rising
        return current

    def drops_in(self, epochs: int) -> tuple[tuple[float, float], ...]:
        """The drops of a run of `epochs` epochs: (first epoch, factor) pairs, those it never comes to left out.

        A milestone between two epochs moves to the nearest, so that recipes whose published milestones differ by an
        epoch in a hundred (AR-AT's 77, TRADES' 75) still drop in the same epoch of a short run.
        """
        stretch = 1.0 if self.fixed or epochs in (self.epochs, *self.unscaled) else epochs / self.epochs
        scaled = [((first - 1) * stretch, factor) for first, factor in self.drops]
        if not self.per_step:
            # Halves go up, those that rounding put just below a half too: Python's `round` would take them to even.
            scaled = [(math.floor(at + 0.5 + 1e-9), factor) for at, factor in scaled]
        return tuple((at + 1, factor) for at, factor in scaled if at < epochs)

    def cycled(self, epoch: int, epochs: int, *, first: float, top: float, last: float) -> float:
        """Value at `epoch` of what goes from `first` to `top` and on to `last`, as torch's OneCycleLR does it."""
        # The peak is OneCycleLR's, which counts both ends: steps 0 to pct_start * total - 1 rise.
        position, peak, end = epoch - 1, max(self.one_cycle * epochs - 1, 0.0), epochs - 1
        if position < peak:
            low, high, share = first, top, position / peak
        else:
            low, high, share = top, last, (position - peak) / max(end - peak, 1e-9)
        return high + (low - high) * (1 + math.cos(math.pi * share)) / 2


_LBGAT = ((76, 0.1), (91, 0.01))
# Both in their codes' own counting, where the factor holds from the epoch named on.
_TRADES = ((75, 0.1), (90, 0.01), (100, 0.001))
_AS_TABLED = Recipe(epochs=100, warmup=0.2, drops=_LBGAT, source="AR-AT released code, as its table intends")
RECIPES: dict[str, Recipe] = {
    # The released table intends the drops one epoch earlier; its scheduler is stepped with the finished epoch's number.
    "arat": replace(
        _AS_TABLED,
        drops=((77, 0.1), (92, 0.01)),
        source="AR-AT released code, as executed (every drop one epoch after its table)",
    ),
    "arat-intended": _AS_TABLED,
    "lbgat": replace(_AS_TABLED, weight_decay=2e-4, source="LBGAT released code"),
    "trades": Recipe(
        epochs=100,
        drops=_TRADES,
        weight_decay=2e-4,
        unscaled=(76, 120),
        source="TRADES released code at 100 epochs, our choice for networks it was not released with",
    ),
    "trades-wrn": Recipe(
        epochs=76,
        drops=_TRADES,
        weight_decay=2e-4,
        unscaled=(100, 120),
        source="TRADES released code, WRN-34-10 (stops one epoch after the first drop)",
    ),
    "mart": Recipe(epochs=120, lr=0.01, drops=_TRADES, weight_decay=3.5e-3, source="MART released code, ResNet-18"),
    "mart-wrn": Recipe(epochs=90, drops=_TRADES, weight_decay=7e-4, source="MART released code, WRN-34-10"),
    "rice": Recipe(
        epochs=200, drops=((101, 0.1), (151, 0.01)), per_step=True, source="robust-overfitting released code"
    ),
    "gairat": Recipe(
        epochs=100, drops=((30, 0.1), (60, 0.01)), weight_decay=2e-4, source="GAIRAT released code, ResNet-18"
    ),
    "gairat-wrn": Recipe(
        epochs=120,
        drops=((60, 0.1), (90, 0.01), (110, 0.005)),
        weight_decay=2e-4,
        source="GAIRAT released code, WRN",
    ),
    "cure": Recipe(
        epochs=120, drops=((100, 0.1),), weight_decay=7e-4, source="CURE released code, its README's command"
    ),
    "cure-200": Recipe(
        epochs=200, drops=((100, 0.1), (150, 0.01)), source="CURE released code, the defaults of its arguments"
    ),
    "vir": Recipe(epochs=115, drops=_TRADES, weight_decay=7e-4, source="VIR released code"),
    "ca-at": Recipe(
        epochs=200,
        one_cycle=0.025,
        nesterov=True,
        source="CA-AT released code, its peak of 0.4 for batches of 1024 taken to 0.1 for 128",
    ),
    "rebuffi": Recipe(
        epochs=400,
        lr=0.4,
        cosine=True,
        rises=10,
        nesterov=True,
        source="Gowal et al. and Rebuffi et al. (2021) released code, its 0.1 for batches of 256 taken to their 1024",
    ),
    "cosine": Recipe(epochs=100, cosine=True, source="half a cosine to 0 (Loshchilov and Hutter, ICLR 2017)"),
    "imagenet": Recipe(
        epochs=90,
        weight_decay=1e-4,
        drops=((31, 0.1), (61, 0.01)),
        source="robust ImageNet models of Salman et al., NeurIPS 2020",
    ),
    "constant": Recipe(epochs=100, source="no schedule"),
}


def recipe_of(name: str, milestones: Sequence[int] | None = None, gamma: float | None = None) -> Recipe:
    """Return a recipe by name, in any case.

    milestones: numbers of epochs after each of which the rate falls by gamma (0.1), in place of the recipe's own drops.
    Raises: UserError naming the nearest recipe; for milestones that do not grow, or of a recipe that takes none.
    """
    if name.lower() not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    recipe = RECIPES[name.lower()]
    if milestones is None and gamma is not None:
        raise UserError(f"optim.gamma={gamma:g} has no milestones to act at: add --optim.milestones 75,90")
    if milestones is None:
        return recipe
    given = ",".join(map(str, milestones))
    if sorted({*milestones}) != [*milestones]:
        raise UserError(f"optim.milestones={given}: expected numbers of epochs that grow, such as 75,90")
    if recipe.one_cycle or recipe.cosine:
        raise UserError(
            f"optim.milestones={given}: the recipe {name} falls along a cosine; leave them out, or choose another "
            "--optim.recipe (constant)"
        )
    factor = 0.1 if gamma is None else gamma
    drops = tuple((after + 1, factor ** (i + 1)) for i, after in enumerate(milestones))
    return replace(recipe, drops=drops, per_step=False, fixed=True)


def lr_at(
    epoch: int,
    step: int,
    *,
    steps: int,
    epochs: int,
    recipe: Recipe,
    lr: float | None = None,
    warmup: int | None = None,
) -> float:
    """Return the learning rate of `step` (from 0) in `epoch` (from 1) of a run of `epochs` epochs of `steps` steps.

    warmup: epochs in which it rises to its value along a line, step by step, in place of the recipe's own first
    epochs; 0: none.

    The S-ARAT recipe as executed, at its own 100 epochs: 0.02 in epoch 1, 0.1 in 2-76, 0.01 in 77-91, 0.001 after.
    """
    return (recipe.lr if lr is None else lr) * recipe.factor(epoch, step, steps, epochs, warmup)


def total_at(epoch: int, epochs: int, extended: Sequence[int] | None = None) -> int:
    """Return the number of epochs whose schedule `epoch` (from 1) follows, in a run of `epochs`.

    extended: the totals that the run had before it was extended, in order; each was run to its end.
    """
    return next((total for total in extended or () if epoch <= total), epochs)


def extended_in_words(
    extended: Sequence[int], *, epochs: int, steps: int, recipe: Recipe, lr: float, warmup: int | None = None
) -> str:
    """Say which epochs of an extended run followed which schedule, and the learning rates on either side."""
    parts, first = [], 1
    for total in (*extended, epochs):
        ends = ((first, 0), (total, steps - 1))
        rates = [lr * recipe.factor(epoch, step, steps, total, warmup) for epoch, step in ends]
        by = f"{first} to {total} by the schedule of {counted(total, 'epoch')}"
        parts.append(f"{by} (lr {rates[0]:.4g} to {rates[1]:.4g})")
        first = total + 1
    return "epochs " + ", ".join(parts)


def in_words(recipe: Recipe, *, epochs: int, lr: float, warmup: int | None = None) -> str:
    """Say the learning rates of a run: `lr 0.02 in epoch 1, then 0.1, 0.01 from epoch 24, 0.001 from 28`."""
    if recipe.one_cycle:
        rises = f"{lr * recipe.factor(1, 0, 1, epochs):.4g} up to " if recipe.one_cycle * epochs > 1 else ""
        falls = f" and down to {lr * ends_at(recipe, epochs=epochs):.2g}" if epochs > 1 else ""
        return f"lr {rises}{lr:.4g}{falls}"
    rising = recipe.warm_up(epochs, warmup)
    if recipe.cosine:
        rises = f"0 to {lr:.4g} in {counted(rising, 'epoch')}, then " if rising else f"{lr:.4g}, "
        return f"lr {rises}along half a cosine to 0"
    # Of several drops in one epoch only the last is ever seen; one within an epoch is a step's.
    rates = {1.0: lr} | {round(at, 2): lr * factor for at, factor in recipe.drops_in(epochs)}
    parts = [f"lr {rates[1.0]:.4g}"]
    if rising:
        parts = [f"lr 0 to {rates[1.0]:.4g} in {counted(rising, 'epoch')}"]
    elif warmup is None and recipe.warmup != 1.0:
        parts = [f"lr {lr * recipe.warmup:.4g} in epoch 1"]
        if epochs > 1:
            parts[0] += f", then {[rate for at, rate in rates.items() if at <= 2][-1]:.4g}"
            rates = {at: rate for at, rate in rates.items() if at > 2}
    named = False
    for at, rate in rates.items():
        if at > 1:
            share = at % 1
            where = f"{share:.0%} into epoch {int(at)}" if share else f"{'' if named else 'epoch '}{int(at)}"
            parts.append(f"{rate:.4g} from {where}")
            named = True
    return ", ".join(parts)


def counted(count: int, noun: str) -> str:
    """Return `1 epoch`, `2 epochs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def ends_at(recipe: Recipe, *, epochs: int, warmup: int | None = None) -> float:
    """The share of its base learning rate that a run of `epochs` epochs ends with. warmup: as in `lr_at`."""
    if recipe.cosine and recipe.warm_up(epochs, warmup) < epochs:
        return 0.0  # the curve's end: the last step is one short of it
    return recipe.factor(epochs, 0, 1, epochs, warmup)


def momentum_at(
    epoch: int, step: int, *, steps: int, epochs: int, recipe: Recipe, momentum: float | None = None
) -> float:
    """Return SGD's momentum at `step` (from 0) in `epoch` (from 1), the recipe's unless `momentum` is given.

    The one-cycle recipe at 200 epochs: 0.95 in epoch 1, 0.85 at the learning rate's peak in epoch 5, 0.95 in epoch 200.
    """
    if momentum is not None or not recipe.one_cycle:
        return recipe.momentum if momentum is None else momentum
    return recipe.cycled(epoch, epochs, first=0.95, top=0.85, last=0.95)
