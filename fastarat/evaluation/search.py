"""The network as AutoAttack's quick searches see it: the machine's fastest precision, layout and folding.

What a search finds counts only once the network itself, in float32, is wrong about it: `AutoAttackRun` sees to that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastarat.device import fastest_precision
from fastarat.evaluation.task import Task
from fastarat.nets.attacker import Attacker

SEARCH = "search "
"""What the name of a member begins with in whose place its quick search runs."""


def fast_members(members: tuple[str, ...], *, confirm: bool) -> tuple[str, ...]:
    """Return what `autoattack-fast` runs in place of AutoAttack's `members`.

    The standard run that confirms repeats every member on what is left, so before it only those search that take many
    images for little work, the APGDs: what FAB and Square would find, it finds. Without it all of them search.
    """
    if not confirm:
        return tuple(SEARCH + member for member in members)
    return (*(SEARCH + member for member in members if member.startswith("apgd")), *members)


def quick_forward(task: Task) -> Callable[[Tensor], Tensor]:
    """Return images float32 [B, C, H, W] -> logits float32 [B, K], approximate and differentiable in the images.

    bf16 where the hardware has it, on a CPU only where that is faster on the first images here; channels-last;
    BatchNorm folded into the convolutions of built-in networks (branch "adv"). Call inside `task.lent()`.
    """
    x = task.images[: min(16, task.batch_size)].to(task.device)

    def build(precision: str) -> Callable[[], object]:
        forward = _forward(task, precision)

        def call() -> object:
            points = x.clone().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(forward(points).sum(), points)

        return call

    # Timed once, for all: processes that search in different precisions would find different things.
    precision = task.world.first(lambda: fastest_precision(task.device, build)[0])
    return _forward(task, precision)


def _forward(task: Task, precision: str) -> Callable[[Tensor], Tensor]:
    # Attacker folds the statistics of that branch, whichever the route says.
    attacker = Attacker(task.model, precision=precision, fold=task.branch == "adv")
    attacker.refresh()

    def forward(images: Tensor) -> Tensor:
        logits = attacker(images.contiguous(memory_format=torch.channels_last))
        return logits.float()

    return forward
