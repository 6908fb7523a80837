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
    groups = weight.shape[0]
    # PyTorch's CPU and CUDA kernels take half-precision images with float32 parameters, and then keep
    # float32 statistics: no upcast copy of the images is needed.
    stat_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = weight.to(stat_dtype), bias.to(stat_dtype)
    if running is not None:
        means, variances = (r.to(stat_dtype) for r in running)
    # squeeze, not unbind, for the common single group: its backward is a view.
    parts = x.chunk(groups) if groups > 1 else (x,)
    weights, biases = (t.unbind() if groups > 1 else (t.squeeze(0),) for t in (weight, bias))
    outputs, group_means, group_vars = [], [], []
    for g, part in enumerate(parts):
        if running is None:
            y, mean, invstd = torch.native_batch_norm(part, weights[g], biases[g], None, None, True, 0.0, eps)
            group_means.append(mean.detach())
            # Rounding can carry the variance of a constant channel just below zero.
            group_vars.append(invstd.detach().pow(-2).sub_(eps).clamp_(min=0.0))
        else:
            y = torch.native_batch_norm(part, weights[g], biases[g], means[g], variances[g], False, 0.0, eps)[0]
        outputs.append(y)
    y = torch.cat(outputs) if groups > 1 else outputs[0]
    # y is ours alone and batch norm's backward reads its input, not its output: in place is safe.
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    if running is not None:
        return y, *running
    return y, torch.stack(group_means), torch.stack(group_vars)
