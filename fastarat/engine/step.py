"""One training step: attack, one forward on [clean; adv], loss, backward, optimiser, metrics. Read `TrainStep._step`.

The step makes no host synchronisation: terms, counts and the NaN watch accumulate on the device and are read by
`TrainStep.meter` when the caller wants them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastarat.ascent import Attacked, bound, craft, starts_flat
from fastarat.checks import BatchCheck, check_images, input_channels
from fastarat.defenses.base import Defense, Forward, Views, total
from fastarat.engine.graphs import PerShape, capture_mode, preserved
from fastarat.engine.guards import check_optimizer, check_terms, count_classes, tried, where
from fastarat.engine.meter import Meter
from fastarat.engine.perturb import WeightPerturbation
from fastarat.errors import UserError
from fastarat.nets.attacker import HALF, Attacker, frozen, mode_of
from fastarat.nets.batchnorm import branches_of, grouped_batchnorm, route_of, split_batchnorm
from fastarat.nets.models import set_kernels
from fastarat.specs import Attack, BatchNormMode, Fast, checked_backend, known, none_left, spec_of
from fastarat.values import checked_budget, checked_seed, coerce, shown, whole, within

# Inductor must not wrap its own CUDA graphs inside ours.
_INDUCTOR: dict[str, Any] = {"triton.cudagraphs": False}
_Module = TypeVar("_Module", bound=nn.Module)
default_sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


class TrainStep:
    """A defense's training step for any network and any loop.

    The model is changed in place: its BatchNorm layers become split (or grouped) ones, its weights channels-last.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K]; on the device the step runs on.
        defense: a `Defense`.
        example: float32 [>=2, C, H, W], shape of the batches; only its shape is read.
        attack: what is attacked; unset fields follow the defense.
        fast: precision, memory format, kernels, capture and the like. The fields of both specs may be given by name
            instead: TrainStep(model, defense, images, epsilon=4 / 255, precision="bf16").
        optimizer: called with the list of parameters (the model's and the companions'); default PyTorch's SGD, fused.
        awp: gamma_w of adversarial weight perturbation (Wu et al., NeurIPS 2020), or None; awp_warmup: epochs without.
        seed: of the attack's randomness.
    spec: the attack in full. starts_exactly: whether its first step is float32 though the rest is not. why_eager: why
        a step is not captured, "" if it is. mark: called with "start" when a step begins and with each phase as it
        ends ("attack", "forward", "backward", "optimiser", "metrics").
    Call: step(images float32 [B, C, H, W], labels int64 [B]) -> dict of detached scalar terms on the device, which a
        captured step overwrites at its next call. Two batch shapes are captured, a full and a last one. Every call (on
        a GPU the first of each shape) looks at the values: images in [0, 1], labels within the classes.
    Raises: UserError for a network without BatchNorm asked to split, an unknown option, a budget or count out of range,
        or a step that cannot be captured though capture="on"; (call) for images or labels that are not so.
    """

    def __init__(
        self,
        model: nn.Module,
        defense: Defense,
        example: Tensor,
        attack: Attack | None = None,
        fast: Fast | None = None,
        *,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        awp: float | None = None,
        awp_warmup: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        _check_objects(model, defense, optimizer)
        _check_start(model, defense)
        asked, fast = _specs(attack, fast, options)
        check_images(example, "example", channels=input_channels(model))
        checked_budget(asked.epsilon, asked.step_size, asked.norm, shape=example.shape[1:])
        if awp is not None:
            awp = within("awp", coerce(awp, float, "awp"), "(0, 1)", "a share of each weight's norm, such as 0.005")
        awp_warmup, seed = whole("awp_warmup", awp_warmup, 0), checked_seed(seed)

        self.defense, self.fast, self.spec = defense, fast, defense.completed(asked)
        self.device = next(model.parameters()).device
        self.memory_format = torch.channels_last if fast.channels_last else torch.contiguous_format
        kernels = checked_backend("kernels", fast.kernels, self.device)
        if defense.splits and not branches_of(model):
            model = split_batchnorm(model)
        self.model = _laid_out(grouped_batchnorm(model), kernels, self.memory_format)
        self.num_classes = count_classes(self.model, example.shape[1:], self.memory_format)
        companions = defense.companions(self.model, torch.rand_like(example[:2], device=self.device))
        self.companions = _laid_out(companions.to(self.device), kernels, self.memory_format).train()
        self._check = BatchCheck(self.model, self.companions, example.shape[1], self.num_classes, defense)
        self.parameters = [p for m in (self.model, self.companions) for p in m.parameters() if p.requires_grad]
        self.optimizer = (optimizer or default_sgd)(self.parameters)
        check_optimizer(self.optimizer, self.parameters)
        # Our own: PyTorch's global one would tie the attack to what else draws from it.
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.forward = Forward(self.model, fast.precision, self.spec, self.generator)
        self.starts_exactly = fast.precision in HALF and starts_flat(known(self.spec.objective), known(self.spec.start))
        fold = fast.fold_bn and self.spec.bn == "eval" and defense.attacks
        self.attacker = Attacker(self.model, precision=fast.precision, fold=fold, exact=self.starts_exactly)
        self._pgd = bound(self.spec, count=defense.counts_kappa, backend=kernels)
        self.perturbation = None if awp is None else WeightPerturbation(awp, awp_warmup)
        # bf16 has float32's range; only fp16 needs its loss scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fast.precision == "fp16")
        self.meter = Meter(self.device)
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.mark: Callable[[str], None] = lambda phase: None
        self.loss = self.eager_loss
        if fast.compile_loss:
            self.loss = torch.compile(self.eager_loss, fullgraph=True, dynamic=False, options=_INDUCTOR)
        why_not = defense.why_eager or ("the fp16 loss scale is read on the host" if fast.precision == "fp16" else "")
        mode, self.why_eager = capture_mode(fast.capture, self.device, self.optimizer, why_not)
        self._run: Callable[[Tensor, Tensor], dict[str, Tensor]] = self._step
        if mode is not None:
            self._run = PerShape(self._step, mode, generators=(self.generator,), around=self._undone)
            _keep_lr_on(self.device, self.optimizer)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self._check(images, labels)
        return self._run(images.to(memory_format=self.memory_format), labels)

    def _step(self, images: Tensor, labels: Tensor, loss: Callable | None = None) -> dict[str, Tensor]:
        """The step itself, whole: what is captured, and what runs where nothing is."""
        self.mark("start")
        # First, so that the last step's gradients do not take up memory beside this one's activations.
        self.optimizer.zero_grad(set_to_none=True)
        images, attacked = self._attacked(images, labels)
        self.mark("attack")
        defense = self.defense

        def terms_by(forward: Forward) -> tuple[dict[str, Tensor], Views]:
            views = defense.forward(forward, self.companions, images, labels, attacked)
            terms = (loss or self.loss)(views)
            if not self.meter.started:  # the first terms are told of the rest; no value is read
                check_terms(terms, f"{where(defense)}.loss")
            return terms, views

        if self.perturbation is not None and attacked is not None:
            still = self.forward.but(still=True)
            self.perturbation.push(self.model, self.companions, lambda: total(terms_by(still)[0]), self.forward.epoch)
        terms, views = terms_by(self.forward)
        self.mark("forward")
        defense.backward(terms, self.model, self.scaler.scale, views)
        self.mark("backward")
        # With the scaler off this is optimizer.step(): one path for all precisions.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.perturbation is not None:
            self.perturbation.pull()
        # On the device: a captured step cannot count in Python.
        self.steps += 1
        defense.after_step(self.companions, self.model, self.steps)
        self.mark("optimiser")
        # The graph's own terms would keep its activations alive until the next step.
        terms = {name: term.detach() for name, term in terms.items()}
        objective = None if attacked is None else attacked.objective
        self.meter.add(terms, views, {} if objective is None else {"the attack's objective": objective})
        self.mark("metrics")
        return terms

    def _attacked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Attacked | None]:
        """The defense's clean batch and its adversarial twin; what forwards need is set for the training one."""
        self.model.train()
        # Once a step, so that a layer put in place of another between two steps is routed as well.
        self.forward.route, self.attacker.fresh = route_of(self.model), False
        spec, defense = self.spec, self.defense
        # From here on the clean batch is the defense's: AR-AT's released code perturbs it.
        images = defense.inputs(images, epsilon=spec.epsilon, norm=spec.norm, generator=self.generator)
        attacked = self.attack(images, labels) if defense.attacks else None
        self.forward.weights = self.attacker.lend if _stand_still(defense, self.perturbation) else None
        return images, attacked

    @contextlib.contextmanager
    def probe(self, images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        """Lend a batch's loss terms, with their graph, as its step will have them; nothing else will have moved.

        Attack and forward are the step's, run eagerly; weight perturbation (`awp`), which comes after, is not in them.
        """
        moved = [b for m in (self.model, self.companions) for b in m.buffers()]
        with preserved(lambda: moved, self.device, [self.generator]):
            batch, attacked = self._attacked(images.to(memory_format=self.memory_format), labels)
            views = self.defense.forward(self.forward, self.companions, batch, labels, attacked)
            yield {name: self.scaler.scale(term) for name, term in self.eager_loss(views).items()}

    def eager_loss(self, views: Views) -> dict[str, Tensor]:
        """The defense's terms; `loss` is this, or its compiled twin."""
        return self.defense.loss(self.defense.heads(self.companions, views))

    def attack(
        self, images: Tensor, labels: Tensor, *, attacker: Attacker | None = None, bn: BatchNormMode | None = None
    ) -> Attacked:
        """Craft adversarial images for `images` (the defense's clean batch, float32 [B, C, H, W]).

        attacker: of another network than the step's. bn: BatchNorm during the attack, default this step's. The model
        is left in the mode it was in.
        """
        attacker, bn = attacker or self.attacker, bn or self.spec.bn
        updates = () if bn == "train-frozen" else None

        def by(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def logits(points: Tensor) -> Tensor:
                with attacker.route.through("adv", updates=updates):
                    return network(points)

            return logits

        def run(forward: Callable, target: Tensor, start: Tensor) -> Attacked:
            return self.defense.attack(self._pgd, forward, images, labels, target, start, run=self.forward)

        # Before the twin is made: it takes over the modes, and the parameters that it shares.
        with mode_of(attacker.model, bn != "eval"), frozen(attacker.model):
            attacker.refresh()
            exact = by(attacker.exact) if self.starts_exactly else None
            return craft(self.spec, by(attacker), images, labels, run=run, exact=exact, generator=self.generator)

    def rehearse(self, num_classes: int, shape: tuple[int, int, int]) -> None:
        """Run one step on two random images and undo it, so that a mistake in a defense shows before any training.

        shape: (C, H, W). Raises: UserError naming the defense's file and method, and what was expected of it.
        """
        images = torch.rand(2, *shape, device=self.device).to(memory_format=self.memory_format)
        labels = torch.arange(2, device=self.device) % num_classes
        with self._undone():
            # The eager loss: its traceback names a line of the person's file.
            tried(self.defense, lambda: self._step(images, labels, self.eager_loss))

    @contextlib.contextmanager
    def _undone(self) -> Iterator[None]:
        """Put every tensor the step changes, and every generator, back in place after the block."""

        def changed() -> list[Tensor]:
            modules = [t for m in (self.model, self.companions) for t in (*m.parameters(), *m.buffers())]
            optimizer = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
            return [*modules, *optimizer, *self.meter.tensors(), self.steps]

        measured = bool(self.meter.tensors())
        try:
            with preserved(changed, self.device, [self.generator]):
                yield
        finally:
            if not measured:
                self.meter.reset()
            self.optimizer.zero_grad(set_to_none=True)

    def at(self, *, epoch: float, progress: float) -> None:
        """Say where the run is, for defenses that change with it: epoch from 1, progress in [0, 1]."""
        self.forward.epoch.fill_(epoch)
        self.forward.progress.fill_(progress)

    def set_momentum(self, momentum: float) -> None:
        """Set SGD's momentum; a captured step does not see it change."""
        for group in self.optimizer.param_groups:
            group["momentum"] = momentum

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; a captured step sees it change."""
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
        """Load what `state_dict` returned; the step is captured anew."""
        for name in ("model", "companions", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        lay_out_state(self.optimizer)
        self.steps.copy_(state["steps"])
        if isinstance(self._run, PerShape):
            _keep_lr_on(self.device, self.optimizer)
            self._run.clear()  # loading replaced the optimiser's tensors


def _laid_out(module: _Module, kernels: str, memory_format: torch.memory_format) -> _Module:
    set_kernels(module, kernels)
    # torch's stubs of Module.to forget memory_format.
    return module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


def _keep_lr_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """A Python number would freeze into the graph."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()


def _stand_still(defense: Defense, perturbation: WeightPerturbation | None) -> bool:
    """Whether no weight moves between the attack and the training forward, which what was cast for the one may serve.

    A person's own forward may write weights (AWP, SAM, noise), through `.data` without a trace.
    """
    return perturbation is None and type(defense).forward.__module__.startswith("fastarat.")


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Give momentum, as loaded, the strides of its weight.

    A checkpoint may come from a run in another memory format, and PyTorch's fused steps go by address: they pair the
    elements of a channels-last weight with the wrong ones of a contiguous buffer, without a word (seen in 2.13).
    """
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _check_objects(model: object, defense: object, optimizer: object) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model={shown(model)}: expected an nn.Module, images [B, C, H, W] in [0, 1] -> logits [B, K]")
    if not isinstance(defense, Defense):
        raise UserError(f"defense={shown(defense)}: expected a Defense, such as fastarat.TRADES()")
    if optimizer is not None and not callable(optimizer):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}: expected a function of the list of parameters, such as "
            "lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)"
        )
    parameters = list(model.parameters())
    if not parameters:
        raise UserError(f"model is a {type(model).__name__} without parameters: expected a network to train")
    if not any(p.requires_grad for p in parameters):
        raise UserError(
            "no parameter of the model requires a gradient, so nothing would be trained; write "
            "model.requires_grad_(True)"
        )


def _check_start(model: nn.Module, defense: Defense) -> None:
    """Raise UserError where the run to start from is not loaded, which `runs.load_start` does and nobody else."""
    named = getattr(defense, defense.starts_from) if defense.starts_from else None
    started = getattr(model, "started_from", None)
    if (named is not None and started != named) or (defense.needs_start and started is None):
        raise UserError(
            f"{defense.name} starts from a standardly trained network, and defense.{defense.starts_from}={named} is "
            "not loaded into this model: write fastarat.runs.load_start(defense, model) first; for a model that is "
            "trained already leave the field out and write model.started_from = 'memory'"
        )


def _specs(attack: Attack | None, fast: Fast | None, options: dict[str, Any]) -> tuple[Attack, Fast]:
    for old, new in (("attack_bn", "bn"), ("fold", "fold_bn")):  # their names before there were specs
        if old in options and new not in options:
            options[new] = options.pop(old)
    specs = spec_of(Attack, attack, options), spec_of(Fast, fast, options)
    none_left(options, "TrainStep", Attack, Fast)
    return specs
