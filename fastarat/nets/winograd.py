"""3x3 convolutions on a CPU by Winograd's F(2x2, 3x3): 16 products where the direct sum takes 36.

Every 2x2 patch of the output comes from a 4x4 patch ("tile") of the input: y = A'[(G w G') * (B' x B)]A, where the
products over the 16 places of a tile are 16 matrix products over channels. The input gradient is the same computation
with flipped taps, which in the transformed weights only swaps the first and last row and column; the weight gradient is
its transpose.

Source: Lavin and Gray, CVPR 2016, arXiv 1509.09308.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn

# Below these, oneDNN's direct convolution is about as fast (measured on ResNet-18's layers, one thread).
MIN_CHANNELS = 128
MIN_TILES = 32
# Elements of a batch's tiles, four times those of the images; larger batches go in pieces, to spare memory.
MOST_ELEMENTS = 2**19

_ROWS = [slice(i, i + 4) for i in range(0, 16, 4)]  # of the 4x4 places of a tile


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, with the same weights from the same seed, that takes the Winograd path where it is faster.

    winograd: whether it may. Nothing derived from the weights outlives a forward and its backward, since not every
    update of a weight leaves a trace on it (fused SGD and `.data` do not).
    """

    winograd: bool = True

    def forward(self, x: Tensor) -> Tensor:
        if qualifies(self) and _applies(x, self.weight):
            return conv2d(x, self.weight, self.bias)
        return super().forward(x)


def qualifies(conv: nn.Module) -> bool:
    """Whether this layer may take the Winograd path: a wide 3x3 convolution that keeps the resolution."""
    return (
        isinstance(conv, Conv2d)
        and conv.winograd
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    )


def _applies(x: Tensor, weight: Tensor) -> bool:
    """Whether this input, and whoever is looking at the computation, allow it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and x.numel() >= 4 * MIN_TILES * x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def set_winograd(model: nn.Module, on: bool) -> None:
    """Allow or forbid the Winograd path in every convolution of `model` that knows it."""
    for m in model.modules():
        if isinstance(m, Conv2d):
            m.winograd = on


def _transformed(weight: Tensor) -> list[Tensor]:
    """G w G' of weight [O, I, 3, 3], by its four rows of places: [4, O, I] each."""
    return [_transformed_row(weight, row) for row in range(4)]


def _transformed_row(weight: Tensor, row: int) -> Tensor:
    taps = weight.detach().permute(2, 3, 0, 1)
    if row in (0, 3):
        taps = taps[0 if row == 0 else 2]
    else:
        taps = torch.add(taps[0], taps[2]).add_(taps[1], alpha=1 if row == 1 else -1).mul_(0.5)
    out = taps.new_empty(4, *weight.shape[:2])
    out[0], out[3] = taps[0], taps[2]
    torch.add(taps[0], taps[2], out=out[1])
    torch.sub(out[1], taps[1], out=out[2]).mul_(0.5)
    out[1].add_(taps[1]).mul_(0.5)
    return out


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve with 3x3 taps, stride 1 and padding 1, on a CPU.

    Args:
        x: float32 or float64 [B, I, H, W], H and W even; fastest channels-last.
        weight: [O, I, 3, 3]. bias: [O].
    Returns: [B, O, H, W], channels-last.
    """
    return _Winograd.apply(x, weight, bias)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.shape = x.shape
        # In attacks nobody asks for weight gradients, and x need not be kept. The weight is kept for its layout, for
        # gradients of gradients, and so that autograd notices a write to it. Its transform is made again: kept, those
        # of a ResNet-18 would be the largest thing in memory (70 MB, for 3 % of a step's time).
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = dw = None
        if torch.is_grad_enabled():  # create_graph: PyTorch's own gradients can be differentiated again
            if wants_x:
                dx = torch.nn.grad.conv2d_input(ctx.shape, weight, dy, padding=1)
            if wants_weight:
                dw = torch.nn.grad.conv2d_weight(x, weight.shape, dy, padding=1)
        else:
            if wants_x:
                dx = _convolved(dy, weight, None, flip=True)
            if wants_weight:
                dw = _weight_gradient(x, dy, weight)
        return dx, dw, dy.sum((0, 2, 3)) if wants_bias else None


def _pieces(x: Tensor, weight: Tensor) -> list[slice]:
    """Runs of images whose tiles are few enough to be in memory at once."""
    # Smaller than a row of the transformed weights they need not be.
    most = max(MOST_ELEMENTS, 4 * weight.shape[0] * weight.shape[1])
    size = max(1, most // (4 * max(weight.shape[:2]) * x.shape[2] * x.shape[3]))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool = False) -> Tensor:
    """Convolve x; flip: with the taps of the input gradient, from outputs to inputs."""
    pieces = _pieces(x, weight)
    # One piece alone takes a row of the weights at a time: all four are larger than x and weight.
    rows = _transformed(weight) if len(pieces) > 1 else None
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[3], weight.shape[1 if flip else 0])
    for piece in pieces:
        tiled = _Tiles(x[piece], flip)
        products = x.new_empty(16, tiled.count, y.shape[3])
        for row, places in enumerate(_ROWS):
            part = _transformed_row(weight, row) if rows is None else rows[row]
            torch.bmm(tiled.row(row), part if flip else part.transpose(1, 2), out=products[places])
            del part
        if bias is not None:
            products[5] += bias  # the one place of a tile that enters all four outputs with a plus
        _untile(products, y[piece], flip)
        del products
    return y.permute(0, 3, 1, 2)


class _Tiles:
    """The overlapping 4x4 tiles of x: [B, C, H, W], `count` = B * H/2 * W/2; flip swaps places 0 and 3 of both axes."""

    def __init__(self, x: Tensor, flip: bool = False) -> None:
        self.shape = x.shape[0], x.shape[2] // 2, x.shape[3] // 2, x.shape[1]
        self.count = math.prod(self.shape[:3])
        self.padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        self.order = (3, 1, 2, 0) if flip else (0, 1, 2, 3)

    def row(self, row: int) -> Tensor:
        """One of the four rows of places of B' x B: [4, count, C]."""
        b, h, w, c = self.shape
        mixed = _mixed([self.padded[:, i : i + 2 * h : 2] for i in range(4)], self.order[row], None)
        out = mixed.new_empty(4, b, h, w, c)
        for place, into in zip(self.order, out, strict=True):
            _mixed([mixed[:, :, i : i + 2 * w : 2] for i in range(4)], place, into)
        return out.view(4, self.count, c)


def _mixed(d: list[Tensor], place: int, out: Tensor | None) -> Tensor:
    """One place of B' d."""
    if place == 1:
        return torch.add(d[1], d[2], out=out)
    return torch.sub(*((d[0], d[2]), (), (d[2], d[1]), (d[1], d[3]))[place], out=out)


def _untile(products: Tensor, y: Tensor, flip: bool = False) -> None:
    """Write A' m A of every tile's products, [16, B * H/2 * W/2, C], to y: [B, H, W, C], contiguous."""
    b, h, w, c = y.shape[0], y.shape[1] // 2, y.shape[2] // 2, y.shape[3]
    order = (3, 1, 2, 0) if flip else (0, 1, 2, 3)
    m = products.view(4, 4, b, h, w, c)
    rows = m.new_empty(2, 4, b, h, w, c)
    _output_transform([m[i] for i in order], [rows[0], rows[1]])
    places = y.view(b, h, 2, w, 2, c)
    for i in range(2):
        _output_transform([rows[i, j] for j in order], [places[:, :, i, :, 0], places[:, :, i, :, 1]])


def _output_transform(m: list[Tensor], out: list[Tensor]) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the taps, [O, I, 3, 3] in the weight's layout, of x: [B, I, H, W] and dy: [B, O, H, W]."""
    dw = torch.zeros_like(weight)
    taps = dw.permute(2, 3, 0, 1)
    for piece in _pieces(x, weight):
        of_dy, of_x = dy[piece].permute(0, 2, 3, 1), _Tiles(x[piece])
        for row in range(4):
            m = torch.bmm(_gradient_tiles(of_dy, row).transpose(1, 2), of_x.row(row))
            # G' m G, the transpose of the taps' transform: the row's columns here, in place, its rows below.
            m[1:3].mul_(0.5)
            m[1].add_(m[2])
            m[0].add_(m[1])
            m[3].add_(m[1])
            torch.sub(m[1], m[2], alpha=2, out=m[1])
            columns = m[0], m[1], m[3]
            for column, of_taps in zip(columns, taps.unbind(1), strict=True):
                if row in (0, 3):
                    of_taps[0 if row == 0 else 2].add_(column)
                else:
                    of_taps[0].add_(column, alpha=0.5)
                    of_taps[1].add_(column, alpha=0.5 if row == 1 else -0.5)
                    of_taps[2].add_(column, alpha=0.5)
            del m, columns, column
    return dw


def _gradient_tiles(dy: Tensor, row: int) -> Tensor:
    """One of the four rows of places of A dy A', the transpose of `_untile`: [B, H, W, C] -> [4, B * H/2 * W/2, C]."""
    b, h, w, c = dy.shape[0], dy.shape[1] // 2, dy.shape[2] // 2, dy.shape[3]
    patches = dy.reshape(b, h, 2, w, 2, c)
    spread = _spread(patches[:, :, 0], patches[:, :, 1], row, None)
    tiles = dy.new_empty(4, b, h, w, c)
    for place, into in enumerate(tiles):
        _spread(spread[..., 0, :], spread[..., 1, :], place, into)
    return tiles.view(4, b * h * w, c)


def _spread(first: Tensor, second: Tensor, place: int, out: Tensor | None) -> Tensor:
    """One place of A (first, second)."""
    if place == 0:
        return first if out is None else out.copy_(first)
    if place == 3:
        return torch.neg(second, out=out)
    return (torch.add if place == 1 else torch.sub)(first, second, out=out)
