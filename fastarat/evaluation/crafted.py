"""The PGD of an evaluation: with restarts, on the margin, on another network; and accuracy along its budget and steps.

Source: Madry et al., ICLR 2018 (PGD); Carlini and Wagner, S&P 2017 (the margin).
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastarat.attacks import pgd, random_start
from fastarat.evaluation.checks import check_finite, furthest
from fastarat.evaluation.sharing import dealt, together
from fastarat.evaluation.task import Entry, Task, share
from fastarat.values import Budget

CURVE_STEPS = (1, 2, 5, 10, 20, 50, 100)
"""Where the trajectory of the step curve is classified."""


class Outcome(NamedTuple):
    """What an attack left, image by image.

    robust: bool [N]. predicted: int64 [N], the class seen at the point that counts, or None where nobody kept it.
    largest: the largest perturbation, in the norm of the budget.
    """

    robust: Tensor
    predicted: Tensor | None = None
    largest: float = 0.0


def classes_of(task: Task, points: Tensor) -> Tensor:
    """Return the classes int64 [B] that the network sees in points float32 [B, C, H, W]."""
    with torch.no_grad():
        logits = task.forward(points)
    check_finite(logits)
    return logits.argmax(1)


def clean_outcome(task: Task) -> Outcome:
    """Classify the images themselves."""
    predicted = torch.zeros_like(task.labels, device="cpu")

    def classify() -> list[tuple[Tensor, Tensor]]:
        return [(rows, classes_of(task, x).cpu()) for rows, x, _, own in dealt(task) if own]

    for rows, classes in itertools.chain(*together(task.world, classify)):
        predicted[rows] = classes
    return Outcome(predicted == task.labels.cpu(), predicted)


def generator_of(task: Task) -> torch.Generator:
    """Return what an attack's random starts are drawn from, anew for each attack."""
    return torch.Generator(task.device).manual_seed(task.seed)


def start_of(task: Task, images: Tensor, generator: torch.Generator, budget: Budget | None = None) -> Tensor:
    """Draw a uniform start in the ball. budget: instead of the task's."""
    epsilon, _, norm = budget or task.budget
    return random_start(images, epsilon=epsilon, kind="uniform", norm=norm, generator=generator)


def perturb(
    task: Task,
    images: Tensor,
    labels: Tensor,
    start: Tensor,
    num_steps: int,
    *,
    objective: str = "ce",
    budget: Budget | None = None,
) -> Tensor:
    """Return the last points of PGD from `start`. budget: instead of the task's."""
    # The labels twice: kappa is counted by the first, the loss taken of the second.
    options = {"num_steps": num_steps, "objective": objective, **(budget or task.budget)._asdict()}
    return pgd(task.forward, images, labels, labels, start, **options).images


def pgd_outcome(task: Task, entry: Entry, source: Task | None = None) -> Outcome:
    """Attack every image; it counts as robust when it is classified correctly at the end of every restart.

    source: the network, lent by the caller, that the points are crafted on; default: the one that is measured.
    """
    generator, crafting = generator_of(task), source or task

    def attack() -> _Found:
        found, largest = [], 0.0
        with task.bar(entry.name, len(task.labels)) as bar:
            for rows, x, y, own in dealt(task):
                # For the whole batch, whatever is left of it, and for other ranks' batches, too: later ones must not
                # depend on this one's success, nor on how many processes there are.
                starts = (start_of(task, x, generator) for _ in range(entry.num_restarts))
                if own:
                    predicted, distance = _under_pgd(task, crafting, entry, x, y, starts)
                    found.append((rows, predicted.cpu()))
                    largest = max(largest, distance)
                    robust = torch.cat([p == task.labels[r].cpu() for r, p in found])
                    bar.set_postfix_str(f"robust {share(robust):.2%}", refresh=False)
                collections.deque(starts, 0)  # those that are left
                bar.update()
        return _Found(found, largest)

    predicted, parts = torch.zeros_like(task.labels, device="cpu"), together(task.world, attack)
    for rows, classes in itertools.chain(*(part.classes for part in parts)):
        predicted[rows] = classes
    return Outcome(predicted == task.labels.cpu(), predicted, max(part.largest for part in parts))


class _Found(NamedTuple):
    """What one rank found: rows and the classes seen there, batch by batch, and the largest perturbation."""

    classes: list[tuple[Tensor, Tensor]]
    largest: float


def _under_pgd(
    task: Task, crafting: Task, entry: Entry, x: Tensor, y: Tensor, starts: Iterator[Tensor]
) -> tuple[Tensor, float]:
    """Return the class int64 [B] that a batch is seen as at its worst, and the largest perturbation."""
    predicted, largest = y.clone(), 0.0
    for start in starts:
        # Only what has withstood every start so far is attacked again: an image counts once, at its worst.
        rows = (predicted == y).nonzero().squeeze(1)
        if not len(rows):
            break
        points = perturb(crafting, x[rows], y[rows], start[rows], entry.num_steps, objective=entry.objective)
        largest = max(largest, furthest(points, x[rows], task.budget))
        predicted[rows] = classes_of(task, points)
    return predicted, largest


def measure_curves(task: Task, clean: Tensor) -> dict[str, Any]:
    """Measure accuracy against epsilon (0 to twice the budget, PGD-20) and against PGD steps (1 to 100).

    clean: bool [N], correct without perturbation, the curve's first point. PGD's step keeps its ratio to epsilon, and
    no epsilon goes beyond where images end (1 in L-infinity). The steps are one trajectory, classified on the way. Both
    start from the same random numbers as `pgd-20`, so that their point at its settings is its accuracy.

    Returns: num_images, and of `epsilon` and `steps` the `values` and `accuracy`.
    """
    budget = task.budget
    furthest_apart = 1.0 if budget.norm == "linf" else math.prod(task.images.shape[1:]) ** 0.5
    ratios = [i / 4 for i in range(9) if budget.epsilon * i / 4 <= furthest_apart]
    values = [budget.epsilon * ratio for ratio in ratios]
    accuracy = [share(clean)]
    with task.bar("curves", len(task.labels) * len(values)) as bar:
        for ratio, value in zip(ratios[1:], values[1:], strict=True):
            scaled = Budget(value, min(budget.step_size * ratio, furthest_apart), budget.norm)
            here = replace(task, budget=scaled, progress=False)
            accuracy.append(share(pgd_outcome(here, Entry("epsilon", "", 20)).robust))
            bar.update(-(-len(task.labels) // task.batch_size))
        steps = _along_steps(task)
    return {
        "num_images": len(task.labels),
        "epsilon": {"values": values, "accuracy": accuracy, "num_steps": 20},
        "steps": {"values": list(CURVE_STEPS), "accuracy": steps, "epsilon": budget.epsilon},
    }


def _along_steps(task: Task) -> list[float]:
    """Return the accuracies along one trajectory."""
    generator = generator_of(task)

    def count() -> list[int]:
        standing = [0] * len(CURVE_STEPS)
        for _, x, y, own in dealt(task):
            points, done = start_of(task, x, generator), 0
            if not own:
                continue
            for i, number in enumerate(CURVE_STEPS):
                points, done = perturb(task, x, y, points, number - done), number
                standing[i] += int((classes_of(task, points) == y).sum())
            furthest(points, x, task.budget)
        return standing

    return [sum(counts) / len(task.labels) for counts in zip(*together(task.world, count), strict=True)]
