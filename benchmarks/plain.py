"""What the engine is measured against: AR-AT with the structure of its released code, written anew with PyTorch alone.

Established of the release, and so here: float32 throughout; one `nn.BatchNorm2d` per branch; the attack in train mode
on the adversarial branch, each of its forwards with the feature taps (pooled, though the attack uses none), the
cross-entropy summed and differentiated by the image alone (`torch.autograd.grad`: no weight gradient in the attack);
noise added in place to an alias of the batch, on which the clean branch then trains and the projection is centred; the
clean and the adversarial batch in two forwards, one backward; predictors in the same SGD; the loss read by the host and
tested for NaN at every step.

Assumed, each what PyTorch does unless told otherwise or what costs less: contiguous (NCHW) tensors; SGD's default
implementation; gradients set to None; the loss read once a step, before the backward; no progress bar and no count of
correct answers. The two cross-entropies have weight 1 each, where the release weighs them by a scalar per epoch.

Nothing is slowed on purpose and nothing comes from the engine, so that equal results say something about both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

STRUCTURE = "released structure"
"""What results call this module's AR-AT, in JSON and in tables."""


class DualBatchNorm2d(nn.Module):
    """Two `nn.BatchNorm2d`, one per kind of image."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.clean = nn.BatchNorm2d(planes)
        self.adv = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return self.adv(x) if branch == "adv" else self.clean(x)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus shortcut, ReLU."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = DualBatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = DualBatchNorm2d(planes)
        self.shortcut = nn.ModuleList()
        if stride != 1 or in_planes != planes:
            self.shortcut.extend([nn.Conv2d(in_planes, planes, 1, stride, bias=False), DualBatchNorm2d(planes)])

    def forward(self, x: Tensor, branch: str) -> tuple[Tensor, list[Tensor]]:
        normed1 = self.bn1(self.conv1(x), branch)
        normed2 = self.bn2(self.conv2(F.relu(normed1)), branch)
        residual = x
        if len(self.shortcut):
            residual = self.shortcut[1](self.shortcut[0](x), branch)
        return F.relu(normed2 + residual), [normed1, normed2]


class ResNet(nn.Module):
    """CIFAR ResNet with dual BatchNorm; key names are those of `fastarat.nets.models` up to the branch.

    forward(images float32 [B, C, H, W], branch) -> logits [B, K]; with taps=True also the pooled features [B, d] of the
    last stage's BatchNorm outputs after a ReLU: AR-AT's aligned layers.
    """

    def __init__(
        self, widths: Sequence[int], blocks: int, strides: Sequence[int], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = DualBatchNorm2d(widths[0])
        planes, self.num_stages = widths[0], len(widths)
        for i, (width, stride) in enumerate(zip(widths, strides, strict=True), 1):
            stage = [BasicBlock(planes if b == 0 else width, width, stride if b == 0 else 1) for b in range(blocks)]
            setattr(self, f"layer{i}", nn.ModuleList(stage))
            planes = width
        self.linear = nn.Linear(planes, num_classes)

    def forward(self, images: Tensor, branch: str, taps: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        x = F.relu(self.bn1(self.conv1(images), branch))
        for i in range(1, self.num_stages + 1):
            tapped = []
            for block in getattr(self, f"layer{i}"):
                x, normed = block(x, branch)
                tapped.extend(normed)
        logits = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        if not taps:
            return logits
        return logits, [F.adaptive_avg_pool2d(F.relu(z), 1).flatten(1) for z in tapped]

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the weights and statistics of a fastarat network, split into branches "clean" and "adv" or not."""
        names = {key: shared_key(key) for key in self.state_dict()}
        self.load_state_dict({k: state[n if n in state else n.replace(".clean.", ".")] for k, n in names.items()})


def shared_key(key: str) -> str:
    """Return fastarat's name of one of our state_dict keys: its adversarial branch has no name of its own."""
    return key.replace(".adv.", ".")


def predictor(width: int) -> nn.Sequential:
    """AR-AT's predictor: Linear(d, d/4), BatchNorm, ReLU, Linear(d/4, d)."""
    hidden = max(1, int(0.25 * width))
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


def pgd(
    model: ResNet,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    step_size: float,
    num_steps: int,
    noise: Tensor | None = None,
) -> Tensor:
    """Attack the adversarial branch, in the mode the model is in, from `images + noise`.

    `images` themselves become that sum: the release adds in place to an alias of its caller's batch. `noise` is drawn
    from the default generator unless given.
    """
    adv = images.detach()
    # In place, as in the release: detach() shares memory, so the caller's batch is noisy from here on.
    adv += torch.empty_like(adv).uniform_(-epsilon, epsilon) if noise is None else noise
    for _ in range(num_steps):
        adv.requires_grad_()
        with torch.enable_grad():
            logits, _ = model(adv, "adv", taps=True)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        # By the image alone: a backward() here would make every weight's gradient ten times over.
        grad = torch.autograd.grad(loss, [adv])[0]
        adv = adv.detach() + step_size * torch.sign(grad.detach())
        adv = torch.min(torch.max(adv, images - epsilon), images + epsilon)
        adv = torch.clamp(adv, 0, 1)
    return adv.detach()


class ARATLoop:
    """One AR-AT step after another: noise, PGD, two forwards, loss, SGD.

    Args:
        model, predictors: on one device, contiguous.
        gamma: total weight of the invariance term; the two cross-entropies have weight 1.
    Call: step(images float32 [B, C, H, W] in [0, 1], labels int64 [B]) -> loss. `images` are noisy afterwards: a loader
        hands over a new batch at every step. `noise` and what it is added to: `pgd`. `mark` is told when each phase has
        ended.
    """

    def __init__(
        self,
        model: ResNet,
        predictors: nn.ModuleList,
        *,
        epsilon: float,
        step_size: float,
        num_steps: int,
        gamma: float = 30.0,
    ) -> None:
        self.model, self.predictors = model, predictors
        self.epsilon, self.step_size, self.num_steps, self.gamma = epsilon, step_size, num_steps, gamma
        parameters = [*model.parameters(), *predictors.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.total_loss = 0.0

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        noise: Tensor | None = None,
        mark: Callable[[str], None] = lambda name: None,
    ) -> float:
        self.model.train()
        budget = {"epsilon": self.epsilon, "step_size": self.step_size, "num_steps": self.num_steps}
        self.adversarial = pgd(self.model, images, labels, noise=noise, **budget)
        mark("attack")
        self.optimizer.zero_grad()
        logits_clean, features_clean = self.model(images, "clean", taps=True)
        logits_adv, features_adv = self.model(self.adversarial, "adv", taps=True)
        distances = [
            1 - F.cosine_similarity(h(z_adv), z_clean.detach(), dim=-1).mean()
            for h, z_adv, z_clean in zip(self.predictors, features_adv, features_clean, strict=True)
        ]
        loss = F.cross_entropy(logits_adv, labels) + F.cross_entropy(logits_clean, labels)
        loss = loss + self.gamma * sum(distances) / len(distances)
        value = loss.item()
        if math.isnan(value):
            raise FloatingPointError("the loss is NaN")
        mark("forward")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimiser")
        self.total_loss += value * len(labels)
        mark("metrics")
        return value


class SimpleLoop:
    """AT and TRADES with the structure of released codes, on the adversarial branch alone.

    Both attacks differentiate by the image alone, as TRADES' does; some AT codes make weight gradients as well.
    trades: the attack is in eval mode and recomputes the clean logits at every step; the clean batch goes forward twice
    in the loss. Otherwise AT: everything in `attack_mode`, "train" or "eval".
    """

    def __init__(
        self,
        model: ResNet,
        *,
        trades: bool,
        attack_mode: str,
        epsilon: float,
        step_size: float,
        num_steps: int,
    ) -> None:
        self.model, self.trades, self.attack_mode, self.beta = model, trades, attack_mode, 6.0
        self.epsilon, self.step_size, self.num_steps = epsilon, step_size, num_steps
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.total_loss, self.correct = 0.0, 0

    def logits(self, images: Tensor) -> Tensor:
        return self.model(images, "adv")

    def attack(self, images: Tensor, labels: Tensor, start: Tensor | None = None) -> Tensor:
        self.model.train(self.attack_mode == "train")
        if start is None and self.trades:
            start = images + 0.001 * torch.randn_like(images)
        elif start is None:
            start = torch.clamp(images + torch.empty_like(images).uniform_(-self.epsilon, self.epsilon), 0, 1)
        adv = start.detach()
        for _ in range(self.num_steps):
            adv.requires_grad_()
            with torch.enable_grad():
                if self.trades:
                    log_adv, clean = F.log_softmax(self.logits(adv), 1), F.softmax(self.logits(images), 1)
                    loss = F.kl_div(log_adv, clean, reduction="sum")
                else:
                    loss = F.cross_entropy(self.logits(adv), labels)
            grad = torch.autograd.grad(loss, [adv])[0]
            adv = adv.detach() + self.step_size * torch.sign(grad.detach())
            adv = torch.min(torch.max(adv, images - self.epsilon), images + self.epsilon)
            adv = torch.clamp(adv, 0, 1)
        return adv.detach()

    def __call__(self, images: Tensor, labels: Tensor, start: Tensor | None = None) -> float:
        adv = self.attack(images, labels, start)
        self.model.train()
        self.optimizer.zero_grad()
        if self.trades:
            logits = self.logits(images)
            robust = F.kl_div(F.log_softmax(self.logits(adv), 1), F.softmax(self.logits(images), 1), reduction="sum")
            loss = F.cross_entropy(logits, labels) + self.beta * robust / len(images)
        else:
            logits = self.logits(adv)
            loss = F.cross_entropy(logits, labels)
        if math.isnan(loss.item()):
            raise FloatingPointError("the loss is NaN")
        loss.backward()
        self.optimizer.step()
        self.total_loss += loss.item()
        self.correct += (logits.argmax(1) == labels).sum().item()
        return loss.item()


class Images(torch.utils.data.Dataset):
    """Images as a plain PyTorch data set serves them: one PIL image at a time, cropped, flipped, made a tensor.

    images: uint8 [N, H, W, 3]. labels: int64 [N]. padding: of the random crop; flip: whether to flip half of them.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, padding: int = 0, flip: bool = False) -> None:
        self.images, self.labels, self.padding, self.flip = images, labels, padding, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images[index])
        if self.padding:
            width, height = image.size
            padded = Image.new(image.mode, (width + 2 * self.padding, height + 2 * self.padding))
            padded.paste(image, (self.padding, self.padding))
            left, top = torch.randint(2 * self.padding + 1, (2,)).tolist()
            image = padded.crop((left, top, left + width, top + height))
        if self.flip and torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255), int(self.labels[index])


def batches(loader: torch.utils.data.DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one epoch's batches on `device`."""
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
