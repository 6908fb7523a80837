"""One evaluation by several processes: who takes which batches, and what all of them found.

Whole batches are dealt to the ranks in turn, rather than each rank's part of the images cut into batches of its own: a
batch is what an attack seeds itself for. So any number of processes attacks every image as one process does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import torch
from torch import Tensor

from fastarat.distributed import World
from fastarat.errors import UserError
from fastarat.evaluation.task import Task

_T = TypeVar("_T")


def dealt(task: Task, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Yield the batches of the images at `rows` (int64 [M]; None: of all), on the device, as (rows, x, y, own).

    own: whether this rank is to measure it. The others come as well, because random numbers are drawn for them, too.
    """
    rows = torch.arange(len(task.labels)) if rows is None else rows
    for index, part in enumerate(rows.split(task.batch_size)):
        x, y = task.images[part].to(task.device), task.labels[part].to(task.device)
        yield part, x, y, index % task.world.size == task.world.rank


def together(world: World, do: Callable[[], _T]) -> list[_T]:
    """Let every rank do its part; return what each found, by rank.

    What one of them raises ends the call on all, with a UserError where it is another rank's: none waits for it.
    """
    if world.size == 1:
        return [do()]
    value: _T | None = None
    error: Exception | None = None
    try:
        value = do()
    except Exception as raised:
        error = raised
    found = world.gather((value, _as_told(error, world.rank)))
    if error is not None:
        raise error
    for _, other in found:
        if other is not None:
            raise other
    return [cast(_T, value) for value, _ in found]


def _as_told(error: Exception | None, rank: int) -> Exception | None:
    """The error as the other ranks raise it: it must survive the way there."""
    if error is None or isinstance(error, UserError):
        return error
    text = " ".join(str(error).split())[:200]
    # Of these `enough_memory` makes a line, on all ranks, that names a batch size.
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return RuntimeError(f"out of memory on rank {rank}: {text}")
    return UserError(f"rank {rank} failed: {type(error).__name__}: {text}")
