"""Masked gradients: what shows that a network hides its gradients rather than withstands an attack.

Source: Athalye et al., ICML 2018 (the signs); Carlini et al., 2019 (what an evaluation should check).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastarat.evaluation.crafted import Outcome, classes_of, generator_of, perturb, start_of
from fastarat.evaluation.sharing import dealt, together
from fastarat.evaluation.task import STANDARD, Entry, Task, attack_title

# Trained robust networks lose 2 to 5 points from PGD-20 to AutoAttack; from 2 on PGD alone misleads.
PGD_GAP = 0.02
SQUARE_GAP = 0.002  # the limit of the official `check_square_sr`
# What another random start, or another hundred images, moves by itself.
NOISE = 0.01
FEWEST = 3  # images, below which a share says nothing
_REPORT = "report AutoAttack; beyond about 5 points the defense probably masks gradients"
_PROBED_STEPS = 10
_PROBED_SHARE = 0.08
_PROBED_FLOOR = 128


class Probe(NamedTuple):
    """What two cheap attacks found among `count` images that withstood PGD: `fgsm` and `cw` fell under each.

    standing: the share of all images that withstood it, which turns shares of them into points of accuracy.
    """

    against: str
    count: int
    standing: float
    fgsm: int
    cw: int


def probed(task: Task, entries: Sequence[Entry], outcomes: Mapping[str, Outcome]) -> Probe | None:
    """Try FGSM (one step of epsilon from the image) and CW-PGD-10 on some images that withstood the list's PGD.

    Their number is such that this takes at most 8 % of the steps that PGD took, but 128 where that is fewer. Nothing is
    done where there is no PGD of ten steps and more, or where the list has a CW-PGD or AutoAttack, which say more.
    """
    longest = max((e for e in entries if _is_pgd(e) and e.num_steps >= 10), key=lambda e: e.num_steps, default=None)
    stronger = any(
        e.name in ("autoattack", "autoattack-fast") or (e.objective == "cw" and e.num_steps >= _PROBED_STEPS)
        for e in entries
    )
    if longest is None or stronger:
        return None
    robust = outcomes[longest.name].robust
    rows = robust.nonzero().squeeze(1)
    wanted = max(_PROBED_FLOOR, int(_PROBED_SHARE * len(robust) * longest.num_steps / (_PROBED_STEPS + 1)))
    if len(rows) < FEWEST:
        return None
    rows = rows[torch.arange(min(wanted, len(rows))) * len(rows) // min(wanted, len(rows))]
    one_step, generator = task.budget._replace(step_size=task.budget.epsilon), generator_of(task)

    def attack() -> tuple[int, int]:
        fgsm, cw = 0, 0
        for _, x, y, own in dealt(task, rows):
            start = start_of(task, x, generator)
            if own:
                fgsm += _fallen(task, perturb(task, x, y, x.clone(), 1, budget=one_step), y)
                cw += _fallen(task, perturb(task, x, y, start, _PROBED_STEPS, objective="cw"), y)
        return fgsm, cw

    fgsm, cw = map(sum, zip(*together(task.world, attack), strict=True))
    return Probe(longest.name, len(rows), len(robust.nonzero()) / len(robust), fgsm, cw)


def _fallen(task: Task, points: Tensor, labels: Tensor) -> int:
    return int((classes_of(task, points) != labels).sum())


def _is_pgd(entry: Entry) -> bool:
    return entry.num_steps > 0 and entry.objective == "ce" and entry.name != "transfer"


def doubts(
    entries: Sequence[Entry],
    accuracy: Mapping[str, float],
    members: Mapping[str, float],
    clean: float,
    *,
    num_images: int,
    probe: Probe | None = None,
    curves: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the notes that compare attacks with each other.

    accuracy: by key. members: left after each member of AutoAttack. clean: accuracy. curves: as `crafted.curves`.
    """
    values = {e: accuracy[e.key] for e in entries if e.num_steps and e.name != "transfer"}
    notes = [
        f"accuracy under {entry.name} ({value:.2%}) is above clean accuracy ({clean:.2%}): masked gradients"
        for entry, value in values.items()
        if _above(value - clean, 0, num_images)
    ]
    pgds = {e: value for e, value in values.items() if _is_pgd(e)}
    notes += _more_steps(pgds, curves, num_images)
    if pgds:
        weakest, value = min(pgds.items(), key=lambda item: item[1])
        notes += _beside_pgd(weakest.name, value, values, accuracy, num_images)
    if probe is not None:
        notes += _of_probe(probe)
    return notes + square_took(members)


def square_took(members: Mapping[str, float]) -> list[str]:
    """Return the note that Square found what no other member did, if so. members: left after each, in their order."""
    if len(members) < 2 or "square" not in members:
        return []
    # Members run in turn on what is left, so what square took is the drop from the lowest of the others.
    gap = min(v for k, v in members.items() if k != "square") - members["square"]
    if gap <= SQUARE_GAP:
        return []
    return [
        f"Square, which sees no gradient, took {100 * gap:.1f} points more: "
        "masked gradients, and AutoAttack itself may be an overestimate"
    ]


def _above(gap: float, limit: float, num_images: int) -> bool:
    """Whether a gap is above a limit, and more than a few images."""
    return gap > limit and round(gap * num_images) >= FEWEST


def _more_steps(pgds: Mapping[Entry, float], curves: Mapping[str, Any] | None, num_images: int) -> list[str]:
    """Steps and restarts can only find more; one step that finds more than many is the same sign at its clearest."""
    notes = []
    for few, low in pgds.items():
        for many, high in pgds.items():
            more = many.num_steps > few.num_steps and many.num_restarts >= few.num_restarts
            if more and _above(high - low, NOISE, num_images):
                what = "single-step PGD beats it" if few.num_steps == 1 else "more steps find less"
                notes.append(
                    f"robust accuracy is {100 * (high - low):.1f} points higher under {many.name} ({high:.2%}) than "
                    f"under {few.name} ({low:.2%}): {what}, so gradients are masked"
                )
    if curves:
        steps, found = curves["steps"]["values"], curves["steps"]["accuracy"]
        rises = [(found[j] - found[i], i, j) for j in range(len(found)) for i in range(j)]
        rise, i, j = max(rises)
        if _above(rise, NOISE, num_images):
            notes.append(
                f"along one attack, robust accuracy rises by {100 * rise:.1f} points from {steps[i]} PGD steps "
                f"({found[i]:.2%}) to {steps[j]} ({found[j]:.2%}): masked gradients"
            )
    return notes


def _beside_pgd(
    name: str, value: float, values: Mapping[Entry, float], accuracy: Mapping[str, float], num_images: int
) -> list[str]:
    """Hold the weakest accuracy under PGD, `value`, against what other attacks leave."""
    notes = []
    for key in ("robust_acc_aa", "robust_acc_aa_fast", *(f"robust_acc_{m.replace('-', '_')}" for m in STANDARD)):
        gap, title = value - accuracy.get(key, value), attack_title(key)
        said = _REPORT.replace("AutoAttack", title) if key.startswith("robust_acc_aa") else _REPORT
        # Square sees no gradient: it is the weaker one wherever gradients are worth something.
        if _above(gap, NOISE if key == "robust_acc_square" else PGD_GAP, num_images):
            notes.append(f"{title} is {100 * gap:.1f} points below {name}: {said}")
    margins = {entry.name: low for entry, low in values.items() if entry.objective == "cw"}
    if margins:
        cw, low = min(margins.items(), key=lambda item: item[1])
        if _above(value - low, PGD_GAP, num_images):
            notes.append(f"{cw}, on the margin, is {100 * (value - low):.1f} points below {name}: {_REPORT}")
    if "robust_acc_transfer" in accuracy:
        gap = value - accuracy["robust_acc_transfer"]
        if _above(gap, NOISE, num_images):
            notes.append(
                f"images crafted on another network leave {accuracy['robust_acc_transfer']:.2%}, {100 * gap:.1f} "
                f"points below {name} on this one ({value:.2%}): masked gradients"
            )
    return notes


def _of_probe(probe: Probe) -> list[str]:
    notes = []
    tried = (
        (probe.fgsm, "one step of FGSM", NOISE, "a single step beats many, so gradients are masked; report AutoAttack"),
        (probe.cw, "CW-PGD-10, on the margin,", PGD_GAP, _REPORT),
    )
    for fallen, title, limit, meaning in tried:
        gap = fallen / probe.count * probe.standing
        if fallen >= FEWEST and gap > limit:
            notes.append(
                f"{title} broke {fallen} of {probe.count} images that withstood {probe.against}, about "
                f"{100 * gap:.1f} points of accuracy: {meaning}"
            )
    return notes
