"""Batch norm over groups of the batch, fused with the residual add and the ReLU that follow it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import Backend, use_triton
from .fork import take_two, taken
from .split_bn_plain import split_bn_plain

CHANNELS_LAST = torch.channels_last


class SplitBN(NamedTuple):
    """What `split_bn` returns.

    y: like x, [G*B, C, H, W], the normalised images.
    mean: float32 [G, C] (float64 for float64 x), the mean of each group; carries no gradient.
    var: float32 [G, C], likewise, the biased variance.
    """

    y: Tensor
    mean: Tensor
    var: Tensor


def split_bn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    relu: bool = False,
    *,
    running: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> SplitBN:
    """Normalise each of G groups of a batch by its own statistics, then add `residual` and apply ReLU.

        y = relu?((x - mean_g) / sqrt(var_g + eps) * weight_g + bias_g [+ residual])

    Statistics and arithmetic are float32 for half-precision x (float64 for float64). The op is pure: running
    statistics are the caller's to update from the returned mean and var. NaN in x stays NaN through the ReLU.

    x: float [G*B, C, H, W]; rows [g*B, (g+1)*B) are group g. Fastest in channels-last; y has its layout
        (the Triton kernels always answer in channels-last).
    weight, bias: float [G, C], the affine of each group; G is read from here.
    residual: like x, added before the ReLU; None adds nothing.
    relu: whether to clamp the result at zero from below.
    running: (mean [G, C], var [G, C]), used in place of batch statistics and returned unchanged (evaluation).
        None takes the statistics of the batch (training); gradients then flow through them.
    eps: added to the variance.
    backend: "triton", "plain", or "auto": Triton on CUDA where it is supported, plain elsewhere. "cooperative": Triton,
        by batch statistics in one launch and with one read less where the images fit the registers; no GPU has proved
        it yet.

    Returns: SplitBN(y, mean, var).

    Raises: ValueError for shapes that do not fit, an empty batch, or one value per channel in training;
    TypeError for a dtype that is not floating point, or a residual of another dtype.

    Source: Ioffe and Szegedy 2015, algorithm 1; one set of statistics per group as in Xie et al. 2020,
    "Adversarial examples improve image recognition".
    """
    _check(x, weight, bias, residual, running)
    if not use_triton(backend, x, "x"):
        return SplitBN(*split_bn_plain(x, weight, bias, residual, relu, running, eps))
    x, cooperative = x.contiguous(memory_format=CHANNELS_LAST), backend == "cooperative"
    if residual is not None:
        residual = residual.contiguous(memory_format=CHANNELS_LAST)
    # Without a residual the ReLU's mask can be worked out from x, which backward reads anyway.
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, residual)
    )
    keep_bits = relu and differentiated and (residual is not None or (cooperative and running is None))
    if running is None:
        return SplitBN(*_train_op(x, weight, bias, residual, relu, eps, keep_bits, cooperative)[:3])
    return SplitBN(_eval_op(x, weight, bias, *running, residual, relu, eps, keep_bits)[0], *running)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
) -> None:
    named = [("x", x), ("weight", weight), ("bias", bias)]
    if residual is not None:
        named.append(("residual", residual))
    if running is not None:
        named += [("running[0]", running[0]), ("running[1]", running[1])]
    for name, tensor in named:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating point tensor")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}: expected [G*B, C, H, W]")
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}: an empty batch has no statistics; skip the call")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != channels:
        raise ValueError(
            f"weight has shape {list(weight.shape)}: expected [G, {channels}], one row of x's {channels} "
            "channels per group; for one group pass weight.unsqueeze(0)"
        )
    groups = weight.shape[0]
    for name, tensor in named[2:]:
        if name != "residual" and tensor.shape != weight.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected {list(weight.shape)}, as weight")
    if x.shape[0] % groups:
        raise ValueError(f"the batch of {x.shape[0]} images does not divide into {groups} equal groups")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {list(residual.shape)}: expected {list(x.shape)}, as x")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype} and x {x.dtype}: cast one to the other's dtype")
    if running is None and x.numel() == groups * channels:
        raise ValueError(
            f"x has shape {list(x.shape)} in {groups} group(s): one value per channel has no variance; use a "
            "larger batch, or pass running statistics"
        )


# The ops below see channels-last images and checked arguments. Their bodies import the kernels late, so
# that a machine without Triton can import this file; Triton launches on the current device, so they set it.


@torch.library.custom_op("fastarat::split_bn_train", mutates_args=())
def _train_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    keep_bits: bool,
    cooperative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, variance, and a bit per element that the ReLU let pass, where backward is to have them."""
    from . import split_bn_cooperative as together, split_bn_triton as kernels

    plan = together.plan(x, weight.shape[0], together.FORWARD_CHUNK) if cooperative else None
    with torch.cuda.device_of(x):
        if plan is None:
            mean, var = kernels.statistics(x, weight.shape[0])
            y, bits = kernels.apply(x, weight, bias, mean, var, residual, relu, eps, keep_bits)
        else:
            y, mean, var, bits = together.forward(x, weight, bias, residual, relu, eps, keep_bits, plan)
    return y, mean, var, _no_bits(x) if bits is None else bits


@_train_op.register_fake
def _(x, weight, bias, residual, relu, eps, keep_bits, cooperative):
    mean = x.new_empty(weight.shape, dtype=torch.float32)
    return torch.empty_like(x, memory_format=CHANNELS_LAST), mean, torch.empty_like(mean), _fake_bits(x, keep_bits)


@torch.library.custom_op("fastarat::split_bn_eval", mutates_args=())
def _eval_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    keep_bits: bool,
) -> tuple[Tensor, Tensor]:
    from . import split_bn_triton as kernels

    with torch.cuda.device_of(x):
        y, bits = kernels.apply(x, weight, bias, mean, var, residual, relu, eps, keep_bits)
    return y, _no_bits(x) if bits is None else bits


@_eval_op.register_fake
def _(x, weight, bias, mean, var, residual, relu, eps, keep_bits):
    return torch.empty_like(x, memory_format=CHANNELS_LAST), _fake_bits(x, keep_bits)


def _no_bits(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _fake_bits(x: Tensor, keep_bits: bool) -> Tensor:
    if not keep_bits:
        return _no_bits(x)
    return x.new_empty((x.shape[0] * x.shape[2] * x.shape[3], (x.shape[1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("fastarat::split_bn_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    bits: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    relu: bool,
    need_x: bool,
    need_affine: bool,
    need_residual: bool,
    eps: float,
    cooperative: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias, residual); one that is not needed comes back with no elements.

    dy2: more of y's gradient, to be added, of all pixels or of every other one. bits: what the ReLU let pass, or None
    to work it out from x.
    """
    from . import split_bn_cooperative as together, split_bn_triton as kernels

    plan = None
    if cooperative and training and need_x and not (relu and bits is None):
        plan = together.plan(x, weight.shape[0], together.BACKWARD_CHUNK)
    with torch.cuda.device_of(x):
        if plan is None:
            return kernels.backward(
                dy, dy2, x, bits, weight, bias, mean, var, training, relu, need_x, need_affine, need_residual, eps
            )
        found = together.backward(dy, dy2, x, bits if relu else None, weight, mean, var, need_residual, eps, plan)
    needed = need_x, need_affine, need_affine, need_residual
    like = x, weight, bias, x
    dx, dweight, dbias, dresidual = (
        kernels.or_empty(g if wanted else None, t) for g, wanted, t in zip(found, needed, like, strict=True)
    )
    return dx, dweight, dbias, dresidual


@_backward_op.register_fake
def _(dy, dy2, x, bits, weight, bias, mean, var, training, relu, need_x, need_affine, need_residual, eps, cooperative):
    def images(needed):
        return torch.empty_like(x, memory_format=CHANNELS_LAST) if needed else x.new_empty(0)

    def affine(like):
        return torch.empty_like(like, memory_format=torch.contiguous_format) if need_affine else like.new_empty(0)

    return images(need_x), affine(weight), affine(bias), images(need_residual)


def _save(ctx, x, weight, bias, mean, var, bits, relu, eps, training, cooperative=False) -> None:
    ctx.mark_non_differentiable(*([mean, var] if training else []), bits)
    # Nobody differentiates the statistics, and zeros in place of their gradients would be a launch each.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, bits if bits.numel() else None)
    ctx.relu, ctx.eps, ctx.training, ctx.cooperative = relu, eps, training, cooperative
    take_two(ctx)


def _setup_train(ctx, inputs, output) -> None:
    x, weight, bias, _, relu, eps, _, cooperative = inputs
    _, mean, var, bits = output
    _save(ctx, x, weight, bias, mean, var, bits, relu, eps, True, cooperative)


def _setup_eval(ctx, inputs, output) -> None:
    x, weight, bias, mean, var, _, relu, eps, _ = inputs
    _save(ctx, x, weight, bias, mean, var, output[1], relu, eps, False)


def _gradients(ctx, dy, need_x, need_affine, need_residual):
    x, weight, bias, mean, var, bits = ctx.saved_tensors
    dy, dy2 = taken(ctx, dy, x)
    if dy is None:
        return None, None, None, None
    # Without a ReLU the residual's gradient is dy itself, if it is one: nothing to write.
    written_residual = need_residual and (ctx.relu or dy2 is not None)
    dx = dweight = dbias = dresidual = None
    if need_x or need_affine or written_residual:
        dx, dweight, dbias, dresidual = _backward_op(
            dy, dy2, x, bits, weight, bias, mean, var, ctx.training, ctx.relu, need_x, need_affine, written_residual,
            ctx.eps, ctx.cooperative,
        )  # fmt: skip
    if need_residual and not written_residual:
        dresidual = dy
    return (
        dx if need_x else None,
        dweight if need_affine else None,
        dbias if need_affine else None,
        dresidual if need_residual else None,
    )


def _backward_train(ctx, dy, _dmean, _dvar, _dbits):
    need = ctx.needs_input_grad
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, need[0], need[1] or need[2], need[3])
    return dx, dweight, dbias, dresidual, None, None, None, None


def _backward_eval(ctx, dy, _dbits):
    need = ctx.needs_input_grad
    dx, dweight, dbias, dresidual = _gradients(ctx, dy, need[0], need[1] or need[2], need[5])
    return dx, dweight, dbias, None, None, dresidual, None, None, None


_train_op.register_autograd(_backward_train, setup_context=_setup_train)
_eval_op.register_autograd(_backward_eval, setup_context=_setup_eval)
