"""The mathematics of `split_bn` in plain PyTorch: any float dtype, any device, ordinary autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def split_bn_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    running: tuple[Tensor, Tensor] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain twin of the Triton path of `split_bn`, same arguments and results, inputs already checked."""
    stats = running
    # PyTorch's kernels take half-precision images with float32 parameters, and then keep float32 statistics:
    # no upcast copy of the images is needed.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight.dtype != dtype or bias.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    if stats is not None and (stats[0].dtype != dtype or stats[1].dtype != dtype):
        stats = stats[0].to(dtype), stats[1].to(dtype)

    groups = weight.shape[0]
    if groups == 1:
        # squeeze, not unbind or cat: nothing is copied, forward or backward.
        y, mean, var = _normalise(x, weight.squeeze(0), bias.squeeze(0), stats, eps)
        mean, var = mean.unsqueeze(0), var.unsqueeze(0)
    else:
        each = zip(x.chunk(groups), weight.unbind(), bias.unbind(), _per_group(stats, groups), strict=True)
        ys, means, variances = zip(*[_normalise(*group, eps) for group in each], strict=True)
        y = torch.cat(ys)
        mean, var = torch.stack(means), torch.stack(variances)
    # y is ours alone and batch norm's backward reads its input, not its output: in place is safe.
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    return (y, mean, var) if running is None else (y, *running)


def _per_group(stats: tuple[Tensor, Tensor] | None, groups: int) -> list[tuple[Tensor, Tensor] | None]:
    return [None if stats is None else (stats[0][g], stats[1][g]) for g in range(groups)]


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, stats: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One group's y, and the mean and biased variance it was normalised by."""
    if stats is not None:
        mean, var = stats[0].flatten(), stats[1].flatten()
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var
    y, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    # Rounding can carry the variance of a constant channel just below zero.
    return y, mean.detach(), invstd.detach().pow(-2).sub_(eps).clamp_min_(0.0)
