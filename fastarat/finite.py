"""Whether everything a run consists of is finite: no loss sees what the last step made of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastarat.averages import MovingAverage, WeightAverage
from fastarat.data import Batch
from fastarat.distributed import World
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.nets.attacker import mode_of
from fastarat.nets.batchnorm import branch, branches_of


class Diverged(UserError):
    """A loss term, a weight, a running statistic or the network's logits stopped being finite."""

    exit_code = 1


def diverged(what: str, epoch: int, step: int | None, *, steps: int, last: str, lr: float) -> Diverged:
    """Build the error that `what` is not finite at `step` of `epoch`, None for after its last one.

    steps: in an epoch. last: what the last good checkpoint is, in words. lr: the learning rate that may be too high.
    """
    when = f"at epoch {epoch}, step {step} of {steps}"
    if step == 0:
        when = f"before the first step of epoch {epoch}"
    elif step is None:
        when = f"by the end of epoch {epoch} ({steps} steps)"
    return Diverged(
        f"training stopped: {what} became NaN or infinite {when}; {last}. The usual mend is an --optim.lr below "
        f"{lr:g}, with another --out"
    )


def tensors_of(module: nn.Module, owner: str = "") -> list[tuple[str, Tensor]]:
    """Return everything a network consists of, with names for people."""
    named: list[tuple[str, Tensor]] = [(f"weight {name!r}{owner}", p) for name, p in module.named_parameters()]
    for name, buffer in module.named_buffers():
        kind = "running statistic" if "running_" in name else "buffer"
        named.append((f"{kind} {name!r}{owner}", buffer))
    return named


def not_finite(named: list[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity, in order; one read of the device."""
    flags = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()
    return [name for (name, _), finite in zip(named, flags, strict=True) if not finite]


@torch.no_grad()
def probe(
    model: nn.Module, name: str, batches: Iterable[Batch], count: int, world: World | None = None
) -> tuple[Tensor, bool]:
    """Return the accuracy of BatchNorm branch `name` in eval mode, a 0-d tensor, and whether all logits are finite.

    count: images to look at, or a batch more. world: whose ranks look at their own rows of as many batches; count is
    then not read. The model is left in train mode.
    """
    model.eval()
    correct, finite, seen = [], [], 0
    for batch in batches:
        with branch(model, name):
            logits = model(batch.images)
        correct.append((logits.argmax(1) == batch.labels).sum())
        finite.append(logits.isfinite().all())
        seen += len(batch.labels)
        if seen >= count and (world is None or world.size == 1):
            break
    model.train()
    right, well = torch.stack(correct).sum(), bool(torch.stack(finite).all())
    if world is not None and world.size > 1:
        world.sum_([right], "probe")
        seen, well = sum(world.gather(seen)), not world.any(not well)
    return right.float() / seen, well


class Watch:
    """Looks for what is not finite in a training step, its network, and the averages kept of it."""

    def __init__(self, step: TrainStep, average: WeightAverage | None, ema: MovingAverage | None) -> None:
        self.step, self.average, self.ema = step, average, ema
        # A buffer may hold infinity on purpose, such as a mask.
        self.allowed = set(not_finite(self._tensors()))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*tensors_of(self.step.model), *tensors_of(self.step.companions, " of the defense's companions")]

    def terms(self) -> tuple[str, int] | None:
        """The first loss term that was not finite since the meter's reset, and its step (from 1); or None."""
        if (bad := self.step.meter.bad()) is None:
            return None
        index, name = bad
        return (name if name in self.step.meter.watched else f"loss term {name!r}"), index + 1

    @torch.no_grad()
    def state(self, images: Tensor) -> str | None:
        """The first tensor that an epoch leaves behind not finite, or None; one or two reads of the device.

        images: a batch to look at the logits with. In train mode no loss sees the running statistics, which may
        overflow by themselves, or give logits that do.
        """
        named = self._tensors()
        if self.ema is not None:
            named += [(f"the moving average of {k!r}", v) for k, v in self.ema.state.items() if k in self.ema.averaged]
        if self.average is not None:
            named += [("the mean of the weights (SWA)", value) for value in self.average.parameters]
        if bad := self._agreed(self.bad(named)):
            return bad
        model, images = self.step.model, images.to(memory_format=self.step.memory_format)
        logits: list[tuple[str, Tensor]] = []
        with mode_of(model, False):
            for name in branches_of(model) or ("adv",):
                which = f" (BatchNorm branch {name!r})" if branches_of(model) else ""
                with branch(model, name):
                    logits.append((f"the network's logits in eval mode{which}", model(images)))
            if self.ema is not None:
                averaged = functional_call(model, self.ema.state, (images,))
                logits.append(("the averaged network's logits (EMA)", averaged))
        return self._agreed(next(iter(not_finite(logits)), None))

    def _agreed(self, bad: str | None) -> str | None:
        """What is not finite on some rank: all stop together."""
        return next((found for found in self.step.shares.world.gather(bad) if found), None)

    def bad(self, named: list[tuple[str, Tensor]]) -> str | None:
        """The first of these that is not finite and was not from the start."""
        return next((name for name in not_finite(named) if name not in self.allowed), None)
