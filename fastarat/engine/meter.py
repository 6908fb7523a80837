"""What a step measures, summed on the device: no host read until somebody asks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastarat.defenses.base import Views
from fastarat.distributed import World
from fastarat.specs import known

_NEVER = 2**62


class _Held(NamedTuple):
    """sums: float64 [values + 1], over images, the last their number. first_bad: int64 [values]. steps: int64 []."""

    sums: Tensor
    first_bad: Tensor
    steps: Tensor


class Meter:
    """Sums of terms and correct predictions on the device, and the first step at which a term was not finite.

    What is watched beside the terms is not summed. world: over whose ranks it is read; all of them read together.
    """

    def __init__(self, device: torch.device, world: World | None = None) -> None:
        self.device, self.world = device, world or World()
        self.names: list[str] = []
        self.watched: list[str] = []
        self.num_terms = 0
        self._held: _Held | None = None

    @property
    def started(self) -> bool:
        """Whether a step has been measured, ever."""
        return self._held is not None

    def tensors(self) -> list[Tensor]:
        """What it writes to: nothing before the first step."""
        return list(self._held or ())

    def reset(self) -> None:
        """Forget everything, in place: a captured step goes on writing to the same tensors."""
        if self._held is not None:
            self._held.sums.zero_()
            self._held.steps.zero_()
            self._held.first_bad.fill_(_NEVER)

    def state_dict(self) -> dict[str, Any]:
        """What it has measured since the last reset, as tensors and plain values: empty before the first step."""
        if self._held is None:
            return {}
        names = {"names": self.names, "watched": self.watched, "num_terms": self.num_terms}
        return {**names, **self._of_all()._asdict()}

    def _of_all(self) -> _Held:
        """A copy, over all ranks."""
        held = _Held(*(value.clone() for value in known(self._held)))
        self.world.sum_([held.sums], "meter")
        self.world.smallest_([held.first_bad], "meter")
        return held

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if not state:
            self.reset()
            return
        self.names, self.watched, self.num_terms = list(state["names"]), list(state["watched"]), state["num_terms"]
        self._held = _Held(*(state[key].clone().to(self.device) for key in _Held._fields))
        if self.world.rank:  # what all have measured is one's alone from here on
            self._held.sums.zero_()

    def add(self, terms: dict[str, Tensor], views: Views, watched: dict[str, Tensor], *, last: bool = True) -> None:
        """Count a step; or a micro-batch of it, which is not its `last`."""
        values = {**terms}
        size = views.labels.shape[0]
        for key, logits in (("clean_acc", views.logits_clean), ("robust_acc", views.logits_adv)):
            if logits is not None:
                values[key] = (logits.detach().argmax(1) == views.labels).float().mean()
        row = torch.stack([v.float() for v in (*values.values(), *watched.values())])
        if self._held is None:
            self.names, self.num_terms, self.watched = list(values), len(terms), list(watched)
            self._held = _Held(
                torch.zeros(len(values) + 1, dtype=torch.float64, device=self.device),
                torch.full((len(row),), _NEVER, dtype=torch.int64, device=self.device),
                torch.zeros((), dtype=torch.int64, device=self.device),
            )
        sums, first_bad, steps = self._held
        # The first step at which each value was not finite: a minimum, because a mean would show it too late.
        bad = torch.where(torch.isfinite(row), _NEVER, steps)
        torch.minimum(first_bad, bad, out=first_bad)
        sums[:-1] += torch.nan_to_num(row[: len(values)]).double() * size
        sums[-1] += size
        steps += last

    def read(self) -> dict[str, float]:
        """Means per image since the last reset, with `loss` the sum of the terms; one host read."""
        values = [0.0] if self._held is None else self._of_all().sums.tolist()
        if not values[-1]:
            return {}
        means = {name: value / values[-1] for name, value in zip(self.names, values[:-1], strict=True)}
        return {"loss": sum(list(means.values())[: self.num_terms]), **means}

    def bad(self) -> tuple[int, str] | None:
        """Step (from 0, since the last reset) and name of the first term that was not finite, or None."""
        if self._held is None:
            return None
        steps = dict(zip((*self.names, *self.watched), self._of_all().first_bad.tolist(), strict=True))
        looked_at = (*self.watched, *self.names[: self.num_terms])  # what went wrong first in the step comes first
        name = min(looked_at, key=steps.__getitem__)
        return None if steps[name] == _NEVER else (steps[name], name)
