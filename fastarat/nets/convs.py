"""Convolutions of the built-in networks that are more than `nn.Conv2d`: the stem, a shortcut's, a folded one."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastarat.kernels import conv_bias_relu, pick_pointwise, stem_applies, stem_conv
from fastarat.nets.batchnorm import BatchNorm2d


class Stem(nn.Conv2d):
    """A network's first convolution, 3x3: on a GPU in half precision its input gradient has a kernel of its own."""

    backend = "auto"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = _stem_weight(self, x)
        return super().forward(x) if weight is None else stem_conv(x, weight, self.backend)


def _stem_weight(conv: Stem | FoldedConv, x: Tensor) -> Tensor | None:
    """What `stem_conv` is to convolve x with; None where its kernel is not for it, or x gets no gradient."""
    if not x.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kind, weight = x.device.type, conv.weight
    if torch.is_autocast_enabled(kind):
        weight = weight.to(torch.get_autocast_dtype(kind))
    applies = conv.stride == conv.padding == (1, 1) and stem_applies(x, weight, conv.backend)
    return weight if applies else None


class FoldedConv(nn.Conv2d):
    """A convolution that has absorbed the BatchNorm after it: it adds the residual and applies the ReLU itself.

    Its tensors are `Attacker`'s to fill, from those of `conv`, which `foldable` yields. fused: whether cuDNN does bias,
    residual and ReLU in the convolution's call. backend: of what is left to kernels, in backward.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, bias: bool, fused: bool, backend: str = "auto") -> None:
        # A cast, because torch declares tuples of any length.
        kernel, stride, padding = cast(tuple[tuple[int, int], ...], (conv.kernel_size, conv.stride, conv.padding))
        super().__init__(conv.in_channels, conv.out_channels, kernel, stride, padding, bias=bias, device="meta")
        self.weight = nn.Parameter(torch.empty_like(conv.weight, dtype=dtype), requires_grad=False)
        if bias:
            self.bias = nn.Parameter(self.weight.new_empty(conv.out_channels), requires_grad=False)
        self.fused, self.backend = fused, backend

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        if self.fused and relu:
            options = {"stride": self.stride, "padding": self.padding, "backend": self.backend}
            return conv_bias_relu(x, self.weight, self.bias, residual, **options)
        weight = _stem_weight(self, x)
        y = super().forward(x) if weight is None else stem_conv(x, weight, self.backend)
        if weight is not None and self.bias is not None:
            y = y + self.bias[:, None, None]
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y


def can_fold(conv: nn.Conv2d, bn: BatchNorm2d) -> bool:
    """Whether `FoldedConv` does what the two do: a person may have put layers of another kind in their places."""
    plain = conv.bias is None and conv.groups == 1 and tuple(conv.dilation) == (1, 1) and conv.padding_mode == "zeros"
    return plain and bn.affine and bn.track_running_stats and bn.drop is None and bn.act is None


def projected(conv: nn.Conv2d, side: Tensor, bn: BatchNorm2d) -> Tensor:
    """A block's shortcut; where `bn` may fork, a 1x1 one that strides hands back the gradient of what it picked."""
    pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1 and conv.bias is None
    own = type(conv).forward in (nn.Conv2d.forward, FoldedConv.forward)  # else somebody's, who does more
    picks = own and bn.route.forks and conv.stride == (2, 2) and pointwise
    return pick_pointwise(side, conv.weight) if picks else conv(side)
