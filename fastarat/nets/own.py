"""A network that was given in Python, instead of a name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastarat.errors import UserError
from fastarat.nets.models import Normalize, build_model
from fastarat.texts import GIVEN
from fastarat.values import shown

Given = nn.Module | Callable[[int], nn.Module]
"""A network given in Python: a module, or a function from the number of classes to one."""


def check_given(model: object) -> None:
    """Raise UserError for what is neither a network nor a function that makes one."""
    if not (isinstance(model, nn.Module) or callable(model)):
        raise UserError(
            f"model={shown(model)}: expected an nn.Module, images [B, C, H, W] in [0, 1] -> logits [B, K], or a "
            "function from the number of classes to one; a name belongs in the config, Config(model=...)"
        )


def check_named(name: str, given: Given | None) -> None:
    """Raise UserError unless a network was trained under a `name` of ours, or was given in Python and is now, too."""
    if name.startswith(GIVEN) != (given is not None):
        how = "which is built by its name: leave model= out"
        if given is None:
            how = "given in Python: load it there, fastarat.load_run(run, model=...), with the same again"
        raise UserError(f"the network was trained with model={name}, {how}")


def network(name: str, given: Given | None, **options: Any) -> nn.Module:
    """Build the network of this name, or take the one given instead; the options are `build_model`'s."""
    return build_model(name, **options) if given is None else given_model(given, **options)


def given_model(
    given: Given,
    *,
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **sizes: int | None,
) -> nn.Module:
    """Return a network given in Python: a copy of a module, or what a function makes of the number of classes.

    mean, std: as in `build_model`, whose other sizes are the network's own business here.
    Raises: UserError for a module that cannot be copied, or a function that fails.
    """
    try:
        model = copy.deepcopy(given) if isinstance(given, nn.Module) else given(num_classes)
    except Exception as error:  # anybody's code fails in its own ways
        first = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        what = "cannot be copied" if isinstance(given, nn.Module) else f"failed, called with {num_classes} classes"
        mend = "; give a function that makes it" if isinstance(given, nn.Module) else ""
        raise UserError(f"the model given {what} ({type(error).__name__}: {first}){mend}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"the function given as model returned {shown(model)}: expected an nn.Module")
    return model if mean is None or std is None else nn.Sequential(Normalize(mean, std), model)
