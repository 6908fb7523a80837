"""A rank's share of a batch, and its micro-batches: what each weighs, and what is summed over all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked
from fastarat.defenses.base import Defense, Views
from fastarat.distributed import Rows, SharedGenerator, World, even
from fastarat.engine.graphs import preserved
from fastarat.engine.meter import Meter
from fastarat.errors import UserError
from fastarat.nets.batchnorm import grouped_batchnorm, set_world
from fastarat.values import whole

if TYPE_CHECKING:
    from fastarat.engine.step import TrainStep

GRADIENTS, PERTURBATION, LOSS = "gradients", "weight perturbation", "weights of images"
"""Under which `World.sent` counts what a step sends, beside BatchNorm's."""


class Part(NamedTuple):
    """One micro-batch: its rows in what the rank was given, and whose they are in the micro-batch of all ranks.

    share: of the whole batch's images, None for all of them.
    """

    rows: slice
    of_all: Rows
    share: float | None

    def weigh(self, loss: Tensor) -> Tensor:
        """Return what the part's loss, a mean over its images, adds to the whole batch's."""
        return loss if self.share is None else loss * self.share

    def weighing(self, scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return `scale` of a weighed loss."""
        return scale if self.share is None else lambda loss: scale(self.weigh(loss))


class Prepared(NamedTuple):
    """A part with what its training forward takes: its clean images as the defense has them, and their twins."""

    images: Tensor
    labels: Tensor
    attacked: Attacked | None
    part: Part


class Sums:
    """What a step's parts come to, handed to the meter one by one. terms: of all of them, detached."""

    def __init__(self) -> None:
        self.terms: dict[str, Tensor] = {}
        self._open: tuple[dict[str, Tensor], Views, dict[str, Tensor]] | None = None
        self._images = 0

    def take(self, terms: dict[str, Tensor], views: Views, batch: Prepared) -> None:
        """Note a part that has gone backward."""
        # The graph's own terms would keep its activations alive until the next step.
        terms = {name: term.detach() for name, term in terms.items()}
        objective = None if batch.attacked is None else batch.attacked.objective
        self._open = terms, views, {} if objective is None else {"the attack's objective": objective}
        count = len(batch.labels)
        if self._images:
            share = count / (self._images + count)
            terms = {name: self.terms[name] + share * (term - self.terms[name]) for name, term in terms.items()}
        self.terms, self._images = terms, self._images + count

    def close(self, meter: Meter, *, last: bool = False) -> None:
        """Hand the part noted to the meter, if there is one."""
        if self._open is not None:
            meter.add(*self._open) if last else meter.add(*self._open, last=False)
        self._open = None


class Shares:
    """How a step divides its batch: among the ranks of `world`, and in `accumulate` micro-batches one after another.

    Each part's loss is a mean over its images, weighed by its share of the batch's images; the gradients of all are
    summed. So uneven shards give the gradient that one process has of the whole batch.

    generator: of the step's random numbers: those of the whole batch on every rank.
    """

    def __init__(self, world: World, accumulate: int, device: torch.device, *, synced: bool = False) -> None:
        self.world, self.accumulate, self.synced = world, accumulate, synced
        self.parts: tuple[Part, ...] = ()
        self.whole = world.size == accumulate == 1
        # Our own: PyTorch's global one would tie the attack to what else draws from it.
        self.generator = torch.Generator(device) if self.whole else SharedGenerator(device)

    def describe(self, batch_size: int) -> dict[str, str]:
        """Lines for the run card: nothing where a batch is whole."""
        rows = {}
        if self.world.size > 1:
            own = "of all processes (--sync-bn; the kernel is given the statistics, which PyTorch makes)"
            if not self.synced:
                own = "of each process's images; running ones are averaged when the run is kept"
            rows["processes"] = f"{self.world.size}, {batch_size} images a step among them; batch statistics {own}"
        elif self.synced:
            rows["processes"] = "one, so that --sync-bn does nothing"
        if self.accumulate > 1:
            rows["micro-batches"] = f"{self.accumulate} to a step of {batch_size} images; batch statistics of each"
        return rows

    def divide(self, count: int, total: int | None = None) -> int:
        """Take up a batch of which `count` images are here. total: on all ranks, default: as many on each.

        Returns the total, by which a captured step is told from one for another batch. Raises: UserError.
        """
        total = count * self.world.size if total is None else total
        if self.whole:
            self.parts = (Part(slice(None), Rows(count, slice(0, count)), None),)
            return total
        own = [s.stop - s.start for s in self.world.parts(total, self.accumulate)]
        if sum(own) != count or min(own) < 1:
            raise UserError(
                f"{count} images on rank {self.world.rank} of {self.world.size}: of a batch of {total} in "
                f"{self.accumulate} micro-batch(es) its share is {sum(own)}, as World.parts({total}, "
                f"{self.accumulate}) says"
            )
        parts, first = [], 0
        for i, n in enumerate(own):
            micro = even(total, self.accumulate, i)
            of_all = micro.stop - micro.start
            parts.append(Part(slice(first, first + n), Rows(of_all, self.world.shard(of_all)), n / total))
            first += n
        self.parts = tuple(parts)
        return total

    def enter(self, part: Part) -> None:
        """Draw for this part from here on."""
        if isinstance(self.generator, SharedGenerator):
            self.generator.rows = part.of_all

    def enter_whole(self, count: int, total: int) -> None:
        """Draw for a batch of `total` that is not taken in micro-batches, of which `count` images are here."""
        if isinstance(self.generator, SharedGenerator):
            own = self.world.parts(total, self.accumulate)
            rows = torch.cat([torch.arange(part.start, part.stop) for part in own])
            assert len(rows) == count
            self.generator.rows = Rows(total, rows.to(self.generator.device))

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum `.grad` over the ranks, in place; a parameter without has none on any of them."""
        self.world.sum_([p.grad for p in parameters if p.grad is not None], GRADIENTS)

    def sum_perturbation(self, gradients: Sequence[Tensor]) -> None:
        """Sum over the ranks, in place, what weights are perturbed along."""
        self.world.sum_(gradients, PERTURBATION)

    @property
    def batch_mean(self) -> Callable[[Tensor], Tensor] | None:
        """`mean`, where a batch is divided."""
        return None if self.whole else self.mean

    def mean(self, each: Tensor) -> Tensor:
        """Return the mean over all ranks' images of `each`, float [B] of those at hand; without gradient."""
        both = torch.stack([each.detach().sum(), torch.full_like(each[0], len(each))])
        self.world.sum_([both], LOSS)
        return both[0] / both[1]


@contextlib.contextmanager
def undone(step: TrainStep) -> Iterator[None]:
    """Put every tensor that `step` changes, and every generator, back in place after the block."""

    def changed() -> list[Tensor]:
        modules = [t for m in (step.model, step.companions) for t in (*m.parameters(), *m.buffers())]
        optimizer = [t for s in step.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return [*modules, *optimizer, *step.meter.tensors(), step.steps]

    measured = bool(step.meter.tensors())
    try:
        with preserved(changed, step.device, [step.generator]):
            yield
    finally:
        if not measured:
            step.meter.reset()
        step.optimizer.zero_grad(set_to_none=True)


def sync_over(world: World | None, model: nn.Module, companions: nn.Module) -> None:
    """Take batch statistics over all of `world`, companions' own BatchNorm (AR-AT's predictors) included; None: not."""
    if world is not None and world.size > 1:
        set_world(model, world)
        set_world(grouped_batchnorm(companions), world)


@torch.no_grad()
def settle_statistics(step: TrainStep, averaged: Mapping[str, Tensor] | None = None) -> None:
    """Make running statistics, which without sync_bn are each rank's own, the mean of all ranks', on all of them.

    averaged: a state dict that follows the network's, in which they are likewise.
    """
    world = step.shares.world
    if world.size > 1:
        modules = (m for network in (step.model, step.companions) for m in network.modules())
        buffers = {id(b): (name, b) for m in modules for name, b in m.named_buffers(recurse=False)}
        own = [b for name, b in buffers.values() if name in ("running_mean", "running_var")]
        other = [b for name, b in buffers.values() if name not in ("running_mean", "running_var")]
        # What a person's own layer keeps has no mean that is known to make sense: the first rank's is taken.
        for buffer, value in zip(other, world.first(lambda: [b.cpu() for b in other]), strict=True):
            buffer.copy_(value)
        own += [t for name, t in (averaged or {}).items() if name.endswith(("running_mean", "running_var"))]
        world.mean_(own, "running statistics")


def check_divisible(defense: Defense, world: World | None, accumulate: int, *, compiled: bool = False) -> World:
    """Return the world, of one where none is given. Raises: UserError for another method on parts than on the whole.

    compiled: whether batch statistics of all ranks meet a compiled loss.
    """
    world = world or World()
    accumulate = whole("accumulate", accumulate, 1)
    own = type(defense).backward is not Defense.backward
    if world.size > 1 and own:
        raise UserError(
            f"{defense.name}: its backward combines the gradients of a whole batch, which no mean of {world.size} "
            "processes' gradients is; train it in one process"
        )
    looks = getattr(defense, "nr_batch", False)  # ARREST's, a decision for the whole batch
    if accumulate > 1 and (own or defense.weighs_batch or looks):
        what = (
            "combines the gradients" if own else "weighs the images" if defense.weighs_batch else "looks at the images"
        )
        raise UserError(
            f"accumulate={accumulate}: {defense.name} {what} of a whole batch, which micro-batches do not show; leave "
            "--accumulate out"
        )
    if compiled:
        raise UserError("sync_bn with compile_loss: a compiled loss cannot wait for other processes; leave one out")
    return world
