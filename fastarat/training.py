"""Training from a Config: data, network, step, schedule, validation, checkpoints, and the card that says which."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from fastarat.attacks import mode_of
from fastarat.averages import MovingAverage, WeightAverage, averaged_model
from fastarat.card import card_rows, default_recipe
from fastarat.checks import pick_device
from fastarat.config import Config, defense_key, from_dict, read_yaml, to_dict, write_yaml
from fastarat.data import (
    Dataset,
    Loader,
    Split,
    default_augment,
    derive_seed,
    load_dataset,
    make_loader,
    stratified_indices,
)
from fastarat.defenses import DEFENSES, Defense
from fastarat.defenses.base import resuming
from fastarat.doctor import bf16_support
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.evaluation import NonFinite, attack_title, evaluate
from fastarat.kernels import why_not_triton
from fastarat.nets.batchnorm import BatchNorm2d, branch, branches_of, split_batchnorm
from fastarat.nets.models import build_model, check_takes
from fastarat.nets.winograd import qualifies
from fastarat.optim import SGD
from fastarat.runs import RunFolder, load_into, load_weights, write_atomic
from fastarat.schedules import counted, in_words, lr_at, momentum_at, recipe_of

_NO_BEST = {"epoch": 0, "value": -1.0, "tie": -1.0}
_MAY_DIFFER = ("device", "threads", "data_dir", "loader", "log_every", "tensorboard", "out")


@dataclass(frozen=True)
class Result:
    """What a run leaves. run: its folder. metrics: one dict per epoch. model: the final network, in eval mode."""

    run: Path
    metrics: list[dict[str, Any]]
    model: nn.Module
    config: Config


class Diverged(UserError):
    """A loss term, a weight, a running statistic or the network's logits stopped being finite."""

    exit_code = 1


def train(
    config: Config | None = None,
    *,
    defense: Defense | None = None,
    resume: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> Result:
    """Train one network as `config` says, or continue the run in folder `resume`.

    Args:
        config: default `Config()`: AR-AT on digits.
        defense: replaces `config.defense`.
        resume: a run folder; its saved config is used, and the run continues after its last checkpoint, bit for bit
            on a CPU.
        overrides: with `resume`, values that may differ from the saved run (device, data_dir, loader, log_every,
            tensorboard).
        progress: print the run card, a progress bar (on a terminal) and one line per epoch.
    Returns: Result.
    Raises: UserError before any training for every mistake in the config; Diverged when a loss term, a weight, a
        running statistic or the network's logits become NaN or infinite, naming it, the step and the last good
        checkpoint; what is written is finite.
    """
    one_process()
    if resume is not None:
        config = _resumed_config(Path(resume), config, overrides or {})
    config = config or Config()
    if defense is not None:
        config = dataclasses.replace(config, defense=defense)
    return _Training(config, resume is not None, progress).run()


def one_process() -> None:
    """Raise UserError inside a launcher that starts a command several times, torchrun's way."""
    if (size := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(size) > 1:
        raise UserError(
            f"WORLD_SIZE={size}: fastarat runs in one process on one device, and a launcher such as torchrun starts "
            f"the same run {size} times; start it without one (several seeds at once: fastarat compare --parallel)"
        )


def _resumed_config(run: Path, config: Config | None, overrides: dict[str, Any]) -> Config:
    if config is not None:
        raise UserError("resume continues a run with its saved config: give the folder alone")
    saved = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else None
    if saved is None:
        raise UserError(f"nothing to resume in {run}: it holds no config.yaml")
    kept = from_dict(saved, source=str(run / "config.yaml"))
    for key in overrides:
        if key not in _MAY_DIFFER:
            raise UserError(
                f"--resume continues {run} as it was started: {key} cannot change (only {', '.join(_MAY_DIFFER[:-1])} "
                "may); start another run for that"
            )
    return from_dict({**to_dict(kept), **overrides, "out": str(run)}, source=str(run / "config.yaml"))


def resolve(config: Config, dataset: Dataset) -> Config:
    """Fill what the config leaves to the defense, the recipe and the data, so that the saved form says it all."""
    size = min(dataset.shape[1:])
    model = config.model or ("resnet18" if size >= 32 else "resnet-small")
    recipe_name = config.optim.recipe or default_recipe(config, model)
    recipe = recipe_of(recipe_name)
    optim = dataclasses.replace(
        config.optim,
        recipe=recipe_name,
        lr=recipe.lr if config.optim.lr is None else config.optim.lr,
        weight_decay=recipe.weight_decay if config.optim.weight_decay is None else config.optim.weight_decay,
        momentum=None
        if recipe.one_cycle
        else recipe.momentum
        if config.optim.momentum is None
        else config.optim.momentum,
        nesterov=recipe.nesterov if config.optim.nesterov is None else config.optim.nesterov,
    )
    name = f"{dataset.name}-{model}-{config.defense.name or type(config.defense).__name__.lower()}"
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return dataclasses.replace(
        config,
        model=model,
        epochs=config.epochs or recipe.epochs,
        out=config.out or f"runs/{name}-seed{config.seed}",
        precision="bf16" if config.amp and config.precision == "fp32" else config.precision,
        attack=config.attack.stepping(),
        optim=optim,
        eval=dataclasses.replace(config.eval, val_images=len(dataset.val)),
    )


def usable_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """Return the precision to run in and why. bf16 or fp16 without hardware support stays in float32."""
    if precision == "fp32":
        return "fp32", "float32 (asked for; --amp for bf16)"
    if precision == "tf32":
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
            return "tf32", "TF32 convolutions, float32 elsewhere"
        return "fp32", "float32: TF32 needs a CUDA GPU of compute capability 8 or more"
    if precision == "fp16":
        if device.type == "cuda":
            return "fp16", "fp16 convolutions with loss scaling; statistics and losses float32"
        return "fp32", "float32: fp16 training needs a CUDA GPU"
    able, why = bf16_support(device)
    if able:
        return "bf16", "bf16 convolutions; statistics and losses float32"
    return "fp32", f"float32, because bf16 would be slower here: {why}"


def sgd(config: Config, device: torch.device):
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
    if config.optim.optimizer == "torch":
        return lambda parameters: torch.optim.SGD(parameters, fused=True, **options)
    return lambda parameters: SGD(parameters, backend=config.kernels, **options)


class _Training:
    """Holds one run's objects between set-up and the last epoch."""

    def __init__(self, config: Config, resume: bool, progress: bool) -> None:
        self.progress, self.resume = progress, resume
        self.device = pick_device(config.device)
        if config.threads is not None:
            cores = os.cpu_count() or 1
            if config.threads > 8 * cores:
                raise UserError(
                    f"threads={config.threads}: this machine has {cores} core(s), and more threads than cores slow it "
                    f"down; write --threads {cores} or leave it out"
                )
            torch.set_num_threads(config.threads)
        self.dataset = _limited(
            load_dataset(
                config.dataset,
                data_dir=config.data_dir,
                val_images=config.eval.val_images,
                image_size=config.image_size,
            ),
            config.limit_train,
        )
        _check_sizes(self.dataset, config)
        self.config = config = resolve(config, self.dataset)
        self.recipe = recipe_of(config.optim.recipe)
        self.precision, self.precision_note = usable_precision(config.precision, self.device)
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision != "fp32"
            # Every plan is timed, not the first ten: this happens once per shape, before the step is captured.
            torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 0

        torch.manual_seed(derive_seed(config.seed, "weights"))
        mean, std = _mean_std(self.dataset.train) if config.normalize else (None, None)
        channels, size = self.dataset.shape[0], self.dataset.shape[1]
        model = build_model(
            config.model,
            num_classes=len(self.dataset.classes),
            in_channels=channels,
            image_size=size,
            mean=mean,
            std=std,
        ).to(self.device)
        check_takes(model, config.model, self.dataset.shape)
        with resuming(resume and (Path(config.out) / "last.pt").is_file()):
            self.step = TrainStep(
                model,
                config.defense,
                torch.empty(2, *self.dataset.shape),
                optimizer=sgd(config, self.device),
                attack=config.attack,
                fast=dataclasses.replace(
                    config.fast,
                    precision=self.precision,
                    # A momentum that moves would freeze into the graph, and Apex reads its learning rate on the host.
                    capture="off" if self.recipe.one_cycle or config.optim.optimizer == "apex" else config.capture,
                ),
                awp=config.awp,
                awp_warmup=config.awp_warmup,
            )
        if type(config.defense) not in DEFENSES.values():
            self.step.rehearse(len(self.dataset.classes), self.dataset.shape)
        self.augment = default_augment(self.dataset) if config.augment else None
        self.loader = make_loader(
            self.dataset.train,
            batch_size=config.batch_size,
            device=self.device,
            kind=config.loader,
            shuffle=True,
            seed=derive_seed(config.seed, "order"),
            augment=self.augment,
        )
        # The same pixels in another order: a second loader would hold the set on the device twice.
        self.probe_loader = copy.copy(self.loader)
        self.probe_loader.seed = derive_seed(config.seed, "probe")
        # Batch statistics of a single image are no statistics: a last batch of one is left out.
        self.steps_per_epoch = len(self.loader) - (len(self.dataset.train) % config.batch_size == 1)
        if self.steps_per_epoch < 1:
            raise UserError(f"{len(self.dataset.train)} training image(s): at least 2 are needed")
        self.average = WeightAverage(self.step.model) if config.swa else None
        if config.swa:
            first, every = self._swa_plan()
            taken = (config.epochs + 1) * self.steps_per_epoch - 1
            if taken // every == (first * self.steps_per_epoch - 1) // every:
                raise UserError(
                    f"swa-config.every={every}: no snapshot would be taken in the {config.epochs - first + 1} epoch(s) "
                    f"of {self.steps_per_epoch} steps from epoch {first} on; leave it out, or choose a smaller one"
                )
        self.ema = None if config.ema is None else MovingAverage(self.step.model, config.ema)
        self.meta = {
            "model": config.model,
            "num_classes": len(self.dataset.classes),
            "in_channels": channels,
            "image_size": size,
            "normalized": config.normalize,
            "branches": list(branches_of(self.step.model)),
            "defense": defense_key(config.defense),
            "dataset": self.dataset.name,
            "classes": list(self.dataset.classes),
            "epsilon": config.attack.epsilon,
            "norm": config.attack.norm,
        }
        self.folder = RunFolder(config.out, resume=resume)
        # A buffer may hold infinity on purpose, such as a mask.
        self.never_finite = _not_finite(self._tensors())
        self.best: dict[str, Any] = {**_NO_BEST, "by": best_by(config)[0]}
        self.first_epoch, self.saved_epoch = 1, 0
        self.other_rule = ""
        if resume:
            self._load()

    def run(self) -> Result:
        config, folder = self.config, self.folder
        card = self.card()
        if not self.resume:
            write_yaml(config, folder.path / "config.yaml")
        write_atomic(folder.path / "card.txt", lambda p: p.write_text(card + "\n"))
        if self.progress:
            print(card, flush=True)
            if self.first_epoch > config.epochs:
                print(f"{folder.path} is finished: nothing to do")
            elif self.resume:
                print(f"continuing after epoch {self.first_epoch - 1}")
                if self.other_rule:
                    before, now = (accuracy_name(key) for key in (self.other_rule, self.best["by"]))
                    print(
                        f"note: the best checkpoint so far was chosen by the highest {before}, and is now by the "
                        f"highest {now}: it starts anew from epoch {self.first_epoch} on"
                    )
        writer = self._tensorboard()
        total = (config.epochs - self.first_epoch + 1) * self.steps_per_epoch
        bar = tqdm(
            total=max(total, 0), unit="step", disable=not (self.progress and sys.stderr.isatty()), smoothing=0.05
        )
        try:
            for epoch in range(self.first_epoch, config.epochs + 1):
                row = self._epoch(epoch, bar)
                folder.append_metrics(row)
                for key, value in row.items():
                    if writer is not None and key != "epoch":
                        writer.add_scalar(key, value, epoch)
                state = self._state(epoch)
                by, tie = best_by(config)
                # Strictly better: among equals the earliest stays.
                if f"val/{by}" in row and (row[f"val/{by}"], row[f"val/{tie}"]) > (
                    self.best["value"],
                    self.best["tie"],
                ):
                    self.best = {"epoch": epoch, "by": by, "value": row[f"val/{by}"], "tie": row[f"val/{tie}"]}
                    state["best"] = self.best
                    folder.save("best", state, {**self.meta, "best": self.best})
                if self.ema is not None:
                    folder.save_weights("ema", self.ema.state, {**self.meta, "epoch": epoch, "ema": config.ema})
                folder.save("last", state, self.meta)
                self.saved_epoch = epoch
                if self.progress:
                    tqdm.write(_line(row, config.epochs), file=sys.stdout)
                    sys.stdout.flush()
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        finished = self.first_epoch > config.epochs and (folder.path / "swa.safetensors").exists()
        if self.average is not None and not finished:
            self._finish_swa()
        return Result(folder.path, folder.metrics(), self.step.model.eval(), config)

    def _epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        config, step = self.config, self.step
        # Every stream restarts from (seed, epoch), so a resumed run draws what an unbroken one draws.
        torch.manual_seed(derive_seed(config.seed, "torch", epoch))
        step.generator.manual_seed(derive_seed(config.seed, "attack", epoch))
        config.defense.before_epoch(step.companions, lambda name, count: self._probe(name, count, epoch), epoch)
        log_every = config.log_every or (1 if self.device.type == "cpu" else 50)
        step.meter.reset()
        images_seen, started = 0, time.perf_counter()
        for index, batch in enumerate(self.loader.epoch(epoch)):
            if index >= self.steps_per_epoch:
                break
            lr = lr_at(
                epoch,
                index,
                steps=self.steps_per_epoch,
                epochs=config.epochs,
                recipe=self.recipe,
                lr=config.optim.lr,
                warmup=config.optim.warmup,
            )
            step.set_lr(lr)
            if self.recipe.one_cycle:
                step.set_momentum(
                    momentum_at(epoch, index, steps=self.steps_per_epoch, epochs=config.epochs, recipe=self.recipe)
                )
            done = (epoch - 1) * self.steps_per_epoch + index
            step.at(epoch=epoch, progress=done / (config.epochs * self.steps_per_epoch))
            step(batch.images, batch.labels)
            self._average(epoch, index)
            if self.ema is not None:
                self.ema.update(self.step.model)
            images_seen += len(batch.labels)
            if (index + 1) % log_every == 0 or index + 1 == self.steps_per_epoch:
                self._check_finite(epoch)
                rate = images_seen / (time.perf_counter() - started)
                means = step.meter.read()
                shown = {k: _loss(means[k]) for k in ("loss", "clean_acc", "robust_acc") if k in means}
                bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
                bar.set_postfix({**shown, "images/s": f"{rate:.0f}"}, refresh=False)
            bar.update()
        wall = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "wall_s": wall, "images_per_s": images_seen / wall}
        row |= {f"train/{name}": value for name, value in step.meter.read().items()}
        self._check_network(epoch, batch.images)
        if epoch % config.eval.every == 0 or epoch == config.epochs:
            row |= self._validate(epoch)
        return row

    def _validate(self, epoch: int) -> dict[str, float]:
        if not len(self.dataset.val):
            return {}
        try:
            result = evaluate(
                self.step.model,
                self.dataset.val,
                f"clean,pgd-{self.config.eval.num_steps}",
                epsilon=self.config.attack.epsilon,
                norm=self.config.attack.norm,
                seed=self.config.seed,
                batch_size=max(256, self.config.batch_size),
                device=self.device,
                progress=False,
            )
        except NonFinite as error:
            raise self._diverged("the network's logits on the validation images", epoch) from error
        return {f"val/{name}": value for name, value in result.accuracy.items()}

    @torch.no_grad()
    def _probe(self, name: str, count: int, epoch: int) -> Tensor:
        """Accuracy of branch `name`, eval mode, on the first whole batches of a fresh augmented pass."""
        model, seen = self.step.model.eval(), 0
        correct = torch.zeros((), device=self.device)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for batch in self.probe_loader.epoch(epoch):
            with branch(model, name):
                logits = model(batch.images)
            correct += (logits.argmax(1) == batch.labels).sum()
            finite &= logits.isfinite().all()
            seen += len(batch.labels)
            if seen >= count:
                break
        model.train()
        if not finite:
            raise self._diverged(f"the network's logits in eval mode (BatchNorm branch {name!r})", epoch, step=0)
        return correct / seen

    def _check_finite(self, epoch: int) -> None:
        bad = self.step.meter.bad()
        if bad is None:
            return
        index, name = bad
        raise self._diverged(name if name in self.step.meter.watched else f"loss term {name!r}", epoch, step=index + 1)

    @torch.no_grad()
    def _check_network(self, epoch: int, images: Tensor) -> None:
        """Raise Diverged unless all that this epoch leaves behind is finite; one or two reads of the device.

        No loss sees what the last step made of the weights, and in train mode none sees the running statistics, which
        may overflow by themselves, or give logits that do. images: a batch to look at those logits with.
        """
        named = self._tensors()
        if self.ema is not None:
            named += [(f"the moving average of {k!r}", v) for k, v in self.ema.state.items() if k in self.ema.averaged]
        if self.average is not None:
            named += [("the mean of the weights (SWA)", value) for value in self.average.parameters]
        if bad := [name for name in _not_finite(named) if name not in self.never_finite]:
            raise self._diverged(bad[0], epoch)
        model, logits = self.step.model, []
        images = images.to(memory_format=self.step.memory_format)
        with mode_of(model, False):
            for name in branches_of(model) or ("adv",):
                which = f" (BatchNorm branch {name!r})" if branches_of(model) else ""
                with branch(model, name):
                    logits.append((f"the network's logits in eval mode{which}", model(images)))
            if self.ema is not None:
                logits.append(("the averaged network's logits (EMA)", functional_call(model, self.ema.state, images)))
        if bad := _not_finite(logits):
            raise self._diverged(bad[0], epoch)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*_named(self.step.model), *_named(self.step.companions, " of the defense's companions")]

    def _diverged(self, what: str, epoch: int, step: int | None = None) -> Diverged:
        """Build the error that `what` is not finite at `step` of `epoch`, by default after its last one."""
        last = (
            f"the last good checkpoint is {self.folder.path / 'last.pt'} (epoch {self.saved_epoch})"
            if self.saved_epoch
            else "no checkpoint was written yet"
        )
        when = f"at epoch {epoch}, step {step} of {self.steps_per_epoch}"
        if step == 0:
            when = f"before the first step of epoch {epoch}"
        elif step is None:
            when = f"by the end of epoch {epoch} ({self.steps_per_epoch} steps)"
        return Diverged(
            f"training stopped: {what} became NaN or infinite {when}; {last}. The usual mend is an --optim.lr below "
            f"{self.config.optim.lr:g}, with another --out"
        )

    # --- averaging --------------------------------------------------------------------------------------------------

    def _swa_plan(self) -> tuple[int, int]:
        """First epoch (1-based) and steps between snapshots."""
        config, swa = self.config, self.config.swa_config
        first = math.floor(swa.start * config.epochs) + 1
        if swa.every is not None:
            return first, swa.every
        few = (config.epochs - first + 1) * self.steps_per_epoch < 5 * 500
        return first, self.steps_per_epoch if few else 500

    def _average(self, epoch: int, index: int) -> None:
        if self.average is None:
            return
        first, every = self._swa_plan()
        if epoch >= first and (epoch * self.steps_per_epoch + index) % every == 0:
            self.average.update(self.step.model)

    def _finish_swa(self) -> None:
        step = self.step
        torch.manual_seed(derive_seed(self.config.seed, "swa", "torch"))
        step.generator.manual_seed(derive_seed(self.config.seed, "swa"))
        # A run resumed after its last epoch has not been told where it is.
        step.at(epoch=self.config.epochs, progress=1.0)
        batches = itertools.islice(self.loader.epoch(self.config.epochs + 1), self.steps_per_epoch)
        if self.progress:
            print(f"SWA: re-estimating BatchNorm of the mean of {self.average.count} snapshots", flush=True)
        model = averaged_model(step, self.average, batches, exact=self.config.swa_config.exact)
        if bad := [name for name in _not_finite(_named(model)) if name not in self.never_finite]:
            raise self._diverged(f"{bad[0]} of the averaged network (SWA)", self.config.epochs)
        self.folder.save_weights("swa", model.state_dict(), {**self.meta, "epoch": self.config.epochs, "swa": True})

    # --- state ------------------------------------------------------------------------------------------------------

    def _state(self, epoch: int) -> dict[str, Any]:
        return {
            "epoch": epoch,
            "step": self.step.state_dict(),
            "best": self.best,
            "config": to_dict(self.config),
            "average": None if self.average is None else self.average.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def _load(self) -> None:
        if not (self.folder.path / "last.pt").exists():
            # Killed before the first checkpoint: the run starts over, in the same folder.
            self.folder.truncate_metrics(0)
            return
        state = self.folder.load(map_location=self.device)
        load_into(self.step.model, state["step"]["model"], self.folder.path / "last.pt")
        self.step.load_state_dict(state["step"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.saved_epoch = state["epoch"]
        self.first_epoch = self.saved_epoch + 1
        # Runs from before the rule was a defense's own: PGD chose, and the earliest of equals stayed.
        best = {"by": f"robust_acc_pgd{self.config.eval.num_steps}", "tie": math.inf, **(state.get("best") or _NO_BEST)}
        if best["by"] == self.best["by"]:
            self.best = best
        elif best["epoch"]:
            self.other_rule = best["by"]
        self.folder.truncate_metrics(state["epoch"])

    def _tensorboard(self):
        if not self.config.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        purge = self.first_epoch if self.resume else None
        return SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=purge)

    # --- card -------------------------------------------------------------------------------------------------------

    def card(self) -> str:
        """The run card: everything a number of this run depends on."""
        config, step, defense = self.config, self.step, self.config.defense
        attack, optim = config.attack, config.optim
        published = (self.recipe.epochs, *self.recipe.unscaled)
        scaled = "" if config.epochs in published else f" (milestones scaled from {self.recipe.epochs} epochs)"
        momentum = "0.95 to 0.85 and back" if optim.momentum is None else f"{optim.momentum:g}"
        parameters = sum(p.numel() for p in step.model.parameters())
        rows = {
            "defense": (defense.name or type(defense).__name__)
            + (f": minimise {defense.formula}" if defense.formula else ""),
            **defense.describe(attack.norm),
        }
        if defense.attacks:
            rows |= {
                "attack": f"PGD-{attack.num_steps} {attack.norm}, maximises {step.objective}, "
                f"epsilon {pixels(attack.epsilon)}, "
                f"step {pixels(config.attack.step_size)}"
                + (f", {attack.num_restarts} restarts" if attack.num_restarts > 1 else ""),
                "attack start": _START[step.start],
                "attack BN": _BN[step.attack_bn],
            }
        train, val, test = (len(s) for s in (self.dataset.train, self.dataset.val, self.dataset.test))
        rows |= {
            "model": f"{config.model}, {parameters:,} parameters, input [0, 1]"
            + (", normalised inside" if config.normalize else ""),
            "data": f"{self.dataset.name}: {train:,} train, {val:,} validation, {test:,} test, "
            f"{len(self.dataset.classes)} classes, {'x'.join(map(str, self.dataset.shape))}",
            **{f"data note {i}": note for i, note in enumerate(self.dataset.notes, 1)},
            "best": self._best_rule(),
            "augmentation": "off"
            if self.augment is None
            else f"random crop, zero padding {self.augment.padding}"
            + (", horizontal flip" if self.augment.flip else ""),
            "loader": f"{self.loader.kind}: {self.loader.reason}",
            "schedule": f"{optim.recipe}{scaled}, {counted(config.epochs, 'epoch')} x {self.steps_per_epoch} steps of "
            f"{config.batch_size}, "
            f"{in_words(self.recipe, epochs=config.epochs, lr=optim.lr, warmup=optim.warmup)}, "
            f"momentum {momentum}, weight decay {optim.weight_decay:g} on everything",
            "optimiser": {"apex": "NVIDIA Apex FusedSGD", "torch": "torch SGD, fused"}.get(
                optim.optimizer, "SGD, fused" + (", writing the attack's weights too" if self.step.one_pass else "")
            ),
            "precision": self.precision_note + ("; the attack's first step float32" if self.step.careful else ""),
            "device": _device_name(self.device) + f", torch {torch.__version__}",
        }
        if config.awp is not None:
            rows["AWP"] = f"gamma_w {config.awp:g}" + (
                f", from epoch {config.awp_warmup + 1}" if config.awp_warmup else ""
            )
        if self.average is not None:
            first, every = self._swa_plan()
            rows["SWA"] = f"a snapshot every {every} steps from epoch {first}, BatchNorm re-estimated at the end"
        if config.ema is not None:
            rows["EMA"] = f"decay {config.ema:g}, evaluated with --weights ema"
        rows |= card_rows(
            config, min(self.dataset.shape[1:]), self._swa_plan()[1], precision=self.precision, num_train=train
        )
        rows |= self._fast_paths()
        rows |= {"seed": str(config.seed), "run folder": str(self.folder.path)}
        width = max(map(len, rows))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())

    def _best_rule(self) -> str:
        if not len(self.dataset.val):
            return "no validation images: no best"
        by, tie = (accuracy_name(key) for key in best_by(self.config))
        every = (
            "" if self.config.eval.every == 1 else f", measured every {self.config.eval.every} epochs and at the end"
        )
        return (
            f"highest {by} on {len(self.dataset.val):,} validation images{every}; of equal ones the highest {tie}, "
            "then the earliest epoch"
        )

    def _fast_paths(self) -> dict[str, str]:
        layers = sum(isinstance(m, BatchNorm2d) for m in self.step.model.modules())
        why = "asked for plain" if self.config.kernels == "plain" else why_not_triton(self.device)
        on = ["channels-last"] if self.config.channels_last else []
        off = [] if self.config.channels_last else ["channels-last (asked for)"]
        if self.config.defense.needs_clean:
            on.append("one forward for [clean; adv]")
        if self.config.defense.attacks:
            on.append("input gradients only in the attack")
        if self.step.fold:
            on.append("BatchNorm folded into the attack's convolutions")
        wide = any(map(qualifies, self.step.model.modules()))
        if wide and self.device.type == "cpu" and self.precision == "fp32" and self.config.channels_last:
            on.append("Winograd convolutions")
        if self.config.compile_loss:
            on.append("compiled loss")
        if self.step.why_eager:
            off.append(f"captured step ({self.step.why_eager})")
        else:
            on.append("step captured as one CUDA graph" if self.config.capture != "fake" else "fake capture")
        if layers and why is None:
            on.append(f"fused BN+add+ReLU Triton kernels ({layers} layers)")
        elif layers:
            off.append(f"Triton kernels ({why})")
        return {"fast paths on": ", ".join(on), **({"fast paths off": "; ".join(off)} if off else {})}


def _named(module: nn.Module, owner: str = "") -> list[tuple[str, Tensor]]:
    """Return everything a network consists of, with names for people."""
    named = [(f"weight {name!r}{owner}", p) for name, p in module.named_parameters()]
    for name, buffer in module.named_buffers():
        kind = "running statistic" if "running_" in name else "buffer"
        named.append((f"{kind} {name!r}{owner}", buffer))
    return named


def _not_finite(named: list[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity, in order; one read of the device."""
    flags = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
    return [name for (name, _), finite in zip(named, flags, strict=True) if not finite]


def best_by(config: Config) -> tuple[str, str]:
    """Return the keys of the accuracies on validation images that choose the best checkpoint.

    The first decides; the second decides between equals, and then the earliest epoch is best.
    """
    keys = (f"robust_acc_pgd{config.eval.num_steps}", "clean_acc")
    return keys if config.defense.chosen_by == "robust" else keys[::-1]


def accuracy_name(key: str) -> str:
    """robust_acc_pgd10 -> PGD-10 accuracy."""
    return f"{attack_title(key)} accuracy"


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


def pixels(value: float) -> str:
    """Format a length in pixel units, as a fraction of 255 where it is one: 8/255 (0.03137)."""
    top = value * 255
    if math.isclose(top, round(top), abs_tol=1e-6) and round(top) > 0:
        return f"{round(top)}/255 ({value:.5f})"
    fraction = Fraction(value).limit_denominator(1000)
    return f"{value:.5g}" if abs(float(fraction) - value) > 1e-9 else f"{float(fraction):.5g}"


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e5 else f"{value:.3g}"


def _line(row: dict[str, Any], epochs: int) -> str:
    parts = [f"epoch {row['epoch']:>3}/{epochs}", f"lr {row['lr']:.4g}", f"loss {_loss(row['train/loss'])}"]
    train = [
        f"{short} {row[f'train/{key}']:.1%}"
        for key, short in (("clean_acc", "clean"), ("robust_acc", "attacked"))
        if f"train/{key}" in row
    ]
    parts.append("train " + ", ".join(train))
    val = [
        f"{key.removeprefix('val/').replace('_acc', '').replace('robust_', '')} {value:.1%}"
        for key, value in row.items()
        if key.startswith("val/")
    ]
    if val:
        parts.append("val " + ", ".join(val))
    return "  ".join([*parts, f"{row['images_per_s']:.0f} images/s", f"{row['wall_s']:.1f} s"])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()}, {os.cpu_count()} cores)"


def _limited(dataset: Dataset, count: int | None) -> Dataset:
    if count is None or count >= len(dataset.train):
        return dataset
    split = dataset.train
    rows = torch.from_numpy(stratified_indices(split.labels.numpy(), count, seed=0))
    images = None if split.images is None else split.images[rows]
    train = dataclasses.replace(split, images=images, labels=split.labels[rows], indices=split.indices[rows])
    return dataclasses.replace(dataset, train=train)


def _check_sizes(dataset: Dataset, config: Config) -> None:
    """Raise UserError for a training set that leaves a class out or does not fill a batch."""
    count = len(dataset.train)
    limit = "" if config.limit_train is None or config.limit_train > count else f" (limit_train={config.limit_train})"
    empty = (torch.bincount(dataset.train.labels, minlength=len(dataset.classes)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"the {count} training image(s) of {dataset.name}{limit} leave out {len(empty)} of its "
            f"{len(dataset.classes)} classes, {dataset.classes[empty[0]]!r} first: "
            + (
                f"write --limit-train {len(dataset.classes)} or more"
                if limit
                else "hold out fewer with --eval.val-images, or remove those classes"
            )
        )
    if config.batch_size > count:
        raise UserError(
            f"batch_size={config.batch_size} is more than the {count:,} training images of {dataset.name}{limit}: "
            f"every step would see fewer than asked for; write --batch-size {count} for all of them, or less"
        )


def _mean_std(split: Split) -> tuple[list[float], list[float]]:
    loader: Loader = make_loader(split, batch_size=1024, device="cpu")
    total, square, count = 0.0, 0.0, 0
    for batch in loader.epoch(0):
        pixels_ = batch.images.double()
        total = total + pixels_.sum((0, 2, 3))
        square = square + pixels_.square().sum((0, 2, 3))
        count += pixels_.numel() // pixels_.shape[1]
    mean = total / count
    return mean.tolist(), (square / count - mean.square()).sqrt().tolist()


def check_branch(run: str | Path, meta: dict[str, Any], branch: str, which: str = "last") -> None:
    """Raise UserError unless a run's network has a BatchNorm set `branch` that can be used."""
    known = meta["branches"] or ["adv"]
    if branch not in known:
        why = "" if meta["branches"] else " (this network has one BatchNorm set, called adv)"
        raise UserError(f"no BatchNorm branch {branch!r} in {run}: it has {', '.join(known)}{why}")
    if (which == "swa" or meta.get("swa")) and meta["branches"] and branch != "adv":
        raise UserError("the averaged network's clean BatchNorm was never re-estimated: take branch adv, or last")


def load_run(path: str | Path, which: str = "last") -> tuple[nn.Module, dict[str, Any], Config | None]:
    """Rebuild a trained network from a run folder or a checkpoint file.

    Args:
        path: run folder, .safetensors or .pt. which: "last", "best" or "swa", for a folder.
    Returns: model on the CPU in eval mode, metadata, and the run's config (None for a file elsewhere).
    Raises: UserError for anything missing, corrupt, or of another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no run folder or checkpoint {path}")
    file = path / f"{which}.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        there = ", ".join(sorted(p.stem for p in path.glob("*.safetensors"))) or "none yet"
        raise UserError(f"{path} has no {which} weights (there: {there})")
    weights, meta = load_weights(file)
    mean = [0.0] * meta["in_channels"] if meta["normalized"] else None
    model = build_model(
        meta["model"],
        num_classes=meta["num_classes"],
        in_channels=meta["in_channels"],
        image_size=meta["image_size"],
        mean=mean,
        std=None if mean is None else [1.0] * len(mean),
    )
    if meta["branches"]:
        split_batchnorm(model, meta["branches"])
    load_into(model, weights, file)
    saved = file.parent / "config.yaml"
    config = from_dict(read_yaml(saved), source=str(saved)) if saved.is_file() else None
    return model.eval().to(memory_format=torch.channels_last), meta, config
