"""Training from a Config: data, network, step, schedule, validation, checkpoints, and the card that says which."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from fastarat.averages import MovingAverage, WeightAverage, averaged_model, swa_plan
from fastarat.bars import step_bar
from fastarat.building import build_step, choose_precision, train_loader
from fastarat.callbacks import Callback, Hooks, Running
from fastarat.card import accuracy_name, card
from fastarat.checkpoints import Checkpoints, Place
from fastarat.config import Config
from fastarat.data import Batch, derive_seed, limited
from fastarat.defenses import Defense
from fastarat.device import OutOfMemory, backend_flags, enough_memory, pick_device, seeded_apart, threads
from fastarat.diagnostics import Diagnostics
from fastarat.distributed import World, joined
from fastarat.errors import UserError
from fastarat.evaluation import NonFinite, evaluate
from fastarat.files import write_text
from fastarat.finite import Diverged, Watch, diverged, probe, tensors_of
from fastarat.given import Given, with_given
from fastarat.interrupts import Interrupted, Pace, Signals
from fastarat.locks import held
from fastarat.loggers import hooks_of
from fastarat.logs import in_short, line, logging
from fastarat.nets import own
from fastarat.nets.batchnorm import branches_of
from fastarat.released import resolve
from fastarat.results import Result
from fastarat.resuming import config_to_resume
from fastarat.runs import Run, meta_of
from fastarat.schedules import lr_at, momentum_at, total_at
from fastarat.specs import known
from fastarat.stopping import ended
from fastarat.together import Course, begun, check_together, steps_of


def train(
    config: Config | None = None,
    *,
    defense: Defense | type[Defense] | None = None,
    resume: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
    data: Any = None,
    model: own.Given | None = None,
    callbacks: Iterable[Callback] = (),
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
        data: instead of `config.dataset`, a `fastarat.data.Data`: training, validation and test images of any kind.
            With `resume`: the same again, of a run that had it.
        model: instead of `config.model`, any network from images [B, C, H, W] in [0, 1] to logits [B, K], of which a
            copy is trained, or a function from K to one. With `resume`: the same again.
        callbacks: told of steps, epochs and checkpoints, and able to end the run; see `Callback`.
    Returns: Result.
    Raises: UserError before any training for every mistake in the config, and where the memory does not suffice, naming
        a batch size to try; Diverged when a loss term, a weight, a running statistic or the network's logits become NaN
        or infinite, naming it, the step and the last good checkpoint (what is written is finite); Interrupted, a
        KeyboardInterrupt, when SIGINT, SIGTERM or SIGHUP ended the run after a step, its state kept (in the main
        thread; a second signal ends it at once); CallbackError when a callback raised, the run's state kept.
    """
    if resume is not None:
        if config is not None:
            raise UserError("resume continues a run with its saved config: give the folder alone")
        config, defense = config_to_resume(Run(resume), overrides or {}, defense), None
    config = config or Config()
    if defense is not None:
        config = dataclasses.replace(config, defense=defense)
    config, given = with_given(config, data, model, resumes=resume is not None)
    with (
        joined(config.device) as world,
        threads(config.threads),
        seeded_apart(world.device),
        ExitStack() as hold,
        enough_memory(config.batch_size, "a run keeps its batch size, so choose another out; what is written stays"),
        Signals() as signals,
    ):
        try:
            with signals.at_once():
                hooks = hooks_of(config, callbacks, world.first)
                options = {"progress": progress, "hold": hold, "signals": signals, "hooks": hooks, "given": given}
                trainer = Trainer(config, resume=resume is not None, world=world, **options)
        except Interrupted:
            signals.end("before the first step; nothing was begun, and the same command starts again")
        with backend_flags(world.device, trainer.precision, config.cudnn_plans):
            return hooks.through(_running(trainer), trainer.run, trainer.result)


class Trainer:
    """One run, from its first epoch, or the one after its last checkpoint, to its last.

    What is set for the whole process meanwhile (threads, PyTorch's switches) is `train`'s. hold: takes the lock of the
    run's folder, which is known once the config is resolved, until it closes. signals: those that end it, entered.
    hooks: of the callbacks. given: data and network of the person's own. world: the processes that train together; rank
    0 writes and prints, and decides what each would by itself.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        progress: bool = False,
        hold: ExitStack | None = None,
        signals: Signals | None = None,
        hooks: Hooks | None = None,
        given: Given | None = None,
        world: World | None = None,
    ) -> None:
        self.world = world = world or World(device=pick_device(config.device))
        self.progress, self.device, self.hooks = progress and world.first_one, world.device, hooks or Hooks()
        given = given or Given()
        self.dataset = dataset = limited(given.dataset_of(config), config.limit_train, config.batch_size)
        config = resolve(config, dataset)
        self.epochs, self.recipe, out = known(config.epochs), config.optim.schedule(), known(config.out)
        if hold is not None:
            world.first(lambda: hold.enter_context(held(out, "fastarat train")))
        check_together(world, config, dataset)
        self.steps_per_epoch = steps_of(config, dataset, world)
        self.swa_plan = swa_plan(config, self.steps_per_epoch)
        resume, whole, saved = begun(world, config, self.device, resume)
        timed = {"begun": saved and saved["meta"], "model": given.model}
        timed["say"] = partial(print, flush=True) if progress else lambda text: None
        self.precision, note = world.first(lambda: choose_precision(config, dataset, self.device, **timed))
        self.config = config = dataclasses.replace(config, precision=config.precision or self.precision)
        built = {"starts": saved is None, "model": given.model, "world": world}
        self.step = build_step(config, dataset, self.device, self.precision, **built)
        self.loader = train_loader(config, dataset, world)
        seen = (self.step, dataset.val, self.steps_per_epoch, self.epochs, len(dataset.train))
        self.diagnostics = Diagnostics(*seen) if config.diagnostics else None
        self.average = WeightAverage(self.step.model) if config.swa else None
        self.ema = None if config.ema is None else MovingAverage(self.step.model, config.ema)
        self.card = card(
            config, dataset=dataset, loader=self.loader, step=self.step, steps_per_epoch=self.steps_per_epoch,
            precision_note=note, swa_plan=self.swa_plan, diagnostics=self.diagnostics,
        )  # fmt: skip
        self.meta = meta_of(config, dataset, branches_of(self.step.model), precision=(self.precision, note))
        self.folder = world.first(lambda: Run.resume(out) if resume else Run.create(out))
        self.folder.last_is_whole = whole
        self.watch = Watch(self.step, self.average, self.ema)
        self.kept = Checkpoints(self.folder, config, self.step, self.average, self.ema, self.meta, self.diagnostics)
        pace = Pace(config.checkpoint_every)
        self.course = Course(world, signals or Signals(), pace, lambda: self.hooks.ending)
        self.signals = self.course.signals
        self.start = Place(1) if saved is None else self.kept.load(saved, self.steps_per_epoch)
        self.resumed, self.within = resume, saved and saved.get("within")
        if resume:
            world.first(lambda: self.folder.truncate_metrics(self.kept.epoch))

    def run(self) -> Result:
        """Train, and return what is left. Raises: Diverged, Interrupted."""
        folder, first = self.folder, self.start.epoch
        self.world.first(lambda: _begun(self))
        if self.progress:
            _announce(self.card, self)
        where = {"first": first, "epochs": self.epochs, "steps": self.steps_per_epoch, "initial": self.start.steps}
        with (
            step_bar(self.progress, **where) as bar,
            _logging(self, first) as log,
        ):
            for epoch in range(first, self.epochs + 1):
                if self.kept.over_early():
                    break
                row = self._epoch(self.start if epoch == first else Place(epoch), bar)
                row |= self.kept.since_best(epoch, row)
                log(row)
                self.kept.save(epoch, row)
                self.hooks.epoch(row, folder.checkpoint())
                self.course.pace.restart()
                if self.progress:
                    tqdm.write(line(row, self.epochs), file=sys.stdout)
                    sys.stdout.flush()
                over = epoch == self.epochs or self.kept.over_early()
                if self.course.ending() and not (over and self.average is None):
                    self._stop(Place(epoch + 1))
        if self.kept.over_early() and self.world.first_one:
            _say_early(self)
        if self.average is not None and self.world.first(folder.averaged_at) != self.kept.epoch:
            try:
                _finish_swa(self, self.average)
            except Interrupted:
                self._stop(Place(self.kept.epoch + 1))
        self.world.barrier()  # what is read now is written
        return self.result()

    def result(self, stopped: str | None = None) -> Result:
        return Result(self.folder.path, self.folder.metrics(), self.step.model.eval(), self.config, stopped)

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
                terms = step(batch.images, batch.labels, **self.course.whole(self.loader.total(index)))
            snapshots, every = self.swa_plan
            if self.average is not None and epoch >= snapshots and (epoch * steps + index) % every == 0:
                self.average.update(step.model)
            if self.ema is not None:
                self.ema.update(step.model)
            place.images, place.steps = place.images + self.loader.total(index), index + 1
            self.hooks.step(epoch, index + 1, done + 1, self.loader.total(index), lr, terms)
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
            if self.course.due(within=place.steps < steps):  # after the last step an epoch's own checkpoint comes
                place.wall_s = time.perf_counter() - started
                self._keep_within(place, batch.images)
        wall = place.wall_s = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "wall_s": wall, "images_per_s": place.images / wall}
        row |= {f"train/{name}": value for name, value in step.meter.read().items()}
        images = known(batch).images
        self.kept.settle()
        if what := self.watch.state(images):
            raise self._diverged(what, epoch)
        if epoch % config.eval.every == 0 or epoch == where["epochs"]:
            if self.world.size > 1:  # which are not interrupted in it, and a launcher waits for 30 s only
                self.kept.save_within(place)
            try:
                row |= self._validate(epoch)
            except Interrupted as error:
                self.course.stop(error.signum)
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
        self.hooks.checkpoint(self.folder.checkpoint("unfinished"))
        if self.course.stopping:
            self._stop(place)

    def _stop(self, place: Place) -> NoReturn:
        """End a run that is kept, as a callback or the signal received says."""
        kept = _where(self, place)
        self.hooks.end(kept)
        self.signals.end(kept)

    def _validate(self, epoch: int) -> dict[str, float]:
        if not len(self.dataset.val):
            return {}
        try:
            # Of several none leaves the others in the middle: a signal is looked at after it.
            with self.signals.at_once() if self.world.size == 1 else contextlib.nullcontext():
                result = evaluate(
                    self.step.model,
                    self.dataset.val,
                    f"clean,pgd-{self.config.eval.num_steps}",
                    epsilon=self.config.attack.epsilon,
                    norm=self.config.attack.norm,
                    seed=self.config.seed,
                    batch_size=max(256, math.ceil(self.config.batch_size / self.world.size / self.config.accumulate)),
                    device=self.device,
                    progress=False,
                    alarms=False,
                    world=self.world,
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
        # The same pixels in another order, none mixed: a second loader would hold the set on the device twice.
        seed = derive_seed(self.config.seed, "probe")
        batches = dataclasses.replace(self.loader, seed=seed, cutmix=None).epoch(epoch)
        if self.world.size > 1:  # none of so few images that a rank would have none
            batches = itertools.islice(batches, min(math.ceil(count / self.config.batch_size), self.steps_per_epoch))
        accuracy, finite = probe(self.step.model, name, batches, count, self.world)
        if not finite:
            raise self._diverged(f"the network's logits in eval mode (BatchNorm branch {name!r})", epoch, step=0)
        return accuracy

    def _diverged(self, what: str, epoch: int, step: int | None = None) -> Diverged:
        last = "no checkpoint was written yet"
        if self.kept.epoch:
            last = f"the last good checkpoint is {self.folder.checkpoint()} (epoch {self.kept.epoch})"
        return diverged(what, epoch, step, steps=self.steps_per_epoch, last=last, lr=known(self.config.optim.lr))


def _finish_swa(run: Trainer, average: WeightAverage) -> None:
    config, step = run.config, run.step
    torch.manual_seed(derive_seed(config.seed, "swa", "torch"))
    step.generator.manual_seed(derive_seed(config.seed, "swa"))
    # A run resumed after its last epoch has not been told where it is.
    step.at(epoch=run.kept.epoch, progress=1.0)
    batches = itertools.islice(run.loader.epoch(run.kept.epoch + 1), run.steps_per_epoch)
    if run.progress:
        print(f"SWA: re-estimating BatchNorm of the mean of {average.count} snapshots", flush=True)
    # Of several none leaves the others in the middle of a batch.
    alone = run.world.size == 1
    with run.signals.at_once() if alone else contextlib.nullcontext():
        batches = batches if alone else _until_ended(run, batches)
        model = averaged_model(step, average, batches, exact=config.swa_config.exact, total=run.loader.total)
    if bad := run.watch.bad(tensors_of(model)):
        raise run._diverged(f"{bad} of the averaged network (SWA)", run.kept.epoch)
    if run.world.first_one:
        run.folder.save_weights("swa", model.state_dict(), {**run.meta, "epoch": run.kept.epoch, "swa": True})


def _until_ended(run: Trainer, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches until a signal has come to any process. Raises: Interrupted, in all of them at once."""
    for batch in batches:
        if run.course.ending():
            raise Interrupted("ended", run.signals.received or signal.SIGTERM)
        yield batch


def _begun(run: Trainer) -> None:
    """Write what a run is before its first step."""
    config, written = run.config, run.folder.read_config() if run.resumed else None
    # The second: it is extended, or is to end elsewhere.
    if written is None or (written.epochs, written.early_stop) != (config.epochs, config.early_stop):
        run.folder.write_config(config)
    write_text(run.folder.card_file, run.card + "\n")


def _logging(run: Trainer, first: int) -> contextlib.AbstractContextManager[Callable[[dict[str, Any]], None]]:
    if not run.world.first_one:
        return contextlib.nullcontext(lambda row: None)
    return logging(run.folder, run.config.tensorboard, purge_step=first if run.resumed else None)


def _running(trainer: Trainer) -> Running:
    """What callbacks are told of a training."""
    return Running(
        folder=trainer.folder.path,
        config=trainer.config,
        card=trainer.card,
        model=trainer.step.model,
        epochs=trainer.epochs,
        steps_per_epoch=trainer.steps_per_epoch,
        resumed=trainer.resumed,
        progress=trainer.progress,
        epoch=trainer.kept.epoch,
        metrics=trainer.folder.metrics(),
    )


def _where(run: Trainer, place: Place) -> str:
    """Where a run that is kept was ended, and how it goes on."""
    after = f"step {place.steps} of {run.steps_per_epoch} in epoch {place.epoch}"
    if not place.steps:
        after = f"epoch {place.epoch - 1}"
    resume = f"fastarat train --resume {shlex.quote(str(run.folder.path))}"
    return f"after {after} of {run.epochs}; nothing is lost: {resume} goes on from there"


def _say_early(run: Trainer) -> None:
    """Say that a run was stopped early, on its card too."""
    said = ended(run.config, run.kept.epoch, run.kept.best["epoch"])
    write_text(run.folder.card_file, f"{run.card}\nstopped early  {said}\n")
    if run.progress:
        print(f"stopped early {said}", flush=True)


def _announce(card: str, run: Trainer) -> None:
    place, kept = run.start, run.kept
    print(card, flush=True)
    if kept.over_early():
        print(f"{run.folder.path} is finished: stopped early (--early-stop with more goes on)", flush=True)
    elif place.epoch > run.epochs:
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
