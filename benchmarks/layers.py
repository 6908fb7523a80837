"""cuDNN's convolution with bias, residual add and ReLU in one call, tried layer by layer: is it there, right, faster?

A network's layers need not agree, and the answers hang on whether cuDNN may compile when it runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastarat.bench.harness import Clock, first_line, synchronize

RTC = "TORCH_CUDNN_V8_API_RTC_ENABLED"
"""Lets cuDNN compile fused convolutions when it runs; PyTorch reads it once in a process."""
LARGEST = 0.02
"""Accepted relative difference from float64: bf16 keeps three digits."""


class Layer(NamedTuple):
    """A 3x3 convolution, padded by one. inputs, outputs: channels. side: pixels before it. add: a residual is added."""

    inputs: int
    outputs: int
    side: int
    stride: int
    add: bool


LAYERS = (
    Layer(64, 64, 32, 1, False),
    Layer(64, 64, 32, 1, True),
    Layer(3, 64, 32, 1, False),
    Layer(64, 128, 32, 2, False),
    Layer(128, 128, 16, 1, False),
    Layer(128, 128, 16, 1, True),
    Layer(128, 256, 16, 2, False),
    Layer(256, 256, 8, 1, False),
    Layer(256, 256, 8, 1, True),
    Layer(256, 512, 8, 2, False),
    Layer(512, 512, 4, 1, False),
    Layer(512, 512, 4, 1, True),
)
"""Every one that a ResNet-18 on 32x32 images has once its BatchNorm is folded; the first is the commonest."""

Fused = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]


def cudnn_fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int) -> Tensor:
    """relu(conv2d(x, weight) + bias [+ residual]) as one call of cuDNN."""
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, (stride, stride), (1, 1), (1, 1), 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, (stride, stride), (1, 1), (1, 1), 1)


def apart(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int) -> Tensor:
    """The same as calls of their own."""
    y = F.conv2d(x, weight, bias, stride, 1)
    return torch.relu(y if residual is None else y + residual)


def drawn(
    layer: Layer, batch_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """Draw what the calls above take: channels-last images and weights of `layer`, in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        t = (scale * torch.randn(shape, device=device, generator=generator)).to(dtype)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    after = layer.side // layer.stride
    x = draw(batch_size, layer.inputs, layer.side, layer.side)
    weight = draw(layer.outputs, layer.inputs, 3, 3, scale=(9 * layer.inputs) ** -0.5)
    residual = draw(batch_size, layer.outputs, after, after) if layer.add else None
    return x, weight, draw(layer.outputs), residual, layer.stride


def tried(
    layer: Layer, batch_size: int, dtype: torch.dtype, device: torch.device, fused: Fused = cudnn_fused
) -> dict[str, Any]:
    """Ask for one layer: {its fields, "first_call_s", "error", "fused_ms", "apart_ms"}, and "failed": why it is no use.

    first_call_s: searching for plans, and compiling them. error: relative, against float64.
    """
    found: dict[str, Any] = layer._asdict()
    arguments = drawn(layer, batch_size, dtype, device)
    try:
        wanted = apart(*(t.double() if isinstance(t, Tensor) else t for t in arguments))  # pyright: ignore[reportArgumentType]
        # Without a residual, PyTorch hands cuDNN the output, as yet unwritten, as an addend times 0: let it hold the
        # worst there is.
        poison = torch.full_like(wanted, float("nan"), dtype=dtype)
        del poison
        synchronize(device)
        started = time.perf_counter()
        y = fused(*arguments)
        synchronize(device)
        found["first_call_s"] = time.perf_counter() - started
        found["error"] = ((y.double() - wanted).norm() / wanted.norm()).item()
        if not found["error"] <= LARGEST:
            found["failed"] = f"off by {found['error']:.2g}"
            return found
        clock = Clock(device)
        for name, call in (("fused_ms", fused), ("apart_ms", apart)):
            times = [clock(lambda call=call: call(*arguments), 10) for _ in range(6)]
            found[name] = 1e3 * statistics.median(times[1:])  # the first one loads and searches
    except RuntimeError as error:
        found["failed"] = first_line(error)
    return found
