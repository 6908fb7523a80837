"""3x3 convolutions on a CPU by Winograd's F(2x2, 3x3): 16 products where the direct sum takes 36.

Every 2x2 patch of the output comes from a 4x4 patch ("tile") of the input: y = A'[(G w G') * (B' x B)]A, where the
products over the 16 places of a tile are 16 matrix products over channels. The input gradient is the same computation
with flipped taps, which in the transformed weights only swaps the first and last row and column; the weight gradient is
its transpose.

Source: Lavin and Gray, CVPR 2016, arXiv 1509.09308.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Below these, oneDNN's direct convolution is about as fast (measured on ResNet-18's layers, one thread).
MIN_CHANNELS = 128
MIN_TILES = 32
# Elements of a batch's tiles, four times those of the images; larger batches go in pieces, to spare memory.
MOST_ELEMENTS = 2**19

# The taps' transform on both axes at once: [16, 9].
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_GG = torch.kron(_G, _G)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, with the same weights from the same seed, that takes the Winograd path where it is faster.

    winograd: whether it may. Nothing derived from the weights outlives a forward and its backward, since not every
    update of a weight leaves a trace on it (fused SGD and `.data` do not); `held` is the one exception.
    """

    winograd: bool = True
    held: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("folded", "held")}

    def forward(self, x: Tensor) -> Tensor:
        if not (qualifies(self) and _applies(x, self.weight)):
            return super().forward(x)
        weight, transform = self.held or (None, None)
        # Another weight than the held one: torch.func.functional_call put it there.
        return conv2d(x, self.weight, self.bias, transform if weight is self.weight else None)


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, transform: Tensor | None) -> Tensor:
    """Convolve as `conv` does, but with these weights.

    Args:
        x: float32 [B, I, H, W]. weight: [O, I, k, k]. bias: [O].
        transform: `transformed(weight)`, [16, O, I], if at hand.
    Returns: [B, O, H', W'].
    """
    if qualifies(conv) and _applies(x, weight):
        return conv2d(x, weight, bias, transform)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


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


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Transform the weights of `model` once for all forwards inside the block, where they must not change."""
    layers = [m for m in model.modules() if qualifies(m) and m.weight.device.type == "cpu"]
    for m in layers:
        m.held = m.weight, transformed(m.weight)
    try:
        yield
    finally:
        for m in layers:
            del m.held


@torch.no_grad()
def transformed(weight: Tensor) -> Tensor:
    """Return G w G', [16, O, I], of weight: [O, I, 3, 3]."""
    taps = weight.detach().permute(2, 3, 0, 1).reshape(9, -1)
    return (_GG.to(taps) @ taps).view(16, *weight.shape[:2])


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, transform: Tensor | None = None) -> Tensor:
    """Convolve with 3x3 taps, stride 1 and padding 1, on a CPU.

    Args:
        x: float32 or float64 [B, I, H, W], H and W even; fastest channels-last.
        weight: [O, I, 3, 3]. bias: [O].
        transform: `transformed(weight)`, [16, O, I], if at hand.
    Returns: [B, O, H, W], channels-last.
    """
    if transform is None:
        transform = transformed(weight)
    size = MOST_ELEMENTS // (4 * max(x.shape[1], weight.shape[0]) * x.shape[2] * x.shape[3])
    pieces = [_Winograd.apply(piece, weight, bias, transform) for piece in x.split(max(1, size))]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, transform: Tensor) -> Tensor:
        products = torch.bmm(_tiles(x), transform.transpose(1, 2))
        if bias is not None:
            products[5] += bias  # the one place of a tile that enters all four outputs with a plus
        return _untile(products, x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, transform = inputs
        ctx.shape = x.shape
        # In attacks nobody asks for weight gradients, and x need not be kept. The weight is kept for its layout, for
        # gradients of gradients, and so that autograd notices a write to it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, transform)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, transform = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx = dw = None
        if torch.is_grad_enabled():  # create_graph: PyTorch's own gradients can be differentiated again
            if wants_x:
                dx = torch.nn.grad.conv2d_input(ctx.shape, weight, dy, padding=1)
            if wants_weight:
                dw = torch.nn.grad.conv2d_weight(x, weight.shape, dy, padding=1)
        else:
            if wants_x:
                dx = _untile(torch.bmm(_tiles(dy, flip=True), transform), ctx.shape, flip=True)
            if wants_weight:
                dw = _weight_gradient(x, dy, weight)
        return dx, dw, dy.sum((0, 2, 3)) if wants_bias else None, None


def _tiles(x: Tensor, flip: bool = False) -> Tensor:
    """B' x B of every overlapping 4x4 tile: [B, C, H, W] -> [16, B * H/2 * W/2, C]; flip swaps places 0 and 3."""
    b, c, h, w = x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    first, last = (3, 0) if flip else (0, 3)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    rows = padded.new_empty(4, b, h, 2 * w + 2, c)
    _input_transform([padded[:, i : i + 2 * h : 2] for i in range(4)], [rows[i] for i in (first, 1, 2, last)])
    tiles = padded.new_empty(4, 4, b, h, w, c)
    columns = [rows[:, :, :, i : i + 2 * w : 2] for i in range(4)]
    _input_transform(columns, [tiles[:, i] for i in (first, 1, 2, last)])
    return tiles.view(16, b * h * w, c)


def _input_transform(d: list[Tensor], out: list[Tensor]) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _untile(products: Tensor, shape: torch.Size, flip: bool = False) -> Tensor:
    """A' m A of every tile's products: [16, B * H/2 * W/2, C] -> channels-last [B, C, H, W]; shape: gives B, H, W."""
    b, h, w, c = shape[0], shape[2] // 2, shape[3] // 2, products.shape[-1]
    order = (3, 1, 2, 0) if flip else (0, 1, 2, 3)
    m = products.view(4, 4, b, h, w, c)
    rows = m.new_empty(2, 4, b, h, w, c)
    _output_transform([m[i] for i in order], [rows[0], rows[1]])
    y = m.new_empty(b, 2 * h, 2 * w, c)
    places = y.view(b, h, 2, w, 2, c)
    for i in range(2):
        _output_transform([rows[i, j] for j in order], [places[:, :, i, :, 0], places[:, :, i, :, 1]])
    return y.permute(0, 3, 1, 2)


def _output_transform(m: list[Tensor], out: list[Tensor]) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _weight_gradient(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the taps, [O, I, 3, 3] in the weight's layout, of x: [B, I, H, W] and dy: [B, O, H, W]."""
    products = torch.bmm(_gradient_tiles(dy).transpose(1, 2), _tiles(x))
    taps = (_GG.to(x).T @ products.view(16, -1)).view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return taps.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _gradient_tiles(dy: Tensor) -> Tensor:
    """A dy A' of every 2x2 patch, the transpose of `_untile`: [B, C, H, W] -> [16, B * H/2 * W/2, C]."""
    b, c, h, w = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
    patches = dy.permute(0, 2, 3, 1).reshape(b, h, 2, w, 2, c)
    rows = dy.new_empty(4, b, h, w, 2, c)
    _spread(patches[:, :, 0], patches[:, :, 1], rows)
    tiles = dy.new_empty(4, 4, b, h, w, c)
    _spread(rows[..., 0, :], rows[..., 1, :], tiles.transpose(0, 1))
    return tiles.view(16, b * h * w, c)


def _spread(first: Tensor, second: Tensor, out: Tensor) -> None:
    out[0] = first
    torch.add(first, second, out=out[1])
    torch.sub(first, second, out=out[2])
    torch.neg(second, out=out[3])
