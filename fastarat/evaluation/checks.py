"""What makes a number doubtful: refused before an evaluation where it must be, noted after it where it may be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastarat.checks import (
    check_classes,
    check_images,
    check_labels,
    check_no_probabilities,
    check_pixels,
    input_channels,
    logits_of,
)
from fastarat.errors import UserError
from fastarat.evaluation.task import Task
from fastarat.values import Budget, shown

PERTURBATION_TOLERANCE = 1e-6
# A gradient below this, the largest of an image's pixels: float32 has rounded the true class out of the cross-entropy
# (at probabilities within 1e-7 of one), and the direction that is left is of the other classes alone.
TINY_GRADIENT = 1e-10


class NonFinite(UserError):
    """The model's logits are NaN or infinite."""


def check_network(model: nn.Module) -> None:
    """Raise UserError for what is no nn.Module."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model={shown(model)}: expected an nn.Module, images [B, C, H, W] -> logits [B, K]")


def check_data(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise UserError for images and labels that the model cannot be measured on, and for pixels outside [0, 1]."""
    check_images(images, channels=input_channels(model))
    check_labels(labels, images)
    check_pixels(images)


def check_model(task: Task, *, needs_gradient: bool) -> int:
    """Refuse a model that cannot be evaluated, note what makes it doubtful, return the number of classes."""
    x, y = next(task.batches())
    with torch.no_grad():
        logits = logits_of(task.forward, x)
        check_finite(logits)
        check_no_probabilities(logits)
        again = task.forward(x)
        moved = ((again - logits).norm(dim=1) / (logits.norm(dim=1) + 1e-10)).max().item()
    if moved > 1e-4:  # the limit of the official `check_randomized`
        task.found.append(
            f"two forwards on the same images differ by {moved:.2g} (relative): the model is randomised, "
            "and these attacks do not average over its randomness"
        )
    num_classes = logits.shape[1]
    check_classes(task.labels, num_classes)
    if not needs_gradient:
        return num_classes
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = task.forward(x)
        if not logits.requires_grad:
            raise UserError(
                "the logits do not depend on the images through autograd: gradient attacks cannot work; "
                "remove detach(), no_grad() or quantisation from the model's forward"
            )
        # The sum: a mean divides each image's gradient by the batch size, and a small one may then underflow to zero.
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x, allow_unused=True)
    largest = torch.zeros(len(x)) if grad is None else grad.flatten(1).abs().amax(1)
    zero, tiny = int((largest == 0).sum()), int(((largest > 0) & (largest < TINY_GRADIENT)).sum())
    if zero:
        task.found.append(
            f"zero input gradient on {zero / len(x):.1%} of the first {len(x)} images: gradient attacks "
            "stand still there, so their robust accuracy is an overestimate"
        )
    if tiny > 0.01 * len(x):
        task.found.append(
            f"tiny input gradient (below {TINY_GRADIENT:g}) on {tiny / len(x):.1%} of the first {len(x)} images: "
            "rounding may lead gradient attacks astray there; compare with cw-20 or autoattack"
        )
    return num_classes


def check_finite(logits: Tensor) -> None:
    """Raise UserError unless the logits are float32, NonFinite unless they are finite."""
    if logits.dtype != torch.float32:
        raise UserError(f"the model returned {logits.dtype}: expected float32 logits; turn off autocast in its forward")
    if not bool(logits.isfinite().all()):
        raise NonFinite("the model returned NaN or infinite logits: expected finite ones; check the checkpoint")


def furthest(points: Tensor, images: Tensor, budget: Budget) -> float:
    """Return the largest distance between rows, asserting that budget and pixel range are kept."""
    delta, slack = (points - images).flatten(1), PERTURBATION_TOLERANCE
    if budget.norm == "linf":
        distance = delta.abs().amax().item()
    else:
        # Both our projection and the official one take a float32 norm over C*H*W terms.
        distance, slack = delta.double().norm(dim=1).max().item(), slack + 1e-5 * budget.epsilon
    low, high = (v.item() for v in points.aminmax())
    # Before the assertions, which NaN would fail with a text that blames our projection for the checkpoint's fault.
    if math.isnan(low):
        raise NonFinite("the model's input gradient is NaN: expected a finite one; check the checkpoint")
    # Assertions: no input of a person's can bring these about, so a traceback is what is wanted.
    assert distance <= budget.epsilon + slack, f"perturbation {distance} exceeds epsilon {budget.epsilon}"
    assert -1e-6 <= low <= high <= 1 + 1e-6, f"adversarial images span [{low}, {high}]"
    return distance
