"""One training step: random start, attack, one forward on [clean; adv], loss, backward, optimiser, metrics.

The step makes no host synchronisation: terms, counts and the NaN watch accumulate on the device and are read by
`TrainStep.read()` when the caller wants them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastarat import attacks
from fastarat.batchnorm import branch, branches_of, grouped_batchnorm, set_backend, split_batchnorm
from fastarat.defenses import Defense, Views
from fastarat.errors import UserError
from fastarat.kernels import interpreting, why_not_triton
from fastarat.models import Taps, forward_with_features

Precision = str
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Take gradients away from the parameters inside the block: an attack needs input gradients only."""
    moving = [p for p in model.parameters() if p.requires_grad]
    for p in moving:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in moving:
            p.requires_grad_(True)


@contextlib.contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Put `model` into train or eval mode inside the block."""
    before = model.training
    if before != training:
        model.train(training)
    try:
        yield
    finally:
        if before != training:
            model.train(before)


class Forward:
    """The engine's forward, handed to defenses: chooses BN branch and precision and collects features.

    forward(images, "adv") -> (logits [B, K], ()); forward(torch.cat([clean, adv]), "clean", "adv", layers=...)
    -> (logits [2B, K], one feature tensor [2B, d] per layer).
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        *,
        num_steps: int,
        epsilon: float,
        generator: torch.Generator,
        memory_format: torch.memory_format,
    ) -> None:
        self.model, self.precision = model, precision
        self.num_steps, self.epsilon, self.generator = num_steps, epsilon, generator
        self.memory_format = memory_format
        device = generator.device
        # Device tensors, so that a captured step sees them move.
        self.progress, self.epoch = torch.zeros((), device=device), torch.ones((), device=device)

    def views(self, labels: Tensor, **tensors) -> Views:
        return Views(labels, num_steps=self.num_steps, progress=self.progress, epoch=self.epoch, **tensors)

    def companion(self, module: nn.Module, images: Tensor) -> Tensor:
        with self.autocast(images):
            return module(images)

    def autocast(self, images: Tensor) -> contextlib.AbstractContextManager:
        if self.precision not in _DTYPES:
            return contextlib.nullcontext()
        # Parameters change between steps: a cached cast would make the attack differentiate stale weights.
        return torch.autocast(images.device.type, dtype=_DTYPES[self.precision], cache_enabled=False)

    def __call__(
        self,
        images: Tensor,
        *branches: str,
        layers: Iterable[str] = (),
        relu: bool = True,
        pool: bool = True,
        updates: tuple[str, ...] | None = None,
        training: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        taps = Taps(tuple(layers), relu, pool) if layers else None
        with mode_of(self.model, training), branch(self.model, *branches, updates=updates), self.autocast(images):
            logits = forward_with_features(self.model, images, taps)
        return logits, () if taps is None else taps.ordered()


class TrainStep:
    """A defense's training step for any network and any loop.

    ```
    step = fastarat.TrainStep(model, fastarat.ARAT(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    for images, labels in loader:
        terms = step(images, labels)
    ```

    The model is changed in place: its BatchNorm layers become split (or grouped) ones, its weights channels-last.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K]; on the device the step runs on.
        defense: a `Defense`.
        example: float32 [>=2, C, H, W], shape of the batches; only its shape is read.
        optimizer: called with the list of parameters (the model's and the companions'); default SGD as the
            defense's recipe.
        epsilon, step_size: pixel units; step_size defaults to epsilon / 4.
        num_steps, num_restarts, norm, attack_bn, start, objective: the attack; None follows the defense.
        precision: "fp32", "tf32", "bf16", "fp16" (with loss scaling).
        channels_last: memory format of weights and images.
        kernels: "auto", "triton", "plain".
    Call: step(images float32 [B, C, H, W], labels int64 [B]) -> dict of detached scalar terms on the device.
    Raises: UserError for a network without BatchNorm asked to split, or an unknown option.
    """

    def __init__(
        self,
        model: nn.Module,
        defense: Defense,
        example: Tensor,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        epsilon: float = 8 / 255,
        step_size: float | None = None,
        num_steps: int = 10,
        num_restarts: int = 1,
        norm: attacks.Norm = "linf",
        attack_bn: str | None = None,
        start: str | None = None,
        objective: str | None = None,
        precision: Precision = "fp32",
        channels_last: bool = True,
        kernels: str = "auto",
        seed: int = 0,
    ) -> None:
        self.defense = defense
        self.device = next(model.parameters()).device
        reason = why_not_triton(self.device)
        if kernels == "triton" and reason is not None and not interpreting():
            raise UserError(f"kernels=triton cannot be had here: {reason}; write kernels=auto")
        if defense.splits:
            model = model if branches_of(model) else split_batchnorm(model)
        model = grouped_batchnorm(model)
        set_backend(model, kernels)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self.companions = defense.companions(model, torch.rand_like(example[:2], device=self.device)).to(self.device)
        self.companions = self.companions.to(memory_format=self.memory_format).train()
        self.parameters = [p for m in (self.model, self.companions) for p in m.parameters() if p.requires_grad]
        self.optimizer = (optimizer or partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4))(
            self.parameters
        )

        self.epsilon = epsilon
        self.norm = norm
        self.attack_bn = attack_bn or defense.bn_mode(norm)
        if self.attack_bn not in ("eval", "train", "train-frozen"):
            raise UserError(f"attack BN mode {self.attack_bn!r}: expected eval, train or train-frozen")
        self.start = start or defense.start_kind(norm)
        self.objective = objective or defense.objective
        attacks.objective_of(self.objective)
        self.num_steps, self.num_restarts = num_steps, num_restarts
        self._pgd = partial(
            attacks.pgd,
            epsilon=epsilon,
            step_size=epsilon / 4 if step_size is None else step_size,
            num_steps=num_steps,
            objective=self.objective,
            norm=norm,
            count=defense.counts_kappa,
            backend=kernels,
        )
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.forward = Forward(
            self.model,
            precision,
            num_steps=num_steps,
            epsilon=epsilon,
            generator=self.generator,
            memory_format=self.memory_format,
        )
        # bf16 has float32's range; only fp16 needs its loss scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.meter = Meter(self.device)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.model.train()
        images = images.to(memory_format=self.memory_format)
        images = self.defense.inputs(images, epsilon=self.epsilon, norm=self.norm, generator=self.generator)
        attacked = self.attack(images, labels) if self.defense.attacks else None
        views = self.defense.forward(self.forward, self.companions, images, labels, attacked)
        terms = self.defense.loss(views)
        self.optimizer.zero_grad(set_to_none=True)
        self.defense.backward(terms, self.model, self.scaler.scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps += 1
        self.defense.after_step(self.companions, self.model, self.steps)
        terms = {name: term.detach() for name, term in terms.items()}
        self.meter.add(terms, views)
        return terms

    def attack(self, images: Tensor, labels: Tensor, mode: str | None = None) -> attacks.Attacked:
        """Craft adversarial images for `images` (the defense's clean batch, float32 [B, C, H, W]).

        mode: BN during the attack, default this step's. The model is left in the mode it was in.
        """
        mode = mode or self.attack_bn
        updates = () if mode == "train-frozen" else None

        def logits(points: Tensor) -> Tensor:
            return self.forward(points, "adv", updates=updates, training=mode != "eval")[0]

        with mode_of(self.model, mode != "eval"), frozen(self.model):
            target = labels
            if self.objective == "kl":
                with torch.no_grad():
                    target = logits(images)
            runs = [partial(self._one_attack, logits, images, labels, target) for _ in range(self.num_restarts)]
            if len(runs) == 1:
                return runs[0]()
            return attacks.strongest(logits, runs, target, self.objective)

    def _one_attack(self, logits, images: Tensor, labels: Tensor, target: Tensor) -> attacks.Attacked:
        start = attacks.random_start(
            images, epsilon=self.epsilon, kind=self.start, norm=self.norm, generator=self.generator
        )
        return self.defense.attack(self._pgd, logits, images, labels, target, start)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "companions": self.companions.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "steps": self.steps.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.companions.load_state_dict(state["companions"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.steps.copy_(state["steps"])


class Meter:
    """Sums of terms and correct predictions on the device, and the first step at which a term was not finite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.reset()

    def reset(self) -> None:
        self.sums: Tensor | None = None
        self.first_bad: Tensor | None = None

    def add(self, terms: dict[str, Tensor], views: Views) -> None:
        values = {**terms}
        size = views.labels.shape[0]
        for key, logits in (("clean_acc", views.logits_clean), ("robust_acc", views.logits_adv)):
            if logits is not None:
                values[key] = (logits.detach().argmax(1) == views.labels).float().mean()
        row = torch.stack([v.float() for v in values.values()])
        if self.sums is None:
            self.names, self.num_terms = list(values), len(terms)
            self.sums = torch.zeros(len(values) + 1, dtype=torch.float64, device=self.device)
            self.first_bad = torch.full((len(values),), 2**62, dtype=torch.int64, device=self.device)
            self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        bad = torch.where(torch.isfinite(row), 2**62, self.steps)
        self.first_bad = torch.minimum(self.first_bad, bad)
        self.sums[:-1] += torch.nan_to_num(row).double() * size
        self.sums[-1] += size
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means per image since the last reset, with `loss` the sum of the terms; one host read."""
        if self.sums is None:
            return {}
        values = self.sums.tolist()
        means = {name: value / values[-1] for name, value in zip(self.names, values[:-1], strict=True)}
        return {"loss": sum(list(means.values())[: self.num_terms]), **means}

    def bad(self) -> tuple[int, str] | None:
        """Step (from 0, since the last reset) and name of the first term that was not finite, or None."""
        if self.first_bad is None:
            return None
        steps = self.first_bad.tolist()[: self.num_terms]
        first = min(steps)
        return None if first == 2**62 else (first, self.names[steps.index(first)])
