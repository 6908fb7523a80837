"""What a run is when its config leaves it open, and whether that is as released: where it departs, in sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from fastarat.config import Config
from fastarat.data import Dataset
from fastarat.defenses import DEFENSES
from fastarat.defenses.base import Settings
from fastarat.errors import UserError
from fastarat.schedules import RECIPES, recipe_of
from fastarat.specs import known
from fastarat.stopping import in_words


def default_recipe(config: Config, model: str) -> str:
    """Name of the schedule this defense was released with for this network."""
    name = config.defense.recipe
    return f"{name}-wrn" if model.startswith("wrn") and f"{name}-wrn" in RECIPES else name


def resolve(config: Config, dataset: Dataset) -> Config:
    """Fill what the config leaves to the defense, the recipe and the data, so that the saved form says it all.

    With `amp` the precision stays unset: it depends on the machine, and `choose_precision` finds it.
    """
    size = min(dataset.shape[1:])
    model = config.model or ("resnet18" if size >= 32 else "resnet-small")
    recipe_name = config.optim.recipe or default_recipe(config, model)
    recipe = recipe_of(recipe_name)
    # A one-cycle recipe moves the momentum by itself: there it stays unset, which `momentum_at` reads as the recipe's.
    follows = ("lr", "weight_decay", "nesterov", *(() if recipe.one_cycle else ("momentum",)))
    unset = {name: getattr(recipe, name) for name in follows if getattr(config.optim, name) is None}
    if config.optim.milestones is not None and config.optim.gamma is None:
        unset["gamma"] = 0.1
    optim = dataclasses.replace(config.optim, recipe=recipe_name, **unset)
    name = f"{dataset.name}-{model}-{config.defense.name or type(config.defense).__name__.lower()}"
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return dataclasses.replace(
        config,
        model=model,
        epochs=config.epochs or recipe.epochs,
        out=config.out or f"runs/{name}-seed{config.seed}",
        extra_ratio=None if config.extra_data is None else config.extra_ratio or 0.7,  # Wang et al., CIFAR-10
        precision=config.precision or (None if config.amp else "fp32"),
        attack=config.attack.stepping(),
        optim=optim,
        eval=dataclasses.replace(config.eval, val_images=len(dataset.val)),
    )


def departures(
    config: Config, image_size: int, swa_every: int = 500, *, precision: str | None = None, num_train: int | None = None
) -> tuple[str, ...] | None:
    """Where a run of `config`, resolved, departs from the code it follows; () where it does not.

    image_size: pixels of the smaller side. swa_every: steps between snapshots, in the end; so is precision (None: the
    config's). num_train: images trained on, validation images not among them.
    None for a defense of the user's own whose weights are not averaged: there is no release to depart from.
    """
    added = (*_averages(config, swa_every), *_weight_perturbation(config))
    defense = config.defense
    # By type, not isinstance: a subclass of TRADES is its author's, and departs in ways not known here.
    if type(defense) not in DEFENSES.values():
        return added or None
    settings = Settings(
        norm=config.attack.norm,
        epsilon=config.attack.epsilon,
        step_size=known(config.attack.stepping().step_size),
        model=known(config.model),
        image_size=image_size,
        recipe=known(config.optim.recipe),
        lr=known(config.optim.lr),
        epochs=known(config.epochs),
        batch_size=config.batch_size,
        normalize=config.normalize,
        num_steps=config.attack.num_steps,
        start=config.attack.start,
    )
    changed = _changed(config, settings)
    own = (f"set for this run: {', '.join(changed)}",) if changed else ()
    return (
        *own,
        *defense.departures(settings),
        *added,
        *_common(config, precision or config.precision or "fp32", num_train),
    )


def _common(config: Config, precision: str, num_train: int | None) -> Iterator[str]:
    """Where a run departs from every release."""
    if config.extended:
        totals = ", then ".join(map(str, (*config.extended, config.epochs)))
        yield f"extended: {totals} epochs, each part by the schedule of its own total"
    if config.early_stop is not None:
        yield f"stops early, {in_words(config)}: the releases train all epochs (--early-stop none)"
    if precision != "fp32":
        yield f"precision {precision}: the releases run in float32 throughout (--precision fp32)"
    if config.extra_data is not None:
        yield (
            f"{config.extra_ratio:.0%} of each batch are extra images, which the releases do not train on (leave out "
            "--extra-data)"
        )
    if held := config.eval.val_images:
        of = "" if num_train is None else f" of {held + num_train:,}"
        yield (
            f"{held:,}{of} training images are held out for validation; the releases train on all (--eval.val-images 0)"
        )


def _changed(config: Config, settings: Settings) -> list[str]:
    """Settings of method, attack and schedule that are neither the default nor another value of the release."""
    defense, attack, optim = config.defense, config.attack, config.optim
    recipe = recipe_of(settings.recipe)
    same = defense.equals_default(settings)
    found: list[tuple[str, Any, Any]] = [
        (f"defense.{f.name}", getattr(defense, f.name), f.default)
        for f in dataclasses.fields(defense)
        if f.name != defense.starts_from
    ]
    if defense.attacks:
        found += [
            ("attack.bn", attack.bn or defense.bn_mode(attack.norm), defense.bn_mode(attack.norm)),
            ("attack.objective", attack.objective or defense.objective, defense.objective),
            ("attack.num_steps", attack.num_steps, 10),
            ("attack.num_restarts", attack.num_restarts, 1),
        ]
        if attack.start is not None:
            found.append(("attack.start", attack.start, _start(config)))
    found += [
        ("optim.recipe", optim.recipe, default_recipe(config, settings.model)),
        ("optim.lr", optim.lr, recipe.lr),
        # A warm-up of 0 changes nothing in a recipe whose first epoch has the full rate.
        ("optim.warmup", optim.warmup, 0 if optim.warmup == 0 and recipe.warmup == 1.0 else None),
        ("optim.milestones", optim.milestones, None),
        ("optim.gamma", optim.gamma, None),
        ("optim.weight_decay", optim.weight_decay, recipe.weight_decay),
        ("optim.momentum", optim.momentum, None if recipe.one_cycle else recipe.momentum),
        ("optim.nesterov", optim.nesterov, recipe.nesterov),
        ("epochs", config.epochs, recipe.epochs),
        ("batch_size", config.batch_size, 128),
        ("augment", config.augment, True),
        ("label_smoothing", config.label_smoothing, 0.0),
        ("randaugment", config.randaugment, None),
        ("cutmix", config.cutmix, None),
        ("normalize", config.normalize, False),
        ("limit_train", config.limit_train, None),
    ]
    return [
        f"{name} {_text(value)} (default {_text(default)})"
        for name, value, default in found
        if value not in (default, *defense.also_released.get(name, ())) and (name not in same or value != same[name])
    ]


def _start(config: Config) -> str | None:
    try:
        return config.defense.start_kind(config.attack.norm)
    except UserError:  # no start of its own for this norm
        return None


def _text(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _averages(config: Config, swa_every: int) -> Iterator[str]:
    if config.swa and not config.swa_config.exact:
        yield (
            "SWA: while BatchNorm is re-estimated the attack's forwards leave the statistics alone; in AR-AT's "
            "release they move them, and dominate (--swa-config.exact)"
        )
    if config.swa and (config.swa_config.start != 0.75 or swa_every != 500):
        yield (
            f"SWA: a snapshot every {swa_every} steps from {config.swa_config.start:.0%} of the run on; AR-AT's "
            "release has 500 and 75% (--swa-config.every 500 --swa-config.start 0.75)"
        )
    if config.swa and config.defense.name != "ar-at":
        yield (
            "SWA is AR-AT's; the code that averages other adversarial training takes a snapshot per epoch and "
            "re-estimates BatchNorm on clean images"
        )
    if config.ema is not None:
        yield "EMA: no release here keeps one; the weights that are trained do not depend on it"


_AWP = {"at": (0.01, 0), "trades": (0.005, 10)}


def _weight_perturbation(config: Config) -> Iterator[str]:
    name, recipe = config.defense.name, config.optim.recipe
    if config.awp is None:
        return
    if name in _AWP and (config.awp, config.awp_warmup) != _AWP[name]:
        gamma, warmup = _AWP[name]
        yield (
            f"AWP: gamma_w {config.awp:g} after {config.awp_warmup} epochs; its release has {gamma:g} after {warmup} "
            f"for {name} (--awp {gamma:g} --awp-warmup {warmup})"
        )
    if name == "mart":
        yield f"AWP: gamma_w {config.awp:g} is our choice: the one mart was released with is not established"
    elif name == "at" and recipe != "rice":
        yield "AWP: its release trains at by the schedule rice (--optim.recipe rice)"
    elif name == "trades":
        if recipe != "cure-200":
            yield (
                "AWP: its release trains trades for 200 epochs, a tenth from 100 and a hundredth from 150, with weight "
                "decay 5e-4 (the same: --optim.recipe cure-200)"
            )
        yield "AWP: in its release the running statistics of trades move in the order adv, clean, clean"
    elif name != "at":
        yield "AWP was released for at, trades and mart: with another defense it is our combination"


def card_rows(config: Config, image_size: int, swa_every: int = 500, **of_run: Any) -> dict[str, str]:
    """Rows of the run card: one for each of `departures`, or one that says there is none."""
    found = departures(config, image_size, swa_every, **of_run)
    if found is None:
        return {}
    if not found:
        return {"release": "as released: loss, attack, BatchNorm and schedule"}
    return {f"departs from release {i}": sentence for i, sentence in enumerate(found, 1)}
