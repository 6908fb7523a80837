"""From a config to what trains it: the optimiser, the network and its step, and the precision that they compute in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastarat.config import Config
from fastarat.data import (
    CutMix,
    Dataset,
    Loader,
    RandAugment,
    check_transforms,
    default_augment,
    derive_seed,
    limited,
    make_loader,
    mean_std,
    mixed_loader,
    open_extra,
)
from fastarat.defenses import DEFENSES
from fastarat.device import fastest_precision, pick_device, seeded_apart, usable_precision
from fastarat.distributed import World
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.files import make_writable, write_text
from fastarat.nets.models import check_takes
from fastarat.nets.own import Given, network
from fastarat.runs import Run, load_start
from fastarat.specs import known

_KEPT = "; kept from when the run began"


def sgd(config: Config) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Return a function from parameters to the optimiser the config asks for. Raises: UserError without Apex."""
    options = {
        "lr": config.optim.lr,
        "momentum": 0.9 if config.optim.momentum is None else config.optim.momentum,
        "weight_decay": config.optim.weight_decay,
        "nesterov": config.optim.nesterov,
    }
    if config.optim.optimizer == "apex":
        try:
            from apex.optimizers import FusedSGD
        except Exception as error:  # the package index's "apex" is another project and fails in its own ways
            raise UserError(
                f"optim.optimizer=apex: NVIDIA Apex's FusedSGD does not import ({type(error).__name__}: {error}). "
                "Build Apex from NVIDIA's source (the package index's `apex` is another project), "
                "or use --optim.optimizer torch"
            ) from error
        return lambda parameters: FusedSGD(parameters, **options)
    if config.optim.nesterov and config.optim.momentum == 0:
        raise UserError("optim.nesterov needs optim.momentum above 0")
    return lambda parameters: torch.optim.SGD(parameters, fused=True, **options)


def train_loader(config: Config, dataset: Dataset, world: World) -> Loader:
    """Make the loader that a run of `config` trains from, in the processes of `world`, on its device."""
    # What is augmented by itself is not augmented again, unless a person asks for it by name.
    source = dataset.train.source
    own = source is not None and source.augmented and dataset.transforms is None
    recipe, make = default_augment(dataset) if config.augment and not own else None, make_loader
    if dataset.transforms is not None and len(dataset.train):
        few = dataset.train.take(torch.arange(min(2, len(dataset.train))))
        check_transforms(recipe, next(iter(make_loader(few, batch_size=2, device=world.device).epoch(0))).images)
    if config.extra_data is not None:
        extra = open_extra(config.extra_data, dataset.shape, len(dataset.classes), Path(config.data_dir))
        make = partial(mixed_loader, extra=extra, ratio=known(config.extra_ratio))
    return make(
        dataset.train,
        batch_size=config.batch_size,
        device=world.device,
        kind=config.loader,
        shuffle=True,
        seed=derive_seed(config.seed, "order"),
        augment=recipe,
        order=config.order,
        world=world,
        accumulate=config.accumulate,
        **strong(config, dataset),
    )


def _network(config: Config, dataset: Dataset, given: Given | None) -> nn.Module:
    mean, std = mean_std(dataset.train) if config.normalize else (None, None)
    return network(
        known(config.model),
        given,
        num_classes=len(dataset.classes),
        in_channels=dataset.shape[0],
        image_size=dataset.shape[1],
        mean=mean,
        std=std,
    )


def build_step(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    precision: str,
    *,
    starts: bool = True,
    model: Given | None = None,
    world: World | None = None,
) -> TrainStep:
    """Build the network and its step, the same weights each time.

    config: resolved; its own precision is not read. starts: load what the defense starts from, which a checkpoint
    would hold. model: one given in Python, or what makes it, instead of the config's.
    world: the processes that train together. Raises: UserError for what cannot be built.
    """
    torch.manual_seed(derive_seed(config.seed, "weights"))
    made = _network(config, dataset, model).to(device)
    check_takes(made, known(config.model), dataset.shape)
    load_start(config.defense, made, read=starts)
    if world is not None and world.size > 1:  # a network given in Python may have begun elsewhere on each
        weights = world.first(lambda: {name: value.cpu() for name, value in made.state_dict().items()})
        made.load_state_dict(weights)
    fast = dataclasses.replace(config.fast, precision=precision)
    # A momentum that moves would freeze into the graph, and Apex reads its learning rate on the host.
    if config.optim.schedule().one_cycle or config.optim.optimizer == "apex":
        fast = dataclasses.replace(fast, capture="off")
    step = TrainStep(
        made,
        config.defense,
        torch.empty(2, *dataset.shape),
        config.attack,
        fast,
        optimizer=sgd(config),
        awp=config.awp,
        awp_warmup=config.awp_warmup,
        label_smoothing=config.label_smoothing,
        world=world,
        sync_bn=config.sync_bn,
        accumulate=config.accumulate,
    )
    if step.num_classes != len(dataset.classes):
        raise UserError(
            f"{config.model} returns {step.num_classes} logits, and {dataset.name} has {len(dataset.classes)} classes: "
            f"expected {len(dataset.classes)}; make its last layer that wide"
        )
    if type(config.defense) not in DEFENSES.values():
        step.rehearse(len(dataset.classes), dataset.shape)
    return step


def strong(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What `make_loader` is told of the augmentations beyond crop and flip that the config asks for."""
    cutmix = None if config.cutmix is None else CutMix(config.cutmix, len(dataset.classes))
    return {"randaugment": config.randaugment and RandAugment.of(config.randaugment), "cutmix": cutmix}


def choose_precision(
    config: Config,
    dataset: Dataset,
    device: torch.device,
    *,
    begun: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    model: Given | None = None,
) -> tuple[str, str]:
    """Return what a run of `config`, resolved, computes in, and why: what was asked for, or what `--amp` comes to.

    Where that takes timing, it is of the run's own step, whole, on networks of its own: no random state is moved.

    begun: metadata of the weights that the run goes on from, whose precision it keeps. say: told that timing begins.
    model: as `build_step`'s. Raises: UserError for a step that cannot be built.
    """
    if begun is not None and "precision" in begun:  # not in those of older versions
        precision, note = usable_precision(begun["precision"], device)
        if precision == begun["precision"] and (config.amp or precision != config.precision):
            note = begun["precision_note"].removesuffix(_KEPT) + _KEPT
        return precision, note
    if config.precision is not None:
        # By a comparison for all its runs, by this run before it was killed, or by hand.
        why = "stated beside --amp, not timed now" if config.amp else ""
        return usable_precision(config.precision, device, why=why)
    count = min(config.batch_size, len(dataset.train))
    # Spread over the set, which may lie class by class; and few, since `normalize` looks at all.
    few = dataset.train.take(torch.arange(count) * len(dataset.train) // count)
    small = dataclasses.replace(dataset, train=few)
    # Compiling takes longer than this may, for a loss that is float32 in both.
    config = dataclasses.replace(config, compile_loss=False)

    def build(precision: str) -> Callable[[], object]:
        step = build_step(config, small, device, precision, starts=False, model=model)
        batch = next(iter(make_loader(few, batch_size=count, device=device, kind="resident").epoch(0)))
        step.at(epoch=known(config.epochs), progress=0.5)
        step.set_lr(0.0)  # all calls do the same work, and no weight runs away
        return lambda: step(batch.images, batch.labels)

    with seeded_apart(device):
        return fastest_precision(device, build, say=say)


def shared_precision(
    config: Config, dataset: Dataset, folder: Path, *, say: Callable[[str], None] = lambda text: None
) -> tuple[str, str]:
    """Return what all runs of a comparison with `amp` compute in, and why; decided once, and kept in precision.json.

    config: resolved, of the run that takes longest. folder: of the comparison. Where a run of the same network and
    batches has begun in it, that one's precision stands, whatever a new timing would say.
    """
    device, file = pick_device(config.device), folder / "precision.json"

    def kind(config: Config) -> tuple[Any, ...]:
        return config.amp, config.model, config.dataset, config.image_size, config.batch_size

    for path in (*folder.glob("*/config.yaml"), *folder.glob("tune/*/config.yaml")):
        with suppress(UserError):  # a folder of somebody else
            begun = Run(path.parent).read_config()
            if begun is not None and kind(begun) == kind(config) and begun.precision is not None:
                if (note := _kept_note(file, begun.precision)) is not None:
                    return begun.precision, note
                return usable_precision(begun.precision, device, why=f"--amp: as {path.parent.name}, which had begun")
    dataset = limited(dataset, config.limit_train, config.batch_size)
    precision, note = choose_precision(config, dataset, device, say=say)
    make_writable(folder)
    write_text(file, json.dumps({"precision": precision, "note": note}, indent=2) + "\n")
    return precision, note


def _kept_note(file: Path, precision: str) -> str | None:
    """Why `precision` was chosen, by precision.json; None where that speaks of another, or is missing or damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return str(kept["note"]) if kept["precision"] == precision else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
