"""What the AR-AT paper looks at inside a training: do gradients agree, how far apart are branches and features.

Nothing here changes a training: what a measurement moves is put back, and its numbers are those of a run without it.
Source: Waseda, Chang and Echizen, ICLR 2025 (arXiv 2402.14648), gradient conflict and mixture distribution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastarat.data import Batch, Split
from fastarat.engine.step import TrainStep
from fastarat.evaluation import adversarial_examples, collect
from fastarat.nets.attacker import HALF
from fastarat.nets.batchnorm import BatchNorm2d, branch, branches_of
from fastarat.nets.taps import Taps, forward_with_features, tap_names

EVERY = 40
"""Steps between two measurements of gradients, each of which takes a step and a sixth (AR-AT, 10 attack steps)."""
NUM_IMAGES = 128
"""Validation images, at most, whose representations are compared."""
_NUM_STEPS = 20
_FEWEST = 32
_SHARE = 0.005  # of an epoch's work that comparing representations may take

_Sets = dict[str, list[tuple[str, nn.BatchNorm2d]]]


class Diagnostics:
    """Measures one run, and gives an epoch's row of `diag/...` values.

    - `grad_sim`: cosine between the gradients of the classification terms and of the defense's `regularizers`, both by
      the weights of the network's convolutions and linear layers, on the training batch in train mode; the mean over
      the epoch's `grad_samples`. `grad_conflict`: the share of those weights at which the two differ in sign.
    - `bn_distance_mean`, `bn_distance_std`: between the running statistics of the branches "adv" and "clean".
    - `bn_stability_SET`: variance of the running means over the epoch's steps, averaged over channels, then layers; SET
      is a branch, or "shared".
    - `rep_distance`: L2 norm of the difference between the pooled features of x' (PGD-20) and x, mean over images, then
      layers, in eval mode through the branch "adv" for both, on validation images.

    Each also by layer, as `diag/NAME/LAYER`. What there is none of (a loss of one term, one set of statistics, no
    validation images) is left out.

    Args:
        step: what trains; its network, batches and attack are looked at.
        val: images to compare representations on, of which NUM_IMAGES at most are taken, at even distances.
        steps_per_epoch, epochs: of the run.
        num_train: training images; with the rest they say how often comparing representations is cheap enough.
        every: steps between two measurements of gradients (default: EVERY).
    """

    def __init__(
        self,
        step: TrainStep,
        val: Split,
        steps_per_epoch: int,
        epochs: int,
        num_train: int,
        *,
        every: int | None = None,
    ) -> None:
        self.step, self.every, self.steps_per_epoch, self.epochs = step, every or EVERY, steps_per_epoch, epochs
        self.layers = getattr(step.defense, "layers", None) or tap_names(step.model)
        work = num_train * (2 * step.spec.num_steps * step.defense.attacks + 6)
        # So few images, or so seldom, that they take no time to speak of; in float32, which is twice as slow as bf16.
        each = 2 * _NUM_STEPS * (2 if step.fast.precision in HALF else 1)
        count = min(NUM_IMAGES, len(val), max(_FEWEST, int(_SHARE * work / each)))
        self.images = collect(val, limit=count) if count else None
        self.period = max(1, math.ceil(count * each / (_SHARE * work)))
        weights = {name: m.weight for name, m in step.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        self.sets = _sets(step.model)
        self._gradients: Tensor | None = None  # sums of the cosine, the conflict ratio, and each layer's cosine
        self._samples = 0
        # Float64 [3, channels of all sets]: the first mean, sums from it and their squares.
        self._means: Tensor | None = None
        self._steps = 0

    def describe(self) -> str:
        """What is measured and how often, for the run card."""
        terms = ", ".join(self.step.defense.regularizers)
        said = [f"gradient similarity of {terms} every {self.every} steps"] if terms else []
        said.append("BatchNorm statistics")
        if self.images is not None:
            when = "epoch" if self.period == 1 else f"{self.period} epochs"
            said.append(f"representation distance on {len(self.images[1])} validation images every {when}")
        return ", ".join(said)

    def begin(self) -> None:
        """Forget what was measured: an epoch begins."""
        self._gradients, self._samples, self._means, self._steps = None, 0, None, 0

    @contextmanager
    def around(self, epoch: int, index: int, batch: Batch) -> Iterator[None]:
        """Measure a step, which is the block. index: of the step in its epoch, from 0."""
        done = (epoch - 1) * self.steps_per_epoch + index
        if done % self.every == self.every // 2 and self.step.defense.regularizers:
            self._compare_gradients(batch)
        yield
        self._note_means()

    def _compare_gradients(self, batch: Batch) -> None:
        with self.step.probe(batch.images, batch.labels) as terms:
            found = gradient_agreement(terms, self.step.defense.regularizers, list(self.weights.values()))
        if found is not None:
            self._gradients = found if self._gradients is None else self._gradients + found
            self._samples += 1

    @torch.no_grad()
    def _note_means(self) -> None:
        if not self.sets:
            return
        # Four small kernels a step, whatever the layers: beside a captured step each would be seen.
        running = [bn.running_mean for layers in self.sets.values() for _, bn in layers]
        means = torch.cat([mean for mean in running if mean is not None])
        if self._means is None:
            first = means.double()
            self._means = torch.stack([first, torch.zeros_like(first), torch.zeros_like(first)])
        first, total, squares = self._means
        moved = means - first
        total += moved
        squares.addcmul_(moved, moved)
        self._steps += 1

    def row(self, epoch: int) -> dict[str, float]:
        """What was measured in the epoch that ends, by its key in metrics.jsonl."""
        found: dict[str, float] = {}
        if self._gradients is not None:
            cosine, conflict, *by_layer = (self._gradients / self._samples).tolist()
            found |= {"grad_sim": cosine, "grad_conflict": conflict, "grad_samples": self._samples}
            found |= {f"grad_sim/{name}": value for name, value in zip(self.weights, by_layer, strict=True)}
        for name, by_layer in self._stability().items():
            found |= _averaged(f"bn_stability_{name}", by_layer)
        if {"adv", "clean"} <= self.sets.keys():
            between = branch_distances(self.step.model)
            for i, name in enumerate(("bn_distance_mean", "bn_distance_std")):
                found |= _averaged(name, {layer: value[i] for layer, value in between.items()})
        if self.images is not None and (epoch % self.period == 0 or epoch == self.epochs):
            spec = self.step.spec
            images, labels = (t.to(self.step.device) for t in self.images)
            budget = {"epsilon": spec.epsilon, "norm": spec.norm}
            found |= _averaged(
                "rep_distance", representation_distances(self.step.model, images, labels, self.layers, **budget)
            )
        return {f"diag/{name}": float(value) for name, value in found.items()}

    def _sizes(self) -> dict[str, int]:
        """Channels of each set, in the order they lie in."""
        return {name: sum(bn.num_features for _, bn in layers) for name, layers in self.sets.items()}

    def _stability(self) -> dict[str, dict[str, float]]:
        if self._means is None:
            return {}
        _, total, squares = self._means
        variance = (squares - total * total / self._steps).clamp_min(0) / self._steps
        parts = variance.split([bn.num_features for layers in self.sets.values() for _, bn in layers])
        values = iter(torch.stack([part.mean() for part in parts]).tolist())  # one read of the device
        return {name: {layer: next(values) for layer, _ in layers} for name, layers in self.sets.items()}

    def state_dict(self) -> dict[str, Any]:
        """What was measured since the epoch began, for a checkpoint within it."""
        sizes = self._sizes()
        parts = () if self._means is None else self._means.split([*sizes.values()], dim=1)
        means = dict(zip(sizes, (part.clone() for part in parts), strict=bool(parts)))
        return {"gradients": self._gradients, "samples": self._samples, "means": means, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        device = self.step.device
        gradients, means = state["gradients"], {name: t.to(device) for name, t in state["means"].items()}
        if means and {name: t.shape[-1] for name, t in means.items()} != self._sizes():
            raise ValueError("diagnostics of another network")
        if gradients is not None and gradients.shape != (2 + len(self.weights),):
            raise ValueError("gradients of another network")
        self._gradients = None if gradients is None else gradients.to(device)
        self._means = torch.cat([means[name] for name in self.sets], dim=1) if means else None
        self._samples, self._steps = int(state["samples"]), int(state["steps"])


def in_short(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """One number for a whole run of what its rows say of `diag/...`, by name; empty where nothing was measured.

    Gradients: the mean over all measurements. The rest: as they were last.
    """
    found: dict[str, float] = {}
    counts = [(row, int(row.get("diag/grad_samples", 0))) for row in metrics]
    total = sum(count for _, count in counts)
    for name in ("grad_sim", "grad_conflict") if total else ():
        found[name] = sum(count * row[f"diag/{name}"] for row, count in counts if count) / total
    for row in metrics:
        own = {key.removeprefix("diag/"): value for key, value in row.items() if key.startswith("diag/")}
        found |= {k: v for k, v in own.items() if "/" not in k and not k.startswith("grad_")}
    return found


def gradient_agreement(
    terms: Mapping[str, Tensor], regularizers: Sequence[str], weights: Sequence[Tensor]
) -> Tensor | None:
    """Compare the gradients of two halves of a loss by some weights.

    terms: 0-d, with their graph, which stays. regularizers: names of the one half, the others are the other.
    Returns: float64 [2 + len(weights)]: the cosine between the two gradients, all weights' in one vector; the share of
    coordinates whose product is negative (zeros are no conflict); the cosine for each weight. None where one half is
    empty. A gradient of zero has cosine 0 with any.
    Source: Waseda et al., ICLR 2025, Grad-sim and the gradient conflict ratio.
    """
    halves = (
        [t for name, t in terms.items() if name not in regularizers],
        [terms[n] for n in regularizers if n in terms],
    )
    if not all(halves):
        return None
    first, second = (
        torch.autograd.grad(torch.stack(half).sum(), weights, retain_graph=True, materialize_grads=True)
        for half in halves
    )
    rows = []
    for a, b in zip(first, second, strict=True):
        a, b = a.double(), b.double()
        rows.append(torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum(), (a * b < 0).sum()]))
    table = torch.stack(rows)
    total = table.sum(0)
    conflict = total[3] / sum(w.numel() for w in weights)
    return torch.cat([_cosine(total)[None], conflict[None], _cosine(table.T)])


def _cosine(row: Tensor) -> Tensor:
    return row[0] / (row[1] * row[2]).sqrt().clamp_min(1e-300)


def branch_distances(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return how far the running statistics of the branches "adv" and "clean" are apart, by layer.

    Each a pair: the mean over channels of |mu_adv - mu_clean| / sqrt((v_adv + v_clean) / 2 + 1e-5), and of
    |log((v_adv + 1e-5) / (v_clean + 1e-5)) / 2|. Empty for a network that is not split.
    """
    found: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if not isinstance(m, BatchNorm2d) or not {"adv", "clean"} <= {*branches_of(m)}:
            continue
        adv, clean = m.branch_set("adv"), m.branch_set("clean")
        if (
            adv.running_mean is None
            or clean.running_mean is None
            or adv.running_var is None
            or clean.running_var is None
        ):
            continue
        mu, v = (
            (adv.running_mean.double(), clean.running_mean.double()),
            (adv.running_var.double(), clean.running_var.double()),
        )
        mean = ((mu[0] - mu[1]).abs() / ((v[0] + v[1]) / 2 + 1e-5).sqrt()).mean()
        std = ((v[0] + 1e-5).log() - (v[1] + 1e-5).log()).abs().mean() / 2
        found[name] = torch.stack([mean, std])
    # One read of the device for all layers.
    pairs = torch.stack([*found.values()]).tolist() if found else []
    return {name: (mean, std) for name, (mean, std) in zip(found, pairs, strict=True)}


def representation_distances(
    model: nn.Module, images: Tensor, labels: Tensor, layers: Sequence[str], **budget: Any
) -> dict[str, float]:
    """Return ||z' - z||, by layer: the mean over images of the L2 norm between pooled features of x' and x.

    x' is made by PGD-20 as `evaluate` makes it; both go through the branch "adv" in eval mode and float32.

    images: float32 [B, C, H, W] in [0, 1], labels: int64 [B]; where the model is. budget: epsilon and norm.
    """
    points = adversarial_examples(model, images, labels, num_steps=_NUM_STEPS, **budget)
    modes = [(m, m.training) for m in model.modules()]
    named = "adv" if "adv" in branches_of(model) or not branches_of(model) else branches_of(model)[-1]
    try:
        model.eval()
        with torch.no_grad(), branch(model, named):
            both = []
            for x in (images, points):
                taps = Taps(tuple(layers))
                forward_with_features(model, x, taps)
                both.append(taps.ordered())
    finally:
        for m, training in modes:
            m.training = training
    apart = [(adv.float() - clean.float()).flatten(1).norm(dim=1).mean() for clean, adv in zip(*both, strict=True)]
    return dict(zip(layers, torch.stack(apart).tolist(), strict=True))


def _sets(model: nn.Module) -> _Sets:
    """BatchNorm layers with running statistics, by branch, or all of them as "shared"."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BatchNorm2d) and m.track_running_stats]
    found = {b or "shared": [(name, m.branch_set(b)) for name, m in layers] for b in branches_of(model) or ("",)}
    return {name: held for name, held in found.items() if held}


def _averaged(name: str, by_layer: Mapping[str, float]) -> dict[str, float]:
    """A value's mean over layers, and each layer's own."""
    if not by_layer:
        return {}
    return {name: sum(by_layer.values()) / len(by_layer)} | {f"{name}/{layer}": v for layer, v in by_layer.items()}
