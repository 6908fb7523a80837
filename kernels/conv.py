"""Convolution, bias, residual add and ReLU in one cuDNN call, for attacks on a network whose BatchNorm is folded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .fork import take_two, taken, whole
from .stem import stem_applies, stem_input_grad

_LAST = torch.channels_last


def why_not_conv_bias_relu(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Say why `conv_bias_relu` cannot serve tensors on `device`, or None when it can.

    Asked for the first time, it tries the call on a few images there and compares the answer; so ask before a CUDA
    graph is captured.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return f"device {device.type!r}: fused convolutions are cuDNN's"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if torch.backends.cudnn.deterministic:
        return "cuDNN's fused convolutions have no deterministic mode"
    return _why_not(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index), dtype)


def why_not_fold(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Say why folding BatchNorm into the convolutions would not pay on `device`, or None where it does.

    On a GPU a bias, an add and a ReLU of their own take more passes over the images than the fused BatchNorm kernel's
    one: folding pays there only if the convolution does them itself.
    """
    return why_not_conv_bias_relu(device, dtype) if torch.device(device).type == "cuda" else None


@functools.cache
def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device, generator=generator).to(dtype)
        return drawn.contiguous(memory_format=_LAST) if drawn.dim() == 4 else drawn

    try:
        for channels, stride, add in ((64, 1, False), (64, 1, True), (64, 2, False), (3, 1, False)):
            x, weight, bias = draw(4, channels, 8, 8), draw(64, channels, 3, 3) / (9 * channels) ** 0.5, draw(64)
            wanted = F.conv2d(x.double(), weight.double(), bias.double(), stride, padding=1)
            residual = draw(*wanted.shape) if add else None
            wanted = F.relu(wanted if residual is None else wanted + residual.double())
            # PyTorch hands cuDNN the output, as yet unwritten, as an addend times 0. Let it hold the worst there is.
            poison = torch.full_like(wanted, float("nan"), dtype=dtype)
            del poison
            found = _fused(x, weight.contiguous(memory_format=_LAST), bias, residual, (stride, stride), (1, 1))
            error = (found.double() - wanted).abs().max().item()
            if not error <= 0.05:  # bfloat16 and TF32 keep three digits of numbers up to 5
                return f"cuDNN's fused convolution is off by {error:.2g} on a small example"
    except RuntimeError as error:
        return f"cuDNN's fused convolution fails here: {str(error).strip().splitlines()[0]}"
    return None


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, (1, 1), 1)


def conv_bias_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    backend: Backend = "auto",
) -> Tensor:
    """relu(conv2d(x, weight) + bias [+ residual]), differentiable by x and residual alone: weights are constants.

    x: float [B, I, H, W], cast to the weight's dtype. weight: [O, I, k, k]; bias: [O]; residual: [B, O, H', W']; all of
    one dtype, on a CUDA device for which `why_not_conv_bias_relu` gives None. Returns: [B, O, H', W'], to be forked.
    Backward is the ReLU's mask, which is the residual's gradient too, and the convolution's input gradient.
    backend: of backward's kernels, as in `stem_conv`.
    """
    return _ConvBiasReLU.apply(x, weight, bias, residual, tuple(stride), tuple(padding), backend)


class _ConvBiasReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, stride, padding, backend):
        # Here and not outside: a float32 gradient of a stem need not be rounded on its way to the images.
        low = x.to(weight.dtype)
        y = _fused(low, weight, bias, residual, stride, padding)
        ctx.save_for_backward(low, weight, y)
        ctx.dtype = x.dtype
        ctx.stride, ctx.padding, ctx.backend = stride, padding, backend
        ctx.set_materialize_grads(False)
        take_two(ctx)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None):
        x, weight, y = ctx.saved_tensors
        dy, dy2 = taken(ctx, dy, y)
        if dy is None:
            return (None,) * 7
        dy = _relu_backward(dy, dy2, y, ctx.backend)
        dx = None
        if ctx.needs_input_grad[0] and ctx.stride == ctx.padding == (1, 1) and stem_applies(dy, weight, ctx.backend):
            dx = stem_input_grad(dy, weight, ctx.backend).to(ctx.dtype)
        elif ctx.needs_input_grad[0]:
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
            )[0].to(ctx.dtype)
        return dx, None, None, dy if ctx.needs_input_grad[3] else None, None, None, None


def _relu_backward(dy: Tensor, dy2: Tensor | None, y: Tensor, backend: Backend) -> Tensor:
    if dy2 is None:
        return torch.ops.aten.threshold_backward(dy, y, 0)
    if not use_triton(backend, y, "y"):
        return torch.ops.aten.threshold_backward(dy + whole(dy2, y), y, 0)
    return _masked_sum_op(*(t.contiguous(memory_format=_LAST) for t in (dy, dy2, y)))


@torch.library.custom_op("fastarat::masked_sum", mutates_args=())
def _masked_sum_op(dy: Tensor, dy2: Tensor, y: Tensor) -> Tensor:
    from . import conv_triton

    with torch.cuda.device_of(y):
        return conv_triton.masked_sum(dy, dy2, y)


@_masked_sum_op.register_fake
def _(dy, dy2, y):
    return torch.empty_like(y)
