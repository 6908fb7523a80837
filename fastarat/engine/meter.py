"""What a step measures, summed on the device: no host read until somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from fastarat.defenses import Views

_NEVER = 2**62


class Meter:
    """Sums of terms and correct predictions on the device, and the first step at which a term was not finite.

    What is watched beside the terms is not summed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.watched: list[str] = []
        self.sums: Tensor | None = None
        self.first_bad: Tensor | None = None
        self.steps: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [] if self.sums is None else [self.sums, self.first_bad, self.steps]

    def reset(self) -> None:
        """Forget everything, in place: a captured step goes on writing to the same tensors."""
        if self.sums is not None:
            self.sums.zero_()
            self.steps.zero_()
            self.first_bad.fill_(_NEVER)

    def add(self, terms: dict[str, Tensor], views: Views, watched: dict[str, Tensor]) -> None:
        values = {**terms}
        size = views.labels.shape[0]
        for key, logits in (("clean_acc", views.logits_clean), ("robust_acc", views.logits_adv)):
            if logits is not None:
                values[key] = (logits.detach().argmax(1) == views.labels).float().mean()
        row = torch.stack([v.float() for v in (*values.values(), *watched.values())])
        if self.sums is None:
            self.names, self.num_terms, self.watched = list(values), len(terms), list(watched)
            self.sums = torch.zeros(len(values) + 1, dtype=torch.float64, device=self.device)
            self.first_bad = torch.full((len(row),), _NEVER, dtype=torch.int64, device=self.device)
            self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        bad = torch.where(torch.isfinite(row), _NEVER, self.steps)
        torch.minimum(self.first_bad, bad, out=self.first_bad)
        self.sums[:-1] += torch.nan_to_num(row[: len(values)]).double() * size
        self.sums[-1] += size
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means per image since the last reset, with `loss` the sum of the terms; one host read."""
        values = [0.0] if self.sums is None else self.sums.tolist()
        if not values[-1]:
            return {}
        means = {name: value / values[-1] for name, value in zip(self.names, values[:-1], strict=True)}
        return {"loss": sum(list(means.values())[: self.num_terms]), **means}

    def bad(self) -> tuple[int, str] | None:
        """Step (from 0, since the last reset) and name of the first term that was not finite, or None."""
        if self.first_bad is None:
            return None
        steps = dict(zip((*self.names, *self.watched), self.first_bad.tolist(), strict=True))
        looked_at = (*self.watched, *self.names[: self.num_terms])  # what went wrong first in the step comes first
        name = min(looked_at, key=steps.get)
        return None if steps[name] == _NEVER else (steps[name], name)
