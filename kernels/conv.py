"""For attacks on a network whose BatchNorm is folded: the folding, and convolution, bias, add and ReLU in one call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .backend import Backend, use_triton
from .fork import take_two, taken, whole
from .stem import MAX_IN_CHANNELS, stem_applies, stem_input_grad

_LAST = torch.channels_last


class ConvKind(NamedTuple):
    """Convolutions that cuDNN has fused kernels for, or has not. few: fewer than 16 channels in, as a stem has."""

    kernel: int = 3
    stride: int = 1
    few: bool = False
    add: bool = False

    def __str__(self) -> str:
        words = ("few channels in", self.few), (f"stride {self.stride}", self.stride > 1), ("residual", self.add)
        return ", ".join([f"{self.kernel}x{self.kernel}", *(word for word, said in words if said)])


_GENERAL = ConvKind(), ConvKind(add=True), ConvKind(stride=2)


def kind_of(conv: nn.Conv2d, add: bool) -> ConvKind | None:
    """Return the kind of a convolution, with or without a residual; None for one that `conv_bias_relu` is not for."""
    (kernel, *kernels), (stride, *strides) = conv.kernel_size, conv.stride
    same = tuple(conv.padding) == (kernel // 2, kernel // 2) and kernels == [kernel] and strides == [stride]
    usual = conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.padding_mode == "zeros"
    return ConvKind(kernel, stride, conv.in_channels < MAX_IN_CHANNELS, add) if same and usual else None


def why_not_conv_bias_relu(device: torch.device | str, dtype: torch.dtype, kind: ConvKind | None = None) -> str | None:
    """Say why `conv_bias_relu` cannot serve tensors on `device`, or None when it can.

    kind: of the convolution; without it the answer is about those that make up a network, of 64 channels and more.
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
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    reasons = (_why_not(device, dtype, kind) for kind in ((kind,) if kind else _GENERAL))
    return next((reason for reason in reasons if reason), None)


def conv_kinds(device: torch.device | str, dtype: torch.dtype) -> dict[str, str | None]:
    """Say of each kind of convolution that the built-in networks have why `conv_bias_relu` is not for it, or None."""
    return {str(kind): why_not_conv_bias_relu(device, dtype, kind) for kind in (*_GENERAL, ConvKind(few=True))}


def why_not_fold(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Say why folding BatchNorm into the convolutions would not pay on `device`, or None where it does.

    On a GPU a bias, an add and a ReLU of their own take more passes over the images than the fused BatchNorm kernel's
    one: folding pays there only if most convolutions do them themselves. Others, such as the stem, may not.
    """
    return why_not_conv_bias_relu(device, dtype) if torch.device(device).type == "cuda" else None


@functools.cache
def _why_not(device: torch.device, dtype: torch.dtype, kind: ConvKind) -> str | None:
    try:
        error = _error(device, dtype, kind)
    except RuntimeError as error:
        return f"cuDNN's fused convolution fails here: {str(error).strip().splitlines()[0]}"
    if not error <= 0.05:  # bfloat16 and TF32 keep three digits of numbers up to 5
        return f"cuDNN's fused convolution is off by {error:.2g} on a small example"
    return None


def _error(device: torch.device, dtype: torch.dtype, kind: ConvKind) -> float:
    """How far the fused call is from float64 on a few images, at most."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device, generator=generator).to(dtype)
        return drawn.contiguous(memory_format=_LAST) if drawn.dim() == 4 else drawn

    channels, kernel, padding = 3 if kind.few else 64, kind.kernel, kind.kernel // 2
    x, bias = draw(4, channels, 8, 8), draw(64)
    weight = (draw(64, channels, kernel, kernel) / (kernel**2 * channels) ** 0.5).contiguous(memory_format=_LAST)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), kind.stride, padding)
    residual = draw(*wanted.shape) if kind.add else None
    wanted = F.relu(wanted if residual is None else wanted + residual.double())
    # PyTorch hands cuDNN the output, as yet unwritten, as an addend times 0. Let it hold the worst there is.
    poison = torch.full_like(wanted, float("nan"), dtype=dtype)
    del poison
    found = _fused(x, weight, bias, residual, (kind.stride,) * 2, (padding,) * 2)
    return (found.double() - wanted).abs().max().item()


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


class Norm(NamedTuple):
    """BatchNorm in eval mode, (x - mean) / sqrt(var + eps) * weight + bias: four float [O], and eps."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float


@torch.no_grad()
def fold_batchnorm(
    weight: Tensor,
    norm: Norm,
    into: Sequence[tuple[Tensor, Tensor | None]],
    *,
    shortcut: Norm | None = None,
    backend: Backend = "auto",
) -> None:
    """Write the convolution that does what one with `weight` and then `norm` do, worked out in float32 or wider.

    weight: float [O, I, k, k]. into: one or two pairs of a weight (like `weight`, of any float dtype, rounded to last)
    and a bias [O], or None for none. shortcut: the norm after another convolution whose output is added to this one's:
    its bias goes into this bias.
    backend: "triton", "plain", or "auto". Triton takes one launch; it needs dense weights of the same strides, and
    leaves others to plain PyTorch.
    Raises: ValueError for no or more than two pairs.
    """
    if len(into) not in (1, 2):
        raise ValueError(f"into holds {len(into)} pairs of a weight and a bias: expected one or two")
    weights = (weight, *(made for made, _ in into))
    alike = all(made.stride() == weight.stride() and _dense(made) for made in weights)
    if use_triton(backend, weight, "weight") and alike:
        (out, out_bias), (wide, wide_bias) = (*into, (None, None))[:2]
        side, side_eps = (list(shortcut[:4]), shortcut.eps) if shortcut else ([], 0.0)
        _fold_op(weight, list(norm[:4]), norm.eps, side, side_eps, out, out_bias, wide, wide_bias)
        return
    scale, bias = _scale_and_bias(norm)
    if shortcut is not None:
        bias += _scale_and_bias(shortcut)[1]
    folded = weight * scale[:, None, None, None]
    for made, made_bias in into:
        made.copy_(folded)
        if made_bias is not None:
            made_bias.copy_(bias)


def _scale_and_bias(norm: Norm) -> tuple[Tensor, Tensor]:
    least = torch.promote_types(norm.weight.dtype, torch.float32)
    weight, bias, mean, var = (t.to(least) for t in norm[:4])
    scale = weight * torch.rsqrt(var + norm.eps)
    return scale, bias - mean * scale


def _dense(t: Tensor) -> bool:
    return t.numel() == 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


@torch.library.custom_op("fastarat::fold_batchnorm", mutates_args=("out", "out_bias", "wide", "wide_bias"))
def _fold_op(
    weight: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    side: Sequence[Tensor],
    side_eps: float,
    out: Tensor,
    out_bias: Tensor | None,
    wide: Tensor | None,
    wide_bias: Tensor | None,
) -> None:
    from . import conv_triton

    with torch.cuda.device_of(weight):
        conv_triton.fold(weight, norm, eps, side, side_eps, out, out_bias, wide, wide_bias)


@_fold_op.register_fake
def _(weight, norm, eps, side, side_eps, out, out_bias, wide, wide_bias):
    return None
