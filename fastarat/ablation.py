"""The AR-AT paper's ablation: its parts on and off, several seeds, one table with the gradient similarity of each.

Source: Waseda, Chang and Echizen, ICLR 2025 (arXiv 2402.14648), the ablation of stop-gradient and split BatchNorm.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastarat.compare import compare
from fastarat.defenses import ARAT
from fastarat.errors import UserError, unknown
from fastarat.table import Comparison, settings_in_words

FACTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "stop-gradient": ("align", {"no": "x->y,y->x", "yes": "x->y"}),
    "split-bn": ("split_bn", {"no": False, "yes": True}),
    "predictor": ("predictor_adv", {"no": False, "yes": True}),
    "center": ("center", {"noisy": "noisy", "clean": "clean"}),
    "balance": ("balance", {"fixed": "fixed", "auto": "auto"}),
}
"""What may be switched: the field of `ARAT` that does it, and its values by the words of the table."""
# The paper does not state what its ablation ran beside the two switches. This is its naive loss (one distance between
# penultimate features, weights of one) with the switches added, and nothing else of the method.
BASE: dict[str, Any] = {"layers": ("penultimate",), "predictor_adv": False, "balance": "fixed"}
_SOURCE = "Waseda et al., ICLR 2025, its ablation on CIFAR-10"
PUBLISHED: dict[str, dict[tuple[str, str], tuple[float, float, float]]] = {
    "resnet18": {
        ("no", "no"): (82.93, 46.50, 0.06),
        ("yes", "no"): (82.47, 45.21, 0.68),
        ("no", "yes"): (84.35, 47.96, 0.14),
        ("yes", "yes"): (85.51, 49.30, 0.59),
    },
    "wrn-34-10": {
        ("no", "no"): (86.25, 41.17, 0.03),
        ("yes", "no"): (86.60, 42.04, 0.31),
        ("no", "yes"): (87.13, 47.31, 0.01),
        ("yes", "yes"): (88.27, 47.98, 0.23),
    },
}
"""Clean and AutoAttack accuracy in percent, Grad-sim, by network, (stop-gradient, split BatchNorm)."""


def ablate(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    factors: Sequence[str] = ("stop-gradient", "split-bn"),
    base: Mapping[str, Any] | None = None,
    out: str | Path = "runs/ablate",
    attack: str = "clean,pgd-20,autoattack",
    limit: int | None = None,
    parallel: int = 1,
    progress: bool = True,
) -> Comparison:
    """Train AR-AT with each combination of `factors`, measure accuracy and gradient similarity, tabulate.

    Every row but for its factors is the naive loss with fixed weights, penultimate features and no predictor
    (`BASE`); `base` may say otherwise. Rows are runs of `compare`: what is finished is kept, the same call goes on.

    Args:
        seeds: one run of each row each.
        factors: of FACTORS; every combination of their two values is a row.
        base: values of `Config` common to all runs; {"defense": {"gamma": 10}} sets hyper-parameters of AR-AT.
        out: folder of the runs, the table (table.md, .tex, .csv, .json).
        attack, limit, parallel, progress: as in `compare`.
    Returns: Comparison; its rows have `grad_sim` (mean over a run's measurements, then mean and deviation over seeds)
        and where the paper has the row, `published`, which is of another network and data than these unless they are
        named there.
    Raises: UserError for an unknown factor, or a setting that is a factor's; as `compare`.
    """
    base = dict(base or {})
    own = dict(base.pop("defense", None) or {})
    if own.pop("name", ARAT.name) != ARAT.name:
        raise UserError("ablate trains AR-AT: leave defense.name out (compare takes other defenses)")
    rows = rows_of(factors, own)
    comparison = compare(
        list(rows), seeds, base={**base, "diagnostics": True}, out=out, attack=attack, limit=limit, parallel=parallel,
        progress=progress, rows=rows,
    )  # fmt: skip
    comparison = with_published(comparison, factors)
    comparison.save()
    return comparison


def rows_of(factors: Sequence[str], own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return each row's settings by its name, as `compare` takes them. own: AR-AT's hyper-parameters, for all rows."""
    for name in factors:
        if name not in FACTORS:
            raise unknown("factor", name, FACTORS)
        if FACTORS[name][0] in own:
            raise UserError(f"defense.{FACTORS[name][0]} is what the factor {name} switches: leave one of them out")
    if not factors or len({*factors}) != len(factors):
        raise UserError(f"factors={','.join(factors)}: expected one or more, each once, of {', '.join(FACTORS)}")
    common = {f"defense.{key}": value for key, value in {**BASE, **own}.items()}
    rows = {}
    # The first factor varies fastest, which is the order of the paper's rows.
    for backwards in itertools.product(*(FACTORS[name][1] for name in reversed(factors))):
        words = backwards[::-1]
        switched = {f"defense.{FACTORS[n][0]}": FACTORS[n][1][word] for n, word in zip(factors, words, strict=True)}
        name = ", ".join(f"{name} {word}" for name, word in zip(factors, words, strict=True))
        rows[name] = {"defense": ARAT.name, **common, **switched}
    return rows


def with_published(comparison: Comparison, factors: Sequence[str]) -> Comparison:
    """Put the paper's rows beside those of the table, where it has them."""
    settings = comparison.settings
    here = PUBLISHED.get(str(settings["model"]))
    model = str(settings["model"]) if here is not None else "resnet18"
    same = here is not None and settings["dataset"] == "cifar10"
    rows = []
    for row in comparison.rows:
        words = dict(part.rsplit(" ", 1) for part in row["defense"].split(", "))
        key = words.pop("stop-gradient", ""), words.pop("split-bn", "")
        found = None if words else PUBLISHED[model].get(key)
        numbers = None if found is None else dict(zip(("clean", "autoattack", "grad_sim"), found, strict=True))
        rows.append({**row, "settings": {}, "published": numbers and {**numbers, "source": _SOURCE}})
    switched = {f"defense.{FACTORS[name][0]}" for name in factors}
    common = {key: value for key, value in comparison.rows[0]["settings"].items() if key not in switched}
    notes = [
        f"Every row is AR-AT with {settings_in_words(common)}.",
        "Grad-sim: cosine between the gradients of the classification terms and the invariance term by the weights of "
        "convolutions and linear layers, mean over the measurements of a run.",
    ]
    if any(row["published"] for row in rows) and not same:
        notes.append(
            f"The published numbers are of {model} on CIFAR-10 after 100 epochs, not of this table's network and data: "
            "compare the order of the rows, not the numbers."
        )
    return dataclasses.replace(comparison, rows=rows, settings={**settings, "notes": notes})
