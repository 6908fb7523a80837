"""The run card: everything a number of a run depends on, in words."""

from __future__ import annotations

import os
import platform

import torch

from fastarat.config import Config
from fastarat.data import Dataset, Loader
from fastarat.diagnostics import Diagnostics
from fastarat.engine.step import TrainStep
from fastarat.evaluation import attack_title, in_pixels
from fastarat.kernels import why_not_triton
from fastarat.nets.batchnorm import BatchNorm2d, has_batchnorm
from fastarat.released import card_rows
from fastarat.schedules import counted, extended_in_words, in_words
from fastarat.specs import known
from fastarat.stopping import in_words as early_stop
from fastarat.texts import printable

_START = {
    "none": "none (the centre itself)",
    "uniform": "uniform in the ball, clamped to [0, 1]",
    "uniform-unclamped": "uniform in the ball, not clamped",
    "gaussian": "0.001 N(0, 1), not clamped",
    "l2": "a random direction of length U(0, 1) epsilon, clamped",
}
_BN = {
    "eval": "eval (running statistics)",
    "train": "train (batch statistics; running ones move at each attack forward)",
    "train-frozen": "train-frozen (batch statistics; running ones do not move)",
}


def card(
    config: Config,
    *,
    dataset: Dataset,
    loader: Loader,
    step: TrainStep,
    steps_per_epoch: int,
    precision_note: str,
    swa_plan: tuple[int, int],
    diagnostics: Diagnostics | None = None,
) -> str:
    """Return the card of a run, one aligned line per fact.

    config: resolved. step: built of it. precision_note: what it computes in, and why. swa_plan: first epoch and steps
    between snapshots. diagnostics: what it measures of itself.
    """
    on, off = fast_paths(step)
    paths = {"fast paths on": ", ".join(on), "fast paths off": "; ".join(off)}
    rows = {
        **_method(config, step),
        **_data(config, step, dataset, loader),
        **_schedule(config, steps_per_epoch, swa_plan),
        "precision": precision_note + ("; the attack's first step float32" if step.starts_exactly else ""),
        "device": _device_name(step.device) + f", torch {torch.__version__}",
        **_smoothing(config),
        **step.shares.describe(config.batch_size),
        **_averages(config, swa_plan),
        **({"early stop": rule} if (rule := early_stop(config)) else {}),
        **({} if diagnostics is None else {"diagnostics": diagnostics.describe()}),
        **card_rows(
            config,
            min(dataset.shape[1:]),
            swa_plan[1],
            precision=step.fast.precision,
            num_train=len(dataset.train) if dataset.held_out else None,
        ),
        **{name: text for name, text in paths.items() if text},
        "seed": str(config.seed),
        "run folder": str(config.out),
    }
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {printable(value)}" for key, value in rows.items())


def _method(config: Config, step: TrainStep) -> dict[str, str]:
    defense, attack = config.defense, config.attack
    rows = {
        "defense": (defense.name or type(defense).__name__)
        + (f": minimise {defense.formula}" if defense.formula else ""),
        **defense.describe(attack.norm),
    }
    without = "none: the network has no BatchNorm" if not has_batchnorm(step.model) else None
    if without and "split BatchNorm" in rows:
        rows["split BatchNorm"] = f"{without}, so that {defense.name} is its losses alone"
    if not defense.attacks:
        return rows
    return rows | {
        "attack": f"PGD-{attack.num_steps} {attack.norm}, maximises {step.spec.objective}, "
        f"epsilon {pixels(step.spec.epsilon)}, step {pixels(known(step.spec.step_size))}"
        + (f", {attack.num_restarts} restarts" if attack.num_restarts > 1 else ""),
        "attack start": _START[known(step.spec.start)],
        "attack BN": without or _BN[known(step.spec.bn)],
    }


def _data(config: Config, step: TrainStep, dataset: Dataset, loader: Loader) -> dict[str, str]:
    train, val, test = (len(s) for s in (dataset.train, dataset.val, dataset.test))
    parameters = sum(p.numel() for p in step.model.parameters())
    return {
        "model": f"{config.model}, {parameters:,} parameters, input [0, 1]"
        + (", normalised inside" if config.normalize else ""),
        "data": f"{dataset.name}: {train:,} train, {val:,} validation, {test:,} test, "
        f"{len(dataset.classes)} classes, {'x'.join(map(str, dataset.shape))}",
        **{f"data note {i}": note for i, note in enumerate(dataset.notes, 1)},
        "best": _best_rule(config, val),
        "augmentation": ", ".join(_augmentation(loader)) or "off",
        "loader": f"{loader.kind}: {loader.reason}",
    }


def _augmentation(loader: Loader) -> list[str]:
    augment, rand, cut = loader.recipe, loader.randaugment, loader.cutmix
    source = loader.split.source
    said = ["the data's own, on the host"] if source is not None and source.augmented else []
    said += [] if augment is None else [str(augment)]
    said += [] if rand is None else [f"RandAugment of {rand.count} operations, magnitude {rand.magnitude} of 30"]
    said += [] if cut is None else [f"CutMix, lambda ~ Beta({cut.alpha:g}, {cut.alpha:g}), in the attack too"]
    return said


def _schedule(config: Config, steps_per_epoch: int, swa_plan: tuple[int, int]) -> dict[str, str]:
    optim, recipe = config.optim, config.optim.schedule()
    epochs, lr = known(config.epochs), known(optim.lr)
    published = (recipe.epochs, *recipe.unscaled)
    moves = (recipe.drops and not recipe.fixed) or recipe.one_cycle or (recipe.rises and optim.warmup is None)
    scaled = f" (milestones scaled from {recipe.epochs} epochs)" if moves and epochs not in published else ""
    momentum = "0.95 to 0.85 and back" if optim.momentum is None else f"{optim.momentum:g}"
    rows = {
        "schedule": f"{optim.recipe}{scaled}, {counted(epochs, 'epoch')} x {steps_per_epoch} steps of "
        f"{config.batch_size}, {in_words(recipe, epochs=epochs, lr=lr, warmup=optim.warmup)}, "
        f"momentum {momentum}, weight decay {optim.weight_decay:g} on everything",
        "optimiser": {"apex": "NVIDIA Apex FusedSGD", "torch": "torch SGD, fused"}[optim.optimizer],
    }
    if config.extended:
        rows["extended"] = extended_in_words(
            config.extended, epochs=epochs, steps=steps_per_epoch, recipe=recipe, lr=lr, warmup=optim.warmup
        )
    return rows


def _smoothing(config: Config) -> dict[str, str]:
    if not config.label_smoothing:
        return {}
    return {"label smoothing": f"{config.label_smoothing:g} in the loss's cross-entropies, none in the attack"}


def _averages(config: Config, swa_plan: tuple[int, int]) -> dict[str, str]:
    rows = {}
    if config.awp is not None:
        later = f", from epoch {config.awp_warmup + 1}" if config.awp_warmup else ""
        rows["AWP"] = f"gamma_w {config.awp:g}{later}"
    if config.swa:
        first, every = swa_plan
        rows["SWA"] = f"a snapshot every {every} steps from epoch {first}, BatchNorm re-estimated at the end"
    if config.ema is not None:
        rows["EMA"] = f"decay {config.ema:g}, evaluated with --weights ema"
    return rows


def _best_rule(config: Config, val_images: int) -> str:
    if not val_images:
        return "no validation images: no best"
    by, tie = (accuracy_name(key) for key in best_by(config))
    every = "" if config.eval.every == 1 else f", measured every {config.eval.every} epochs and at the end"
    return (
        f"highest {by} on {val_images:,} validation images{every}; of equal ones the highest {tie}, "
        "then the earliest epoch"
    )


def best_by(config: Config) -> tuple[str, str]:
    """Return the keys of the accuracies on validation images that choose the best checkpoint.

    The first decides; the second decides between equals, and then the earliest epoch is best.
    """
    robust, clean = f"robust_acc_pgd{config.eval.num_steps}", "clean_acc"
    return (robust, clean) if config.defense.chosen_by == "robust" else (clean, robust)


def accuracy_name(key: str) -> str:
    """robust_acc_pgd10 -> PGD-10 accuracy."""
    return f"{attack_title(key)} accuracy"


def pixels(value: float) -> str:
    """Format a length in pixel units, as a fraction of 255 where it is one: 8/255 (0.03137)."""
    typed = in_pixels(value)
    return f"{typed} ({value:.5f})" if "/" in typed else typed


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()}, {os.cpu_count()} cores)"


def fast_paths(step: TrainStep) -> tuple[list[str], list[str]]:
    """Name the fast paths that a step takes, and those it was built without, with the reason."""
    fast, captured = step.fast, not step.why_eager
    layers = sum(isinstance(m, BatchNorm2d) for m in step.model.modules())
    why = "asked for plain" if fast.kernels == "plain" else why_not_triton(step.device)
    on = {
        "channels-last": fast.channels_last,
        "one forward for [clean; adv]": step.defense.needs_clean,
        "input gradients only in the attack": step.defense.attacks,
        "BatchNorm folded into the attack's convolutions": step.attacker.folds,
        "compiled loss": fast.compile_loss,
        "fake capture": captured and fast.capture == "fake",
        "step captured as one CUDA graph": captured and fast.capture != "fake",
        f"fused BN+add+ReLU Triton kernels ({layers} layers)": layers and why is None,
    }
    off = {
        "channels-last (asked for)": not fast.channels_last,
        f"captured step ({step.why_eager})": step.why_eager,
        f"Triton kernels ({why})": layers and why is not None,
        # On a CPU it is no fast path: compiling takes longer than it can save.
        "compiled loss (not yet measured to pay on a GPU; --compile-loss)": not fast.compile_loss
        and step.device.type == "cuda",
    }
    return [name for name, holds in on.items() if holds], [name for name, holds in off.items() if holds]
