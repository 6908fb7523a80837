"""Learning-rate recipes by name, each a pure function of epoch and step.

Epochs count from 1. Sources: the released code named in each recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastarat.errors import unknown


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published schedule.

    epochs: run length of the release. lr, weight_decay: its values (weight decay on every parameter).
    drops: (first epoch, factor) pairs, the factor of `lr` from that epoch on. warmup: factor in epoch 1.
    per_step: a drop takes effect at the first step whose fractional epoch (t + 1)/steps reaches it.
    unscaled: run lengths for which the milestones stay as published; at any other they scale with the length.
    """

    epochs: int
    lr: float = 0.1
    weight_decay: float = 5e-4
    drops: tuple[tuple[int, float], ...] = ()
    warmup: float = 1.0
    per_step: bool = False
    unscaled: tuple[int, ...] = ()
    source: str = ""

    def factor(self, epoch: int, step: int, steps: int, epochs: int) -> float:
        if epoch == 1 and self.warmup != 1.0:
            return self.warmup
        stretch = 1.0 if epochs in (self.epochs, *self.unscaled) else epochs / self.epochs
        position = (epoch - 1) + ((step + 1) / steps if self.per_step else 0.0)
        current = 1.0
        for first, factor in self.drops:
            if position >= (first - 1) * stretch - 1e-9:
                current = factor
        return current


RECIPES: dict[str, Recipe] = {
    # The released table intends the drops one epoch earlier; its scheduler is stepped with the finished epoch's number.
    "arat": Recipe(
        epochs=100,
        warmup=0.2,
        drops=((77, 0.1), (92, 0.01)),
        source="AR-AT released code, as executed (every drop one epoch after its table)",
    ),
    "arat-intended": Recipe(
        epochs=100, warmup=0.2, drops=((76, 0.1), (91, 0.01)), source="AR-AT released code, as its table intends"
    ),
    "lbgat": Recipe(
        epochs=100, warmup=0.2, drops=((76, 0.1), (91, 0.01)), weight_decay=2e-4, source="LBGAT released code"
    ),
    "trades": Recipe(
        epochs=76,
        drops=((75, 0.1), (90, 0.01), (100, 0.001)),
        weight_decay=2e-4,
        unscaled=(100, 120),
        source="TRADES released code (stops one epoch after the first drop)",
    ),
    "mart": Recipe(
        epochs=120,
        lr=0.01,
        drops=((75, 0.1), (90, 0.01), (100, 0.001)),
        weight_decay=3.5e-3,
        source="MART released code, ResNet-18",
    ),
    "mart-wrn": Recipe(
        epochs=90,
        drops=((75, 0.1), (90, 0.01), (100, 0.001)),
        weight_decay=7e-4,
        source="MART released code, WRN-34-10",
    ),
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
    "constant": Recipe(epochs=100, source="no schedule"),
}


def recipe_of(name: str) -> Recipe:
    """Return a recipe by name. Raises: UserError naming the nearest one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def lr_at(epoch: int, step: int, *, steps: int, epochs: int, recipe: Recipe, lr: float | None = None) -> float:
    """Return the learning rate of `step` (from 0) in `epoch` (from 1) of a run of `epochs` epochs of `steps` steps.

    The S-ARAT recipe as executed, at its own 100 epochs: 0.02 in epoch 1, 0.1 in 2-76, 0.01 in 77-91, 0.001 after.
    """
    return (recipe.lr if lr is None else lr) * recipe.factor(epoch, step, steps, epochs)
