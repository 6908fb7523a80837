"""Training from a Config: data, network, step, schedule, validation, checkpoints, and the card that says which."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastarat.averages import MovingAverage, WeightAverage, averaged_model, swa_plan
from fastarat.building import build_step, choose_precision
from fastarat.card import accuracy_name, best_by, card
from fastarat.config import Config, to_dict
from fastarat.data import default_augment, derive_seed, limited, make_loader
from fastarat.defenses import Defense
from fastarat.device import backend_flags, pick_device, seeded_apart, threads
from fastarat.errors import UserError
from fastarat.evaluation import NonFinite, evaluate
from fastarat.files import load_into, write_text
from fastarat.finite import Diverged, Watch, tensors_of
from fastarat.locks import held
from fastarat.nets.batchnorm import branch, branches_of
from fastarat.released import resolve
from fastarat.resuming import config_to_resume
from fastarat.runs import Run, dataset_of, meta_of
from fastarat.schedules import lr_at, momentum_at, recipe_of
from fastarat.specs import known

_NO_BEST = {"epoch": 0, "value": -1.0, "tie": -1.0}


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
        if config is not None:
            raise UserError("resume continues a run with its saved config: give the folder alone")
        config, defense = config_to_resume(Run(resume), overrides or {}, defense), None
    config = config or Config()
    if defense is not None:
        config = dataclasses.replace(config, defense=defense)
    device = pick_device(config.device)
    with threads(config.threads), seeded_apart(device), ExitStack() as hold:
        trainer = Trainer(config, resume=resume is not None, progress=progress, hold=hold)
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
    run's folder, which is known once the config is resolved, until it closes.
    """

    def __init__(
        self, config: Config, *, resume: bool = False, progress: bool = False, hold: ExitStack | None = None
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
        saved = None
        if not resume:
            Run.check_new(out)  # before time is spent on the choice of a precision
        elif Run(out).resumable():  # else killed before the first checkpoint: the run starts over
            saved = Run(out).load(map_location=self.device)
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
        self.average = WeightAverage(self.step.model) if config.swa else None
        self.ema = None if config.ema is None else MovingAverage(self.step.model, config.ema)
        self.card = card(
            config,
            dataset=dataset,
            loader=self.loader,
            step=self.step,
            steps_per_epoch=self.steps_per_epoch,
            precision_note=note,
            swa_plan=self.swa_plan,
        )
        self.meta = meta_of(config, dataset, branches_of(self.step.model), precision=(self.precision, note))
        self.folder = Run.resume(out) if resume else Run.create(out)
        self.watch = Watch(self.step, self.average, self.ema)
        self.best: dict[str, Any] = {**_NO_BEST, "by": best_by(config)[0]}
        self.saved_epoch, self.resumed, self.other_rule = 0, resume, ""
        if resume:
            self._load(saved)

    def run(self) -> Result:
        """Train, and return what is left. Raises: Diverged."""
        config, folder, first = self.config, self.folder, self.saved_epoch + 1
        if not self.resumed:
            folder.write_config(config)
        write_text(folder.card_file, self.card + "\n")
        if self.progress:
            _announce(self.card, self, first)
        writer = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder.tensorboard_dir), purge_step=first if self.resumed else None)
        total = max(0, (self.epochs - first + 1) * self.steps_per_epoch)
        bar = tqdm(total=total, unit="step", disable=not (self.progress and sys.stderr.isatty()), smoothing=0.05)
        try:
            for epoch in range(first, self.epochs + 1):
                row = self._epoch(epoch, bar)
                folder.append_metrics(row)
                for key, value in row.items():
                    if writer is not None and key != "epoch":
                        writer.add_scalar(key, value, epoch)
                self._save(epoch, row)
                if self.progress:
                    tqdm.write(_line(row, self.epochs), file=sys.stdout)
                    sys.stdout.flush()
        finally:
            bar.close()
            if writer is not None:
                writer.close()
        finished = first > self.epochs and folder.weights("swa").exists()
        if self.average is not None and not finished:
            self._finish_swa(self.average)
        return Result(folder.path, folder.metrics(), self.step.model.eval(), config)

    def _epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        config, step, steps = self.config, self.step, self.steps_per_epoch
        # Every stream restarts from (seed, epoch), so a resumed run draws what an unbroken one draws.
        torch.manual_seed(derive_seed(config.seed, "torch", epoch))
        step.generator.manual_seed(derive_seed(config.seed, "attack", epoch))
        config.defense.before_epoch(step.companions, lambda name, count: self._probe(name, count, epoch), epoch)
        log_every = config.log_every or (1 if self.device.type == "cpu" else 50)
        step.meter.reset()
        where = {"steps": steps, "epochs": self.epochs, "recipe": self.recipe}
        images_seen, started, lr, batch = 0, time.perf_counter(), 0.0, None
        for index, batch in enumerate(itertools.islice(self.loader.epoch(epoch), steps)):
            lr = lr_at(epoch, index, **where, lr=config.optim.lr, warmup=config.optim.warmup)
            step.set_lr(lr)
            if self.recipe.one_cycle:
                step.set_momentum(momentum_at(epoch, index, **where))
            done = (epoch - 1) * steps + index
            step.at(epoch=epoch, progress=done / (self.epochs * steps))
            step(batch.images, batch.labels)
            first, every = self.swa_plan
            if self.average is not None and epoch >= first and (epoch * steps + index) % every == 0:
                self.average.update(step.model)
            if self.ema is not None:
                self.ema.update(step.model)
            images_seen += len(batch.labels)
            # Reading the meter makes the host wait for the device: rarely on a GPU, where it would stop the queue.
            if (index + 1) % log_every == 0 or index + 1 == steps:
                if bad := self.watch.terms():
                    raise self._diverged(bad[0], epoch, step=bad[1])
                means = step.meter.read()
                shown = {k: _loss(means[k]) for k in ("loss", "clean_acc", "robust_acc") if k in means}
                bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
                rate = images_seen / (time.perf_counter() - started)
                bar.set_postfix({**shown, "images/s": f"{rate:.0f}"}, refresh=False)
            bar.update()
        wall = time.perf_counter() - started
        row: dict[str, Any] = {"epoch": epoch, "lr": lr, "wall_s": wall, "images_per_s": images_seen / wall}
        row |= {f"train/{name}": value for name, value in step.meter.read().items()}
        if what := self.watch.state(known(batch).images):
            raise self._diverged(what, epoch)
        if epoch % config.eval.every == 0 or epoch == self.epochs:
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
        # The same pixels in another order: a second loader would hold the set on the device twice.
        for batch in dataclasses.replace(self.loader, seed=derive_seed(self.config.seed, "probe")).epoch(epoch):
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

    def _diverged(self, what: str, epoch: int, step: int | None = None) -> Diverged:
        """Build the error that `what` is not finite at `step` of `epoch`, by default after its last one."""
        last = "no checkpoint was written yet"
        if self.saved_epoch:
            last = f"the last good checkpoint is {self.folder.checkpoint()} (epoch {self.saved_epoch})"
        when = f"at epoch {epoch}, step {step} of {self.steps_per_epoch}"
        if step == 0:
            when = f"before the first step of epoch {epoch}"
        elif step is None:
            when = f"by the end of epoch {epoch} ({self.steps_per_epoch} steps)"
        return Diverged(
            f"training stopped: {what} became NaN or infinite {when}; {last}. The usual mend is an --optim.lr below "
            f"{self.config.optim.lr:g}, with another --out"
        )

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

    def _save(self, epoch: int, row: dict[str, Any]) -> None:
        """Write the checkpoints of an epoch, the best one first: `last` alone says how far the run is."""
        by, tie = best_by(self.config)
        # Strictly better: among equals the earliest stays.
        found = (row.get(f"val/{by}", -math.inf), row.get(f"val/{tie}", -math.inf))
        best = found > (self.best["value"], self.best["tie"])
        if best:
            self.best = {"epoch": epoch, "by": by, "value": found[0], "tie": found[1]}
        state = {
            "epoch": epoch,
            "step": self.step.state_dict(),
            "best": self.best,
            "config": to_dict(self.config),
            "average": None if self.average is None else self.average.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        if best:
            self.folder.save("best", state, {**self.meta, "best": self.best})
        if self.ema is not None:
            self.folder.save_weights("ema", self.ema.state, {**self.meta, "epoch": epoch, "ema": self.config.ema})
        self.folder.save("last", state, self.meta)
        self.saved_epoch = epoch

    def _load(self, state: dict[str, Any] | None) -> None:
        if state is None:
            self.folder.truncate_metrics(0)
            return
        load_into(self.step.model, state["step"]["model"], self.folder.checkpoint())
        self.step.load_state_dict(state["step"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        self.saved_epoch = state["epoch"]
        # Runs from before the rule was a defense's own: PGD chose, and the earliest of equals stayed.
        best = {"by": f"robust_acc_pgd{self.config.eval.num_steps}", "tie": math.inf, **(state.get("best") or _NO_BEST)}
        if best["by"] == self.best["by"]:
            self.best = best
        elif best["epoch"]:
            self.other_rule = best["by"]
        self.folder.truncate_metrics(state["epoch"])


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


def _announce(card: str, run: Trainer, first: int) -> None:
    print(card, flush=True)
    if first > run.epochs:
        print(f"{run.folder.path} is finished: nothing to do")
    elif run.resumed:
        print(f"continuing after epoch {first - 1}")
        if run.other_rule:
            before, now = (accuracy_name(key) for key in (run.other_rule, run.best["by"]))
            print(
                f"note: the best checkpoint so far was chosen by the highest {before}, and is now by the "
                f"highest {now}: it starts anew from epoch {first} on"
            )
