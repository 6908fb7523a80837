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
from fastarat.distributed import World
from fastarat.engine.graphs import PerShape, capture_mode, preserved
from fastarat.engine.guards import check_optimizer, check_terms, count_classes, own_precision, tried, where
from fastarat.engine.meter import Meter
from fastarat.engine.perturb import WeightPerturbation, perturbation
from fastarat.engine.shares import Part, Prepared, Shares, Sums, check_divisible, sync_over, undone
from fastarat.errors import UserError
from fastarat.losses import hard
from fastarat.nets.attacker import HALF, Attacker, frozen, mode_of
from fastarat.nets.batchnorm import branches_of, grouped_batchnorm, route_of, split_batchnorm
from fastarat.nets.models import set_kernels
from fastarat.specs import Attack, BatchNormMode, Fast, checked_backend, known, none_left, spec_of
from fastarat.values import checked_budget, checked_seed, coerce, shown, within

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
        label_smoothing: share of the loss's targets that goes to all classes alike; the attack's are not smoothed.
        seed: of the attack's randomness.
        world: the processes among which each batch is divided; default this one alone. sync_bn: batch statistics are of
            all of them. accumulate: micro-batches, one after another, that a batch is taken in.
    spec: the attack in full. starts_exactly: whether its first step is float32 though the rest is not. why_eager: why
        a step is not captured, "" if it is. mark: called with "start" when a step begins and with each phase as it
        ends ("attack", "forward", "backward", "optimiser", "metrics").
    Call: step(images float32 [B, C, H, W], labels int64 [B] or shares of the classes, float [B, K]) -> dict of detached
        scalar terms on the device, which a captured step overwrites at its next call. Two batch shapes are captured, a
        full and a last one. Every call (on a GPU the first of each shape) looks at the values: images in [0, 1], labels
        within the classes. In several processes: this rank's rows (`World.parts`), and the batch's size as `total`
        where the ranks' differ; the terms are of these rows.
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
        label_smoothing: float = 0.0,
        seed: int = 0,
        world: World | None = None,
        sync_bn: bool = False,
        accumulate: int = 1,
        **options: Any,
    ) -> None:
        _check_objects(model, defense, optimizer)
        asked, fast = _specs(attack, fast, options, example, model)
        self.perturbation, seed = perturbation(awp, awp_warmup), checked_seed(seed)
        world = check_divisible(defense, world, accumulate, compiled=fast.compile_loss and sync_bn)
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
        sync_over(world if sync_bn else None, self.model, self.companions)
        why_hard = defense.why_hard(mixed=True, objective=self.spec.objective)
        self._check = BatchCheck(self.model, self.companions, example.shape[1], self.num_classes, defense, why_hard)
        self.parameters = [p for m in (self.model, self.companions) for p in m.parameters() if p.requires_grad]
        self.optimizer = (optimizer or default_sgd)(self.parameters)
        check_optimizer(self.optimizer, self.parameters)
        self.shares = Shares(world, accumulate, self.device, synced=sync_bn)
        self.generator = self.shares.generator.manual_seed(seed)
        smoothing, mean = _smoothing(defense, label_smoothing), self.shares.batch_mean
        self.forward = Forward(self.model, fast.precision, self.spec, self.generator, smoothing, mean)
        self.starts_exactly = fast.precision in HALF and starts_flat(known(self.spec.objective), known(self.spec.start))
        fold = fast.fold_bn and self.spec.bn == "eval" and defense.attacks
        self.attacker = Attacker(self.model, precision=fast.precision, fold=fold, exact=self.starts_exactly)
        self._pgd = bound(self.spec, count=defense.counts_kappa, backend=kernels)
        # bf16 has float32's range; only fp16 needs its loss scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fast.precision == "fp16")
        self.meter = Meter(self.device, world)
        self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        self.mark: Callable[[str], None] = lambda phase: None
        self.loss = self.eager_loss
        if fast.compile_loss:
            self.loss = torch.compile(self.eager_loss, fullgraph=True, dynamic=False, options=_INDUCTOR)
        why_not = defense.why_eager or ("the fp16 loss scale is read on the host" if fast.precision == "fp16" else "")
        mode, self.why_eager = capture_mode(fast.capture, self.device, self.optimizer, why_not)
        self._run: PerShape | None = None
        if mode is not None:
            self._run = PerShape(self._step, mode, generators=(self.generator,), around=partial(undone, self))
            _keep_lr_on(self.device, self.optimizer)

    def __call__(self, images: Tensor, labels: Tensor, total: int | None = None) -> dict[str, Tensor]:
        self._check(images, labels)
        total = self.shares.divide(len(images), total)
        given = images.to(memory_format=self.memory_format), labels
        with own_precision(self.device):
            return self._step(*given) if self._run is None else self._run(*given, total)

    def _step(self, images: Tensor, labels: Tensor, loss: Callable | None = None) -> dict[str, Tensor]:
        """The step itself, whole: what is captured, and what runs where nothing is."""
        self.mark("start")
        # First, so that the last step's gradients do not take up memory beside this one's activations.
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self._attacked(images, labels, part) for part in self.shares.parts]
        self.mark("attack")
        defense, shares = self.defense, self.shares

        def terms_by(forward: Forward, batch: Prepared) -> tuple[dict[str, Tensor], Views]:
            shares.enter(batch.part)
            views = defense.forward(forward, self.companions, batch.images, batch.labels, batch.attacked)
            terms = (loss or self.loss)(views)
            if not self.meter.started:  # the first terms are told of the rest; no value is read
                check_terms(terms, f"{where(defense)}.loss")
            return terms, views

        if self.perturbation is not None and defense.attacks:
            still = self.forward.but(still=True)
            losses = (lambda b=b: b.part.weigh(total(terms_by(still, b)[0])) for b in batches)
            self.perturbation.push(self.model, self.companions, losses, self.forward.epoch, shares.sum_perturbation)
        sums = Sums()
        for batch in batches:
            sums.close(self.meter)  # of the micro-batch before, whose activations go with it
            terms, views = terms_by(self.forward, batch)
            self.mark("forward")
            defense.backward(terms, self.model, batch.part.weighing(self.scaler.scale), views)
            self.mark("backward")
            sums.take(terms, views, batch)
            del terms, views
        shares.sum_gradients(self.parameters)
        # With the scaler off this is optimizer.step(): one path for all precisions.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.perturbation is not None:
            self.perturbation.pull()
        # On the device: a captured step cannot count in Python.
        self.steps += 1
        defense.after_step(self.companions, self.model, self.steps)
        self.mark("optimiser")
        sums.close(self.meter, last=True)
        self.mark("metrics")
        return sums.terms

    def _attacked(self, images: Tensor, labels: Tensor, part: Part) -> Prepared:
        """The defense's clean images of a part and their adversarial twins; forwards are set for the training one."""
        images, labels = images[part.rows], labels[part.rows]
        self.shares.enter(part)
        self.model.train()
        # Once a step, so that a layer put in place of another between two steps is routed as well.
        self.forward.route, self.attacker.fresh = route_of(self.model), False
        spec, defense = self.spec, self.defense
        # From here on the clean batch is the defense's: AR-AT's released code perturbs it.
        images = defense.inputs(images, epsilon=spec.epsilon, norm=spec.norm, generator=self.generator)
        attacked = self.attack(images, labels) if defense.attacks else None
        self.forward.weights = self.attacker.lend if _stand_still(defense, self.perturbation) else None
        return Prepared(images, labels, attacked, part)

    @contextlib.contextmanager
    def probe(self, images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        """Lend a batch's loss terms, with their graph, as its step will have them; nothing else will have moved.

        Attack and forward are the step's, run eagerly; weight perturbation (`awp`), which comes after, is not in them.
        """
        moved = [b for m in (self.model, self.companions) for b in m.buffers()]
        with preserved(lambda: moved, self.device, [self.generator]):
            self.shares.divide(len(images))
            (part,) = self.shares.parts
            batch = self._attacked(images.to(memory_format=self.memory_format), labels, part)
            views = self.defense.forward(self.forward, self.companions, batch.images, labels, batch.attacked)
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
            return self.defense.attack(self._pgd, forward, images, hard(labels), target, start, run=self.forward)

        # Before the twin is made: it takes over the modes, and the parameters that it shares.
        with mode_of(attacker.model, bn != "eval"), frozen(attacker.model):
            attacker.refresh()
            exact = by(attacker.exact) if self.starts_exactly else None
            return craft(self.spec, by(attacker), images, labels, run=run, exact=exact, generator=self.generator)

    def rehearse(self, num_classes: int, shape: tuple[int, int, int]) -> None:
        """Run one step on random images and undo it, so that a mistake in a defense shows before any training.

        shape: (C, H, W). Raises: UserError naming the defense's file and method, and what was expected of it.
        """
        count = 2 * self.shares.accumulate
        images = torch.rand(count, *shape, device=self.device).to(memory_format=self.memory_format)
        labels = torch.arange(count, device=self.device) % num_classes
        self.shares.divide(count)
        with undone(self):
            # The eager loss: its traceback names a line of the person's file.
            tried(self.defense, lambda: self._step(images, labels, self.eager_loss))

    def at(self, *, epoch: float, progress: float) -> None:
        """Say where the run is, for defenses that change with it: epoch from 1, progress in [0, 1]."""
        self.forward.epoch.fill_(epoch)
        self.forward.progress.fill_(progress)

    def set_momentum(self, momentum: float) -> None:
        """Set SGD's momentum; a captured step does not see it change."""
        _set(self.optimizer, "momentum", momentum)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate; a captured step sees it change."""
        _set(self.optimizer, "lr", lr)

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
        if self._run is not None:
            _keep_lr_on(self.device, self.optimizer)
            self._run.clear()  # loading replaced the optimiser's tensors


def _laid_out(module: _Module, kernels: str, memory_format: torch.memory_format) -> _Module:
    set_kernels(module, kernels)
    # torch's stubs of Module.to forget memory_format.
    return module.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]


def _set(optimizer: torch.optim.Optimizer, name: str, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group[name], Tensor):
            group[name].fill_(value)
        else:
            group[name] = value


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


def _smoothing(defense: Defense, given: float) -> float:
    about = "a share of the targets, such as 0.1"
    smoothing = within("label_smoothing", coerce(given, float, "label_smoothing"), "[0, 1)", about)
    if smoothing and (why := defense.why_hard(mixed=False)):
        raise UserError(f"label_smoothing={smoothing:g}: {why}; leave it out, or choose another defense")
    return smoothing


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
    if "_original_forward" in vars(model):  # what accelerate keeps of a forward that it wraps
        raise UserError(
            "model was prepared by accelerate with mixed precision, whose autocast overrides the step's: give the step "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False), and its own precision='bf16'"
        )
    parameters = list(model.parameters())
    if not parameters:
        raise UserError(f"model is a {type(model).__name__} without parameters: expected a network to train")
    if not any(p.requires_grad for p in parameters):
        raise UserError(
            "no parameter of the model requires a gradient, so nothing would be trained; write "
            "model.requires_grad_(True)"
        )
    _check_start(model, defense)


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


def _specs(
    attack: Attack | None, fast: Fast | None, options: dict[str, Any], example: Tensor, model: nn.Module
) -> tuple[Attack, Fast]:
    """Return both specs, the attack's budget checked against the images; `options` are fields of either."""
    for old, new in (("attack_bn", "bn"), ("fold", "fold_bn")):  # their names before there were specs
        if old in options and new not in options:
            options[new] = options.pop(old)
    specs = spec_of(Attack, attack, options), spec_of(Fast, fast, options)
    none_left(options, "TrainStep", Attack, Fast)
    check_images(example, "example", channels=input_channels(model))
    checked_budget(specs[0].epsilon, specs[0].step_size, specs[0].norm, shape=example.shape[1:])
    return specs
