"""Intermediate features of a network: AR-AT's alignment layers, ARREST's penultimate one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from fastarat.errors import UserError, unknown

PENULTIMATE = "penultimate"


class Tapped(Protocol):
    """A network that knows its own layers' names, and fills `Taps` by itself."""

    tap_names: tuple[str, ...]

    def tappable(self) -> list[str]: ...


def averaged(x: Tensor) -> Tensor:
    """Global average pooling, [B, C, H, W] -> [B, C].

    The bits of x.mean((2, 3)), whose gradient forgets that x is channels-last and is copied by whoever minds.
    """
    return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


class Taps:
    """Collects pooled intermediate features during one forward (AR-AT's alignment layers).

    Args:
        layers: names as in the model's `tap_names`, or "penultimate" (the pooled input of the classifier).
        relu, pool: apply ReLU, then global average pooling, to each tapped tensor, in this order.
    After the forward, `features` maps each name to a tensor [B, d] (or [B, d, H, W] without pooling).
    Source: Waseda et al., ICLR 2025, released code (`is_relu`, `is_avg_pool`).
    """

    def __init__(self, layers: Sequence[str], relu: bool = True, pool: bool = True) -> None:
        self.layers, self.relu, self.pool = tuple(layers), relu, pool
        self.features: dict[str, Tensor] = {}

    def record(self, name: str, x: Tensor) -> None:
        if name in self.layers:
            if self.relu and name != PENULTIMATE:
                x = F.relu(x)
            if self.pool and x.dim() == 4:
                x = averaged(x)
            self.features[name] = x.flatten(1)

    def ordered(self) -> tuple[Tensor, ...]:
        return tuple(self.features[name] for name in self.layers)


def tap_names(model: nn.Module) -> tuple[str, ...]:
    """Return the layers AR-AT aligns by default in `model`: a built-in network's own, else the penultimate feature."""
    own = _own(model)
    return (PENULTIMATE,) if own is None else own.tap_names


def forward_with_features(
    model: nn.Module, images: Tensor, taps: Taps | None, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Run `model` once and fill `taps`; networks that are not ours are tapped by hooks on the named modules.

    weights: to be used in place of the parameters of these names.
    Returns: logits [B, K]. Raises: UserError naming a layer the model does not have.
    """
    if taps is not None and "" in taps.layers:  # the whole model, and what a network's own blocks leave unnamed
        raise unknown("feature layer", "", tappable(model))
    if taps is None or _own(model) is not None:
        given = (images,) if taps is None else (images, taps)
        logits = functional_call(model, weights, given) if weights else model(*given)
    else:
        hooks = [_hook(model, name, taps) for name in taps.layers]
        try:
            logits = model(images)
        finally:
            for hook in hooks:
                hook.remove()
    if taps is not None and len(taps.features) < len(taps.layers):
        missing = next(name for name in taps.layers if name not in taps.features)
        raise unknown("feature layer", missing, tappable(model))
    return logits


def _own(model: nn.Module) -> Tapped | None:
    # A cast, and not a class that is asked for: torch.compile's wrapper, say, passes on what it does not have.
    return cast(Tapped, model) if hasattr(model, "tap_names") else None


def tappable(model: nn.Module) -> list[str]:
    """Names `Taps` can collect in `model`."""
    own = _own(model)
    return own.tappable() if own is not None else [n for n, _ in model.named_modules() if n] + [PENULTIMATE]


def _hook(model: nn.Module, name: str, taps: Taps) -> RemovableHandle:
    if name == PENULTIMATE:
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError(f"{type(model).__name__} has no nn.Linear, so no penultimate feature: name a layer")
        return linear[-1].register_forward_pre_hook(lambda m, args: taps.record(PENULTIMATE, args[0]))
    modules = dict(model.named_modules())
    if name not in modules:
        raise unknown("feature layer", name, tappable(model))

    def record(module: nn.Module, args: tuple, out: Tensor) -> None:
        taps.record(name, out)

    return modules[name].register_forward_hook(record)
