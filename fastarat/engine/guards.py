"""What a person may get wrong in a step: a batch, an optimiser, a defense of their own; said before it does harm."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastarat.checks import check_no_probabilities, logits_of
from fastarat.defenses.base import Defense
from fastarat.device import switched
from fastarat.errors import UserError
from fastarat.nets.attacker import mode_of
from fastarat.values import shown


def own_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context in which a step computes as it was asked to, whatever its caller's loop does.

    Lightning and accelerate run a training step under autocast in mixed precision; losses, statistics and a float32
    attack would be rounded to three digits with no word said.
    """
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _file(defense: Defense) -> str:
    return getattr(sys.modules.get(type(defense).__module__), "__file__", None) or type(defense).__module__


def where(defense: Defense) -> str:
    """File and class of a defense, as errors name it."""
    return f"{_file(defense)}: {type(defense).__qualname__}"


def tried(defense: Defense, step: Callable[[], object]) -> None:
    """Run `step`, one training step of `defense`, and say what fails in the words of the defense's own file.

    Raises: UserError naming file, line and method, and what was expected.
    """
    parameters = list(inspect.signature(type(defense).loss).parameters)
    if len(parameters) != 2:
        raise UserError(f"{where(defense)}.loss takes ({', '.join(parameters)}): expected (self, views)")
    try:
        step()
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _file(defense)]
        place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else where(defense)
        first = str(error).strip().split("\n")[0]
        hint = ""
        if defense.attacks and not defense.needs_clean:
            hint = "; views.logits_clean is None unless the class sets needs_clean = True"
        elif not defense.attacks:
            hint = "; views.logits_adv is None because the class sets attacks = False"
        raise UserError(f"{place}: {type(error).__name__}: {first}{hint}") from error


def check_optimizer(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not hasattr(optimizer, "step"):
        raise UserError(
            f"the optimizer function returned {shown(optimizer)}: expected an optimizer, such as "
            "torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)"
        )
    held, wanted = {id(p) for g in groups for p in g["params"]}, {id(p) for p in parameters}
    if missing := len(wanted - held):
        raise UserError(
            f"the optimizer leaves out {missing} of the {len(wanted)} parameters its function was given, which would "
            "never be trained: build it of that list (model.parameters() from before BatchNorm was split lack the "
            "second set and the defense's own); a parameter that shall stay gets requires_grad_(False) before"
        )


def check_terms(terms: object, where: str) -> None:
    if not isinstance(terms, dict) or not terms:
        raise UserError(
            f"{where} returned {type(terms).__name__}: expected a dict of named scalar terms, {{'ce': loss}}"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor):
            raise UserError(f"{where}: term {name!r} is a {type(term).__name__}: expected a scalar tensor")
        if term.dim():
            raise UserError(
                f"{where}: term {name!r} has shape {list(term.shape)}: expected a scalar; reduce it, .mean()"
            )
    if not any(term.requires_grad for term in terms.values()):
        raise UserError(
            f"{where}: no term has a gradient, so nothing would be learnt: compute it from views.logits_adv or "
            "views.logits_clean, without detach or .item()"
        )


def count_classes(model: nn.Module, shape: torch.Size, memory_format: torch.memory_format) -> int:
    """K, by one forward in eval mode: a network that does not take such images, or return logits, shows here."""
    # Not of one colour: a network that scales each image by its own spread has none to divide by there.
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    images = images.to(next(model.parameters()).device).to(memory_format=memory_format)
    # No plan of cuDNN's is worth finding for two images.
    with torch.no_grad(), mode_of(model, False), switched(torch.backends.cudnn, benchmark=False):
        logits = logits_of(model, images, model)
        check_no_probabilities(logits)
        return logits.shape[1]
