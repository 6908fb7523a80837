"""Batch statistics over all processes (`--sync-bn`): one more argument of the fused BatchNorm, not another layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastarat.distributed import World

KIND = "sync-bn"
"""Under which `World.sent` counts what goes over the wire here."""


class _OfAll(torch.autograd.Function):
    """Mean and biased variance of each group over all ranks, [G, C], and the rows that they are of, [1].

    One all-gather forwards, in which counts, means and squared deviations are merged as Chan et al. (1983) do: a sum of
    squares would lose the digits of a channel whose mean is large. One all-reduce backwards, which adds up what the
    losses of all ranks ask of the common statistics.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, world: World) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = x.shape[1]
        var, mean = torch.var_mean(x.unflatten(0, (groups, -1)).to(dtype), dim=(1, 3, 4), correction=0)
        rows = torch.full((1,), x.numel() // (channels * groups), dtype=dtype, device=x.device)
        found = world.gathered(torch.cat([mean.flatten(), var.flatten(), rows]), KIND)
        means, variances, counts = found.split([groups * channels, groups * channels, 1], dim=1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        mean, var = mean.view(groups, channels), var.view(groups, channels)
        ctx.save_for_backward(x, mean, total)
        ctx.world = world
        ctx.mark_non_differentiable(total)
        return mean, var, total

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, total = ctx.saved_tensors
        both = torch.stack([dmean, dvar])
        ctx.world.sum_([both], KIND)
        dmean, dvar = (t[:, None, :, None, None] for t in (both / total).unbind())
        apart = x.unflatten(0, (mean.shape[0], -1)) - mean[:, None, :, None, None]
        return (dmean + 2 * dvar * apart).to(x.dtype).flatten(0, 1), None, None


def over_all(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, world: World
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return weight, bias and (mean, var) with which `split_bn` normalises by the statistics of all ranks.

    The fused kernels take given statistics for constants. Their gradient goes through weight and bias instead, which
    keep their values to the last bit here and depend on mean and variance as the result does. The fourth is the number
    of rows in each group, over all ranks, [1].

    x: float [G*B, C, H, W]. weight, bias: [G, C]. Ranks may have different B.
    """
    mean, var, rows = _OfAll.apply(x, weight.shape[0], world)
    fixed = mean.detach(), var.detach()
    rstd = (var + eps).rsqrt()
    bias = bias - weight * rstd.detach() * (mean - fixed[0])
    return weight * (rstd / rstd.detach()), bias, fixed, rows
