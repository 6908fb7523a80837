"""Networks for small images: [0, 1] pixels in, logits out, any normalisation inside.

Key names and layouts are those of the released checkpoints (kuangliu-style ResNets, the WRN of TRADES and AR-AT),
so that weights travel both ways.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastarat.errors import UserError, unknown
from fastarat.kernels import fork
from fastarat.nets.batchnorm import BatchNorm2d, set_backend
from fastarat.nets.convs import FoldedConv, Stem, can_fold, projected
from fastarat.nets.taps import PENULTIMATE, Taps, averaged


def _conv_norm_relu(
    conv: nn.Conv2d,
    bn: BatchNorm2d,
    x: Tensor,
    name: str,
    taps: Taps | None,
    residual: Tensor | None = None,
    through: BatchNorm2d | None = None,
) -> Tensor:
    """Convolution, BN, optional residual add, ReLU; the first two are one where an attacker has folded BN.

    through: a BN that the residual goes through first.
    """
    if isinstance(conv, FoldedConv):
        return conv(x, residual if through is None or residual is None else through(residual), relu=True)
    return _norm_relu(bn, conv(x), name, taps, residual, through)


def _norm_relu(
    bn: BatchNorm2d,
    x: Tensor,
    name: str,
    taps: Taps | None,
    residual: Tensor | None = None,
    through: BatchNorm2d | None = None,
) -> Tensor:
    """BN, optional residual add, ReLU: one fused op unless this layer's BN output itself is tapped."""
    if taps is None or name not in taps.layers:
        return bn(x, residual, relu=True, through=through)
    if residual is None and taps.relu:
        y = bn(x, relu=True)
        taps.record(name, y)  # a second ReLU would change nothing
        return y
    y = bn(x)
    taps.record(name, y)
    if residual is None:
        return F.relu(y)
    return F.relu(y + (residual if through is None else through(residual)))


def _both_uses(x: Tensor, bn: BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A block's input for its main path and its shortcut, whose gradients need not be added up where `bn` may fork."""
    return fork(x) if bn.route.forks else (x, x)


def set_kernels(model: nn.Module, backend: str) -> None:
    """Choose "auto", "triton" or "plain" for every layer of `model` that has a kernel."""
    set_backend(model, backend)
    for m in model.modules():
        if isinstance(m, Stem):
            m.backend = backend


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus shortcut, ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False), BatchNorm2d(planes))

    def projection(self) -> tuple[nn.Conv2d, BatchNorm2d]:
        """The layers of a shortcut that changes the shape; nn.Sequential does not know their types, hence the cast."""
        return cast(tuple[nn.Conv2d, BatchNorm2d], tuple(self.shortcut))

    def forward(self, x: Tensor, name: str, taps: Taps | None) -> Tensor:
        x, side = _both_uses(x, self.bn1)
        out = _conv_norm_relu(self.conv1, self.bn1, x, f"{name}.bn1", taps)
        through = None
        if len(self.shortcut):
            conv, through = self.projection()
            side = projected(conv, side, self.bn1)
            if isinstance(conv, FoldedConv):
                through = None
        return _conv_norm_relu(self.conv2, self.bn2, out, f"{name}.bn2", taps, side, through)


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv; the 1x1 shortcut (no BN) starts from ReLU(bn1(x)), an identity one from raw x."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(in_planes, planes, 1, stride, bias=False))

    def forward(self, x: Tensor, name: str, taps: Taps | None) -> Tensor:
        out, side = _both_uses(_norm_relu(self.bn1, x, f"{name}.bn1", taps), self.bn1)
        residual = projected(cast(nn.Conv2d, self.shortcut[0]), side, self.bn1) if hasattr(self, "shortcut") else x
        out = _conv_norm_relu(self.conv1, self.bn2, out, f"{name}.bn2", taps)
        return self.conv2(out) + residual


class WideBlock(nn.Module):
    """Pre-activation block of WRN; when widths differ ReLU(bn1(x)) feeds both conv1 and the 1x1 shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(in_planes, planes, 1, stride, bias=False) if in_planes != planes else None

    def forward(self, x: Tensor, name: str, taps: Taps | None) -> Tensor:
        out, side = _both_uses(_norm_relu(self.bn1, x, f"{name}.relu1", taps), self.bn1)
        residual = x if self.convShortcut is None else projected(self.convShortcut, side, self.bn1)
        out = _conv_norm_relu(self.conv1, self.bn2, out, f"{name}.relu2", taps)
        return self.conv2(out) + residual


class _Stage(nn.Module):
    """WRN's key names put the blocks of a stage under `layer`."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.Sequential(*blocks)


class Normalize(nn.Module):
    """(x - mean) / std per channel, inside the model so that everything outside stays in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Network(nn.Module):
    """Base of the built-in networks.

    forward(images, taps=None): images float32 [B, C, H, W] in [0, 1] -> logits [B, K].
    `tap_names`: layers AR-AT aligns by default; `invariance_weight`: AR-AT's total gamma for this network.
    """

    tap_names: tuple[str, ...] = (PENULTIMATE,)
    invariance_weight: float = 30.0

    def __init__(self) -> None:
        super().__init__()
        self.normalize: nn.Module | None = None

    def tappable(self) -> list[str]:
        """Names that `Taps` can collect."""
        names = [n for n, m in self.named_modules() if isinstance(m, BatchNorm2d) and "shortcut" not in n]
        return [*(n for n in names if n != "bn1"), PENULTIMATE]

    def foldable(self) -> Iterator[tuple[nn.Conv2d, BatchNorm2d]]:
        """Pairs of a convolution and the BatchNorm that follows it directly and that it can take up."""
        return (pair for pair in self._normed() if can_fold(*pair))

    def _normed(self) -> Iterator[tuple[nn.Conv2d, BatchNorm2d]]:
        for m in self.modules():
            if isinstance(m, BasicBlock):
                yield from ((m.conv1, m.bn1), (m.conv2, m.bn2))
                if len(m.shortcut):
                    yield m.projection()
            elif isinstance(m, (PreActBlock, WideBlock)):
                yield (m.conv1, m.bn2)
            elif isinstance(m, ResNet):
                yield (m.conv1, m.bn1)

    def shortcuts(self) -> Iterator[tuple[nn.Conv2d, nn.Conv2d]]:
        """Pairs of foldable convolutions whose BatchNorm outputs are added: the shortcut's, and the other."""
        able = {conv for conv, _ in self.foldable()}
        for m in self.modules():
            if isinstance(m, BasicBlock) and len(m.shortcut) and able >= {m.projection()[0], m.conv2}:
                yield m.projection()[0], m.conv2

    def adding(self) -> Iterator[nn.Conv2d]:
        """Convolutions to whose BatchNorm's output a residual is added, before a ReLU."""
        return (m.conv2 for m in self.modules() if isinstance(m, BasicBlock))

    def _input(self, images: Tensor) -> Tensor:
        return images if self.normalize is None else self.normalize(images)

    def _logits(self, x: Tensor, classifier: nn.Linear, taps: Taps | None) -> Tensor:
        pooled = averaged(x)
        if taps is not None:
            taps.record(PENULTIMATE, pooled)
        return classifier(pooled)


class ResNet(Network):
    """CIFAR ResNet of basic blocks: 3x3 stem without max-pool, one stage per entry of `widths`.

    ResNet-18: widths 64, 128, 256, 512, two blocks a stage, strides 1, 2, 2, 2; 11,173,962 parameters for 10 classes.
    Source: He et al., CVPR 2016, in the CIFAR form the robustness literature uses. Default PyTorch initialisation.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, strides: Sequence[int], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = Stem(in_channels, widths[0])
        self.bn1 = BatchNorm2d(widths[0])
        planes = widths[0]
        self.num_stages = len(widths)
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True), 1):
            stage = [BasicBlock(planes if b == 0 else width, width, stride if b == 0 else 1) for b in range(blocks)]
            setattr(self, f"layer{i}", nn.Sequential(*stage))
            planes = width
        self.linear = nn.Linear(planes, num_classes)
        self.tap_names = tuple(f"layer{i}.{b}.bn{k}" for b in range(blocks) for k in (1, 2))

    def forward(self, images: Tensor, taps: Taps | None = None) -> Tensor:
        x = _conv_norm_relu(self.conv1, self.bn1, self._input(images), "", taps)
        for i in range(1, self.num_stages + 1):
            for b, block in enumerate(getattr(self, f"layer{i}")):
                x = block(x, f"layer{i}.{b}", taps)
        return self._logits(x, self.linear, taps)


class PreActResNet18(Network):
    """Pre-activation ResNet-18 with a final BN, as in the robust-overfitting and AWP codes; 11,172,170 parameters.

    Source: He et al., ECCV 2016. AR-AT's layers for it are our proposal by analogy (not published).
    """

    tap_names = ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2", "bn")

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = Stem(in_channels, 64)
        planes = 64
        for i, (width, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 1):
            setattr(self, f"layer{i}", nn.Sequential(PreActBlock(planes, width, stride), PreActBlock(width, width, 1)))
            planes = width
        self.bn = BatchNorm2d(planes)
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, images: Tensor, taps: Taps | None = None) -> Tensor:
        x = self.conv1(self._input(images))
        for i in range(1, 5):
            for b, block in enumerate(getattr(self, f"layer{i}")):
                x = block(x, f"layer{i}.{b}", taps)
        return self._logits(_norm_relu(self.bn, x, "bn", taps), self.linear, taps)


class WideResNet(Network):
    """WRN-depth-width for CIFAR (Zagoruyko and Komodakis, BMVC 2016), dropout 0; WRN-34-10: 46,160,474 parameters."""

    def __init__(self, depth: int, widen: int, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise UserError(
                f"WRN-{depth}-{widen}: expected a depth of 6n + 4, such as 28 or 34, and a width of 1 or more"
            )
        # Building is slow, or fills the memory, long before anybody could train it.
        if depth > 400 or widen > 32:
            raise UserError(f"WRN-{depth}-{widen}: expected a depth of at most 400 and a width of at most 32")
        blocks = (depth - 4) // 6
        planes = 16
        self.conv1 = Stem(in_channels, planes)
        for i, (width, stride) in enumerate(((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)), 1):
            stage = [WideBlock(planes if b == 0 else width, width, stride if b == 0 else 1) for b in range(blocks)]
            setattr(self, f"block{i}", _Stage(stage))
            planes = width
        self.bn1 = BatchNorm2d(planes)
        self.fc = nn.Linear(planes, num_classes)
        self.tap_names = (
            *(f"block3.layer.{b}.relu{k}" for k in (1, 2) for b in range(blocks)),
            "avgpool",
        )
        self.invariance_weight = 100.0
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0, math.sqrt(2.0 / (m.kernel_size[0] ** 2 * m.out_channels)))
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    def tappable(self) -> list[str]:
        inner = [n.replace(".bn", ".relu") for n, _ in self.named_modules() if ".bn" in n and n.count(".") == 3]
        return [*inner, "avgpool", PENULTIMATE]

    def forward(self, images: Tensor, taps: Taps | None = None) -> Tensor:
        x = self.conv1(self._input(images))
        for i in range(1, 4):
            for b, block in enumerate(getattr(self, f"block{i}").layer):
                x = block(x, f"block{i}.layer.{b}", taps)
        x = self.bn1(x, relu=True)
        if taps is not None:
            taps.record("avgpool", x)
        return self._logits(x, self.fc, taps)


MODELS = {
    "resnet18": lambda k, c: ResNet((64, 128, 256, 512), 2, (1, 2, 2, 2), k, c),
    # LBGAT's released natural network: stage 2 keeps the resolution, so the same parameters cost 3.2 times the work.
    "resnet18-lbgat": lambda k, c: ResNet((64, 128, 256, 512), 2, (1, 1, 2, 2), k, c),
    "preactresnet18": lambda k, c: PreActResNet18(k, c),
    "wrn-34-10": lambda k, c: WideResNet(34, 10, k, c),
    "resnet-small": lambda k, c: ResNet((16, 32, 64), 1, (1, 2, 2), k, c),
}


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = 32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Build a network by name: one of MODELS, wrn-DEPTH-WIDTH such as wrn-28-10, or timm:NAME.

    Args:
        image_size: H = W of the images; the built-in networks need at least 8, and timm's vision transformers are made
            for it. None: the size that timm's network was published for.
        mean, std: per-channel normalisation put inside the model; None for none.
    Returns: a module mapping float32 [B, C, H, W] in [0, 1] to logits [B, num_classes].
    Raises: UserError for an unknown name, images too small, or timm not importable.
    """
    wide = re.fullmatch(r"wrn-([0-9]{1,9})-([0-9]{1,9})", name)
    if name.startswith("timm:"):
        model = _from_timm(name[5:], num_classes, in_channels, image_size)
    elif name not in MODELS and not wide:
        raise unknown("model", name, [*MODELS, "timm:NAME"])
    elif image_size is not None and image_size < 8:
        raise UserError(f"images of {image_size}x{image_size} are too small for {name}: at least 8x8 is needed")
    elif wide:
        model = WideResNet(int(wide[1]), int(wide[2]), num_classes, in_channels)
    else:
        model = MODELS[name](num_classes, in_channels)
    if mean is None and std is None:
        return model
    if mean is None or std is None:
        raise UserError("normalisation needs both mean and std, or neither")
    normalize = Normalize(mean, std)
    if isinstance(model, Network):
        model.normalize = normalize
        return model
    return nn.Sequential(normalize, model)


def _from_timm(name: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    try:
        import timm
    except Exception as error:  # a timm whose torchvision does not fit torch fails with more than ImportError
        raise UserError(
            f"model timm:{name} needs timm, which does not import here ({error}): pip install 'fastarat[timm]'"
        ) from error
    if name not in timm.list_models():
        raise unknown("timm model", name, timm.list_models())
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_channels}
    # Position embeddings are of one size; a convolutional network takes any, and no such argument.
    if image_size is not None and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = image_size
    try:
        return timm.create_model(name, pretrained=False, **options)
    except Exception as error:  # each network says in its own way which sizes it can be made for
        first = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise UserError(
            f"timm:{name} cannot be made for {num_classes} classes and images of "
            f"{image_size or 'its own'} pixels with {in_channels} channel(s) ({first}): choose another network or size"
        ) from error


@torch.no_grad()
def check_takes(model: nn.Module, name: str, shape: tuple[int, int, int]) -> None:
    """Raise UserError unless the network takes images of `shape`, (C, H, W)."""
    device = next((p.device for p in model.parameters()), None)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()(torch.zeros(2, *shape, device=device))
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a network of anybody's fails in its own way
        first = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise UserError(
            f"{name} does not take images of {shape[1]}x{shape[2]} with {shape[0]} channel(s) ({first}): choose a "
            "network that does, such as resnet18, or resize an image folder with --image-size"
        ) from error
    finally:
        for m, training in modes:
            m.training = training
