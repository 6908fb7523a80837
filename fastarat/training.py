"""Training from a Config: data, network, step, schedule, validation, checkpoints, and the card that says which."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastarat.averages import MovingAverage, WeightAverage, averaged_model, swa_plan
from fastarat.building import build_step, choose_precision
from fastarat.card import accuracy_name, card
from fastarat.checkpoints import Checkpoints, Place
from fastarat.config import Config
from fastarat.data import default_augment, derive_seed, limited, make_loader
from fastarat.defenses import Defense
from fastarat.device import OutOfMemory, backend_flags, enough_memory, pick_device, seeded_apart, threads
from fastarat.diagnostics import Diagnostics
from fastarat.errors import UserError
from fastarat.evaluation import NonFinite, evaluate
from fastarat.files import write_text
from fastarat.finite import Diverged, Watch, diverged, probe, tensors_of
from fastarat.interrupts import Interrupted, Pace, Signals
from fastarat.locks import held
from fastarat.logs import in_short, line, logging
from fastarat.nets.batchnorm import branches_of
from fastarat.released import resolve
from fastarat.resuming import config_to_resume, newest
from fastarat.runs import Run, dataset_of, meta_of
from fastarat.schedules import lr_at, momentum_at, recipe_of, total_at
from fastarat.specs import known


@dataclass(frozen=True)
class Result:
    """What a run leaves. run: its folder. metrics: one dict per epoch. model: the final network, in eval mode."""

    run: Path
    metrics: list[dict[str, Any]]
    model: nn.Module
    config: Config


def train(
    config: Config | None = None,
    *,
    defense: Defense | type[Defense] | None = None,
    resume: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> Result:
    """Train one network as `config` says, or continue the run in folder `resume`.

    Args:
        config: default `Config()`: AR-AT on digits.
        defense: replaces `config.defense`. With `resume`: the run's own, an instance or its class, for a run whose
            defense is none of fastarat's: a run folder's code is never run unasked.
        resume: a run folder; its saved config is used, and the run continues after its last checkpoint, within an epoch
            too, bit for bit on a CPU.
        overrides: with `resume`, values that may differ from the saved run (`fastarat.runs.MAY_DIFFER`), and `epochs`,
            which extends it when there are more than it had.
        progress: print the run card, a progress bar (on a terminal) and one line per epoch.
    Returns: Result.
    Raises: UserError before any training for every mistake in the config, and where the memory does not suffice, naming
        a batch size to try; Diverged when a loss term, a weight, a running statistic or the network's logits become NaN
        or infinite, naming it, the step and the last good checkpoint (what is written is finite); Interrupted, a
        KeyboardInterrupt, when SIGINT, SIGTERM or SIGHUP ended the run after a step, its state kept (in the main
        thread; a second signal ends it at once).
    """
    one_process()
    if resume is not None:
        if config is not None:
            raise UserError("resume continues a run with its saved config: give the folder alone")
        config, defense = config_to_resume(Run(resume), overrides or {}, defense), None
    config = config or Config()
    if defense is not None:
        config = dataclasses.replace(config, defense=defense)
    device = pick_device(config.device)
    with (
        threads(config.threads),
        seeded_apart(device),
        ExitStack() as hold,
        enough_memory(config.batch_size, "a run keeps its batch size, so choose another out; what is written stays"),
        Signals() as signals,
    ):
        try:
            with signals.at_once():
                trainer = Trainer(config, resume=resume is not None, progress=progress, hold=hold, signals=signals)
        except Interrupted:
            signals.end("before the first step; nothing was begun, and the same command starts again")
        with backend_flags(device, trainer.precision, config.cudnn_plans):
            return trainer.run()


def one_process() -> None:
    """Raise UserError inside a launcher that starts a command several times, torchrun's way."""
    if (size := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(size) > 1:
        raise UserError(
            f"WORLD_SIZE={size}: fastarat runs in one process on one device, and a launcher such as torchrun starts "
            f"the same run {size} times; start it without one (several seeds at once: fastarat compare --parallel)"
        )


class Trainer:
    """One run, from its first epoch, or the one after its last checkpoint, to its last.

    What is set for the whole process meanwhile (threads, PyTorch's switches) is `train`'s. hold: takes the lock of the
    run's folder, which is known once the config is resolved, until it closes. signals: those that end it, entered.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        progress: bool = False,
        hold: ExitStack | None = None,
        signals: Signals | None = None,
    ) -> None:
        self.progress, self.device = progress, pick_device(config.device)
        self.dataset = dataset = limited(dataset_of(config), config.limit_train, config.batch_size)
        config = resolve(config, dataset)
        self.epochs, self.recipe, out = known(config.epochs), recipe_of(known(config.optim.recipe)), known(config.out)
        if hold is not None:
            hold.enter_context(held(out, "fastarat train"))
        # Batch statistics of a single image are no statistics: a last batch of one is left out.
        size, single = len(dataset.train), len(dataset.train) % config.batch_size == 1
        self.steps_per_epoch = math.ceil(size / config.batch_size) - single
        # Reached with one training image, or a batch size that leaves one over.
        if self.steps_per_epoch < 1:
            raise UserError(f"{size} training image(s): at least 2 are needed")
        self.swa_plan = swa_plan(config, self.steps_per_epoch)
        if not resume:
            Run.check_new(out)  # before time is spent on the choice of a precision
        found = Run(out)
        saved = newest(found, self.device) if resume else None  # None: the run starts over
        say = partial(print, flush=True) if progress else lambda text: None
        self.precision, note = choose_precision(config, dataset, self.device, begun=saved and saved["meta"], say=say)
        self.config = config = dataclasses.replace(config, precision=config.precision or self.precision)
        self.step = build_step(config, dataset, self.device, self.precision, starts=saved is None)
        self.loader = make_loader(
            dataset.train,
            batch_size=config.batch_size,
            device=self.device,
            kind=config.loader,
            shuffle=True,
            seed=derive_seed(config.seed, "order"),
            augment=default_augment(dataset) if config.augment else None,
        )
        seen = (self.step, dataset.val, self.steps_per_epoch, self.epochs, size)
        self.diagnostics = Diagnostics(*seen) if config.diagnostics else None
        self.average = WeightAverage(self.step.model) if config.swa else None
        self.ema = None if config.ema is None else MovingAverage(self.step.model, config.ema)
        self.card = card(
            config, dataset=dataset, loader=self.loader, step=self.step, steps_per_epoch=self.steps_per_epoch,
            precision_note=note, swa_plan=self.swa_plan, diagnostics=self.diagnostics,
        )  # fmt: skip
        self.meta = meta_of(config, dataset, branches_of(self.step.model), precision=(self.precision, note))
        self.folder = Run.resume(out) if resume else Run.create(out)
        self.folder.last_is_whole = found.last_is_whole
        self.watch = Watch(self.step, self.average, self.ema)
        self.kept = Checkpoints(self.folder, config, self.step, self.average, self.ema, self.meta, self.diagnostics)
        self.signals, self.pace = signals or Signals(), Pace(config.checkpoint_every)
        self.start = Place(1) if saved is None else self.kept.load(saved, self.steps_per_epoch)
        self.resumed, self.within = resume, saved and saved.get("within")
        if resume:
            self.folder.truncate_metrics(self.kept.epoch)

    def run(self) -> Result:
        """Train, and return what is left. Raises: Diverged, Interrupted."""
        config, folder, first = self.config, self.folder, self.start.epoch
        written = folder.read_config() if self.resumed else None
        if written is None or written.epochs != config.epochs:  # the second: it is extended
            folder.write_config(config)
        write_text(folder.card_file, self.card + "\n")
        if self.progress:
            _announce(self.card, self)
        total = max(0, (self.epochs - first + 1) * self.steps_per_epoch)
        hidden = not (self.progress and sys.stderr.isatty())
        with (
            tqdm(total=total, initial=self.start.steps, unit="step", disable=hidden, smoothing=0.05) as bar,
            logging(folder, config.tensorboard, purge_step=first if self.resumed else None) as log,
        ):
            for epoch in range(first, self.epochs + 1):
                row = self._epoch(self.start if epoch == first else Place(epoch), bar)
                log(row)
                self.kept.save(epoch, row)
                self.pace.restart()
                if self.progress:
                    tqdm.write(line(row, self.epochs), file=sys.stdout)
                    sys.stdout.flush()
                if self.signals.received is not None and not (epoch == self.epochs and self.average is None):
                    self._stop(Place(epoch + 1))
        if self.average is not None and folder.averaged_at() != self.epochs:
            try:
                with self.signals.at_once():
                    self._finish_swa(self.average)
            except Interrupted:
                self._stop(Place(self.epochs + 1))
        return Result(folder.path, folder.metrics(), self.step.model.eval(), config)

    def _epoch(self, place: Place, bar: tqdm) -> dict[str, Any]:
        config, step, steps, epoch = self.config, self.step, self.steps_per_epoch, place.epoch
        self._begin(place)
        log_every = config.log_every or (1 if self.device.type == "cpu" else 50)
        where = {"steps": steps, "epochs": total_at(epoch, self.epochs, config.extended), "recipe": self.recipe}
        started, lr, batch = time.perf_counter() - place.wall_s, 0.0, None
        # Of an epoch whose steps were all done the last batch alone is read again: the watch looks at it.
        first = min(place.steps, steps - 1)
        for index, batch in enumerate(itertools.islice(self.loader.epoch(epoch, first), steps - first), first):
            lr = lr_at(epoch, index, **where, lr=config.optim.lr, warmup=config.optim.warmup)
            if index < place.steps:
                break
            step.set_lr(lr)
            if self.recipe.one_cycle:
                step.set_momentum(momentum_at(epoch, index, **where))
            done = (epoch - 1) * steps + index
            step.at(epoch=epoch, progress=done / (where["epochs"] * steps))
            with contextlib.nullcontext() if self.diagnostics is None else self.diagnostics.around(epoch, index, batch):
                step(batch.images, batch.labels)
            snapshots, every = self.swa_plan
            if self.average is not None and epoch >= snapshots and (epoch * steps + index) % every == 0:
                self.average.update(step.model)
            if self.ema is not None:
                self.ema.update(step.model)
            place.images, place.steps = place.images + len(batch.labels), index + 1
            # Reading the meter makes the host wait for the device: rarely on a GPU, where it would stop the queue.
            if (index + 1) % log_every == 0 or index + 1 == steps:
                if bad := self.watch.terms():
                    raise self._diverged(bad[0], epoch, step=bad[1])
                means = step.meter.read()
                shown = {k: in_short(means[k]) for k in ("loss", "clean_acc", "robust_acc") if k in means}
                bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
                rate = place.images / (time.perf_counter() - started)
                bar.set_postfix({**shown, "images/s": f"{rate:.0f}"}, refresh=False)
            bar.update()
            due = self.pace.due() and place.steps < steps  # after the last step an epoch's own checkpoint comes
            if due or self.signals.received is not None:
                place.wall_s = time.perf_counter() - started
                self._keep_within(place, batch.images)
        wall = place.wall_s = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "wall_s": wall, "images_per_s": place.images / wall}
        row |= {f"train/{name}": value for name, value in step.meter.read().items()}
        images = known(batch).images
        if what := self.watch.state(images):
            raise self._diverged(what, epoch)
        if epoch % config.eval.every == 0 or epoch == where["epochs"]:
            try:
                with self.signals.at_once():
                    row |= self._validate(epoch)
            except Interrupted:
                self._keep_within(place, images)
        return row if self.diagnostics is None else row | self.diagnostics.row(epoch)

    def _begin(self, place: Place) -> None:
        """Set the random streams and the meter to where `place` is."""
        config, step, epoch = self.config, self.step, place.epoch
        if place.steps and self.within is not None:
            self.kept.load_streams(self.within)
            return
        # Every stream restarts from (seed, epoch), so a resumed run draws what an unbroken one draws.
        torch.manual_seed(derive_seed(config.seed, "torch", epoch))
        step.generator.manual_seed(derive_seed(config.seed, "attack", epoch))
        config.defense.before_epoch(step.companions, lambda name, count: self._probe(name, count, epoch), epoch)
        step.meter.reset()
        if self.diagnostics is not None:
            self.diagnostics.begin()

    def _keep_within(self, place: Place, images: Tensor) -> None:
        """Keep the run as it is within an epoch; end it if a signal said so. images: of the last step."""
        if bad := self.watch.terms():
            raise self._diverged(bad[0], place.epoch, step=bad[1])
        if what := self.watch.state(images):
            raise self._diverged(what, place.epoch, place.steps)
        self.kept.save_within(place)
        if self.signals.received is not None:
            self._stop(place)

    def _stop(self, place: Place) -> NoReturn:
        """End a run that is kept, as the signal received says."""
        after = f"step {place.steps} of {self.steps_per_epoch} in epoch {place.epoch}"
        if not place.steps:
            after = f"epoch {place.epoch - 1}"
        self.signals.end(
            f"after {after} of {self.epochs}; nothing is lost: fastarat train --resume "
            f"{shlex.quote(str(self.folder.path))} goes on from there"
        )

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
                alarms=False,
            )
        except OutOfMemory as error:
            raise UserError(
                f"validating took more memory than there is beside the training ({error}); or --eval.val-images 0 "
                "leaves it out"
            ) from error
        except NonFinite as error:
            raise self._diverged("the network's logits on the validation images", epoch) from error
        return {f"val/{name}": value for name, value in result.accuracy.items()}

    def _probe(self, name: str, count: int, epoch: int) -> Tensor:
        """Accuracy of branch `name`, eval mode, on the first whole batches of a fresh augmented pass."""
        # The same pixels in another order: a second loader would hold the set on the device twice.
        batches = dataclasses.replace(self.loader, seed=derive_seed(self.config.seed, "probe")).epoch(epoch)
        accuracy, finite = probe(self.step.model, name, batches, count)
        if not finite:
            raise self._diverged(f"the network's logits in eval mode (BatchNorm branch {name!r})", epoch, step=0)
        return accuracy

    def _diverged(self, what: str, epoch: int, step: int | None = None) -> Diverged:
        last = "no checkpoint was written yet"
        if self.kept.epoch:
            last = f"the last good checkpoint is {self.folder.checkpoint()} (epoch {self.kept.epoch})"
        return diverged(what, epoch, step, steps=self.steps_per_epoch, last=last, lr=known(self.config.optim.lr))

    def _finish_swa(self, average: WeightAverage) -> None:
        config, step = self.config, self.step
        torch.manual_seed(derive_seed(config.seed, "swa", "torch"))
        step.generator.manual_seed(derive_seed(config.seed, "swa"))
        # A run resumed after its last epoch has not been told where it is.
        step.at(epoch=self.epochs, progress=1.0)
        batches = itertools.islice(self.loader.epoch(self.epochs + 1), self.steps_per_epoch)
        if self.progress:
            print(f"SWA: re-estimating BatchNorm of the mean of {average.count} snapshots", flush=True)
        model = averaged_model(step, average, batches, exact=config.swa_config.exact)
        if bad := self.watch.bad(tensors_of(model)):
            raise self._diverged(f"{bad} of the averaged network (SWA)", self.epochs)
        self.folder.save_weights("swa", model.state_dict(), {**self.meta, "epoch": self.epochs, "swa": True})


def _announce(card: str, run: Trainer) -> None:
    place, kept = run.start, run.kept
    print(card, flush=True)
    if place.epoch > run.epochs:
        print(f"{run.folder.path} is finished: nothing to do (--epochs N, above {run.epochs}, extends it)", flush=True)
    elif run.resumed:
        within = f", step {place.steps} of {run.steps_per_epoch} of epoch {place.epoch}" if place.steps else ""
        print(f"continuing after epoch {place.epoch - 1}{within}", flush=True)
        if kept.other_rule:
            before, now = (accuracy_name(key) for key in (kept.other_rule, kept.best["by"]))
            print(
                f"note: the best checkpoint so far was chosen by the highest {before}, and is now by the "
                f"highest {now}: it starts anew from epoch {place.epoch} on"
            )
