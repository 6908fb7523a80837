"""Code of the user's own inside a training: what it is told, when it may end the run, and what its errors do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastarat.config import Config
from fastarat.errors import UserError, nearest
from fastarat.results import Result
from fastarat.specs import known


class StepInfo(NamedTuple):
    """A training step that was done.

    epoch, step: from 1; `step` within the epoch. total: steps since the first epoch. images: of this step. lr: its
    learning rate. terms: the defense's loss terms, already weighted: detached float32 scalars on the training's device.
    Nothing here was waited for: reading a term (`float`, `print`, `.cpu()`) makes the host wait for the device, which
    at every step costs a GPU much of its speed. A captured step writes the next step's terms into the same tensors:
    clone what must last.
    """

    epoch: int
    step: int
    total: int
    images: int
    lr: float
    terms: dict[str, Tensor]


@dataclass
class Running:
    """The training a callback is told about; all of it is to be read, and `stop` to be called.

    folder: the run folder. config: resolved. card: what the run depends on, in words. model: the network that is
    trained, itself: whoever changes its mode or weights changes the training. epochs, steps_per_epoch: it is to have.
    resumed: whether it goes on in a folder that was there. progress: whether it prints. epoch: the last one that was
    finished. metrics: one dict per finished epoch, those before a resume included.
    """

    folder: Path
    config: Config
    card: str
    model: nn.Module
    epochs: int
    steps_per_epoch: int
    resumed: bool
    progress: bool = False
    epoch: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    stop_reason: str | None = None

    def stop(self, why: str) -> None:
        """End the training normally after the step under way, its state kept; `why` is `Result.stopped`.

        `train(resume=...)` goes on from there. After the last step of all there is nothing left to end.
        """
        if self.stop_reason is None:
            self.stop_reason = str(why) or "a callback asked"


class Callback:
    """What `train(callbacks=[...])` calls; a subclass defines the methods it needs.

    All are called in the process that trains, between steps, callback by callback in the order given. What one raises
    ends the training as CallbackError, naming class and method; the run's state is kept. The random streams are the
    training's: draw from a generator of your own, and a callback changes no number.
    """

    def on_start(self, run: Running) -> None:
        """Before the first step."""

    def on_step(self, run: Running, info: StepInfo) -> None:
        """After a step. See `StepInfo` for what reading its terms costs."""

    def on_epoch(self, run: Running, row: dict[str, Any]) -> None:
        """After an epoch, its validation and its checkpoint. row: as in metrics.jsonl."""

    def on_checkpoint(self, run: Running, path: Path) -> None:
        """After a checkpoint was written: last.pt at an epoch's end, unfinished.pt within one."""

    def on_end(self, run: Running, outcome: Result | BaseException) -> None:
        """At the end of what began with `on_start`. outcome: what `train` returns, or what it raises."""


class CallbackError(UserError):
    """A callback raised; its own error is the `__cause__`."""

    exit_code = 1


class Stopped(Exception):
    """A callback asked for the end; for `Hooks.through`, which makes a Result of it."""


_HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def checked(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks as a list. Raises: UserError for what is none, or defines a hook that nobody calls."""
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise UserError(f"callbacks={callbacks!r:.80}: expected a list of them, such as callbacks=[MyCallback()]")
    found = list(callbacks)
    for one in found:
        if isinstance(one, type) and issubclass(one, Callback):
            raise UserError(f"callbacks holds the class {one.__name__}: write {one.__name__}(), an instance of it")
        if not isinstance(one, Callback):
            raise UserError(
                f"callbacks holds a {type(one).__name__}: expected instances of subclasses of fastarat.Callback"
            )
        for name in dir(type(one)):
            if name.startswith("on_") and name not in _HOOKS and inspect.isroutine(getattr(type(one), name)):
                raise UserError(
                    f"{type(one).__name__}.{name}: no hook has that name{nearest(name, _HOOKS) or '.'} "
                    f"Known: {', '.join(_HOOKS)}."
                )
    return found


def alone(do: Callable[[], Any]) -> Any:
    """What `agree` is to `Hooks` in a single process."""
    return do()


class Hooks:
    """Calls the callbacks of one training, and keeps what the first that raised, or asked for the end, wants.

    callbacks: checked; of several processes the first one's alone. Without any, a call is a look at an empty list.
    agree: does something in the first process, and returns or raises in all of them what that does there.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), agree: Callable[[Callable[[], Any]], Any] = alone) -> None:
        self._callbacks, self._agree = list(callbacks), agree
        self._run: Running | None = None
        self._error: CallbackError | None = None

    @property
    def ending(self) -> bool:
        """Whether the training is to end where nothing is lost."""
        return self._error is not None or (self._run is not None and self._run.stop_reason is not None)

    def through(self, run: Running, train: Callable[[], Result], stopped: Callable[[str], Result]) -> Result:
        """Go from `on_start` through `train` to `on_end`. stopped: the result of what a callback ended, and why.

        Raises: what `train` raises; CallbackError.
        """
        self._run = run
        try:
            self._each("on_start", lambda one, run: one.on_start(run))
            self._agree(lambda: self._raise("before the first step"))
            try:
                result = train()
            except Stopped as stop:
                result = stopped(str(stop))
            self._raise("when all was done")
        except BaseException as error:
            # What ended the training is what counts: an error of on_end's own is only its note.
            self._error, outcome = None, error
            self._each("on_end", lambda one, run: one.on_end(run, outcome))
            if self._error is not None:
                error.add_note(str(self._error))
            raise
        self._each("on_end", lambda one, run: one.on_end(run, result))
        self._raise("when all was done")
        return result

    def step(self, epoch: int, step: int, total: int, images: int, lr: float, terms: dict[str, Tensor]) -> None:
        if self._callbacks:
            info = StepInfo(epoch, step, total, images, lr, terms)
            self._each("on_step", lambda one, run: one.on_step(run, info))

    def checkpoint(self, path: Path) -> None:
        self._each("on_checkpoint", lambda one, run: one.on_checkpoint(run, path))

    def epoch(self, row: dict[str, Any], path: Path) -> None:
        """Tell of a finished epoch and its checkpoint."""
        if self._run is not None:
            self._run.epoch = row["epoch"]
            self._run.metrics.append(row)
        self.checkpoint(path)
        self._each("on_epoch", lambda one, run: one.on_epoch(run, dict(row)))

    def end(self, kept: str) -> None:
        """Raise what the callbacks want raised, if any of them does. kept: where the run is, and how it goes on."""
        if (why := self._agree(lambda: self._wanted(kept))) is not None:
            raise Stopped(why)

    def _wanted(self, kept: str) -> str | None:
        self._raise(kept)
        run = self._run
        if run is not None and run.stop_reason is not None and run.progress:
            print(f"ended by a callback ({run.stop_reason}) {kept}", flush=True)
        return None if run is None else run.stop_reason

    def _each(self, name: str, call: Callable[[Callback, Running], None]) -> None:
        """Call all, or until one raises; at the end all are called, so that each can close what it opened."""
        run = self._run
        for one in self._callbacks if run is not None else ():
            try:
                call(one, known(run))
            except Exception as error:
                said = " ".join(str(error).split())[:300]
                why = f"{type(one).__name__}.{name} raised {type(error).__name__}" + (f": {said}" if said else "")
                found = CallbackError(why)
                found.__cause__ = error
                self._error = self._error or found
                if name != "on_end":
                    return

    def _raise(self, kept: str) -> None:
        if self._error is not None:
            cause = self._error.__cause__
            raise CallbackError(f"the training was ended by a callback: {self._error} {kept}") from cause
