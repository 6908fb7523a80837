"""One projected-gradient step on images under an L-infinity budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import TRITON_DTYPES, Backend, use_triton


def pgd_update(
    images: Tensor,
    grad: Tensor,
    center: Tensor,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    backend: Backend = "auto",
) -> Tensor:
    """Step along the sign of the gradient, back into the ball around `center`, back into [0, 1].

        clamp(clamp(images + step_size * sign(grad), center - epsilon, center + epsilon), 0, 1)

    Writes to no input and records no gradient. The sign of 0 is 0, and so, as in torch.sign, is the sign of
    NaN: such a pixel is only projected. A NaN loss therefore shows in the loss and not in the images, and is
    the caller's to detect. NaN in images or center stays NaN. Both backends give the same bits.

    images: float32 [B, C, H, W] (any shape), pixels in [0, 1], any memory layout; the result has its layout.
    grad: float32, bfloat16 or float16, like images, any layout: the gradient to ascend.
    center: float32, like images, any layout: the images the ball is around.
    epsilon: pixel units (8/255), a number or a float32 tensor [] on the device of the images (a schedule that
        a captured CUDA graph can follow).
    step_size: pixel units, likewise.
    backend: "triton", "plain", or "auto": Triton on CUDA where it is supported, plain elsewhere.

    Returns: float32, like images.

    Raises: ValueError for shapes or devices that differ, or for a number that is negative or not finite (the
    value of a tensor is not read: that would wait for the device); TypeError for a dtype not named above.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks", section 2.1.
    """
    _check(images, grad, center, epsilon, step_size)
    with torch.no_grad():
        if not use_triton(backend, images, "images"):
            return _plain(images, grad, center, epsilon, step_size)
        # The kernel walks memory in one flat order, so the layouts must agree.
        images = images.detach()
        if not (images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)):
            images = images.contiguous()
        return _pgd_update_op(
            images,
            _laid_out_like(images, grad),
            _laid_out_like(images, center),
            *_as_scalar(epsilon),
            *_as_scalar(step_size),
        )


def _plain(images: Tensor, grad: Tensor, center: Tensor, epsilon: float | Tensor, step_size: float | Tensor) -> Tensor:
    sign = grad.detach().sign()
    # In the layout and dtype of images; where grad has both already there is nothing to copy.
    same = sign.stride() == images.stride() and sign.dtype == images.dtype
    out = sign if same else torch.empty_like(images).copy_(sign)
    # step * sign is exact, so this rounds once, as the kernel does.
    out.mul_(step_size).add_(images)
    out.clamp_(center - epsilon, center + epsilon)
    return out.clamp_(0.0, 1.0)


def _check(images, grad, center, epsilon, step_size) -> None:
    if images.dtype != torch.float32 or center.dtype != torch.float32:
        raise TypeError(
            f"images are {images.dtype} and center {center.dtype}: both must be float32, because "
            "rounding to a narrower type alone carries images outside the ball"
        )
    if grad.dtype not in TRITON_DTYPES:
        raise TypeError(f"grad is {grad.dtype}: expected float32, bfloat16 or float16")
    for name, tensor in (("grad", grad), ("center", center)):
        if tensor.shape != images.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {list(images.shape)}, as images")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} and images on {images.device}: move one of them")
    for name, value in (("epsilon", epsilon), ("step_size", step_size)):
        if isinstance(value, Tensor):
            if value.dim() != 0 or value.dtype != torch.float32 or value.device != images.device:
                raise ValueError(
                    f"{name} is a {value.dtype} tensor of shape {list(value.shape)} on {value.device}: "
                    f"expected a number, or a float32 tensor of shape [] on {images.device}"
                )
        elif not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name}={value}: expected a finite number, 0 or more, in pixel units such as 8/255")


def _laid_out_like(images: Tensor, other: Tensor) -> Tensor:
    other = other.detach()
    if other.stride() == images.stride():
        return other
    return torch.empty_like(images, dtype=other.dtype).copy_(other)


def _as_scalar(value: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, value.detach()) if isinstance(value, Tensor) else (float(value), None)


@torch.library.custom_op("fastarat::pgd_update", mutates_args=())
def _pgd_update_op(
    images: Tensor,
    grad: Tensor,
    center: Tensor,
    epsilon: float,
    epsilon_tensor: Tensor | None,
    step_size: float,
    step_size_tensor: Tensor | None,
) -> Tensor:
    from . import pgd_update_triton

    with torch.cuda.device_of(images):
        return pgd_update_triton.update(images, grad, center, epsilon, step_size, epsilon_tensor, step_size_tensor)


@_pgd_update_op.register_fake
def _(images, grad, center, epsilon, epsilon_tensor, step_size, step_size_tensor):
    return torch.empty_like(images)
