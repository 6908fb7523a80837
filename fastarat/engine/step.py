"""One training step: random start, attack, one forward on [clean; adv], loss, backward, optimiser, metrics.

The step makes no host synchronisation: terms, counts and the NaN watch accumulate on the device and are read by
`TrainStep.read()` when the caller wants them.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastarat import attacks
from fastarat.attacks import HALF, frozen, mode_of
from fastarat.checks import (
    Norm,
    Precision,
    check_classes,
    check_images,
    check_labels,
    check_no_probabilities,
    check_pixels,
    checked_budget,
    checked_seed,
    coerce,
    input_channels,
    logits_of,
    named,
    shown,
    whole,
    within,
)
from fastarat.defenses import Defense, Views
from fastarat.defenses.base import network_dtype
from fastarat.device import check_device, readable, waits
from fastarat.engine.graphs import Captured, capture
from fastarat.errors import UserError
from fastarat.kernels import why_not_fold
from fastarat.nets.batchnorm import branch, branches_of, grouped_batchnorm, split_batchnorm
from fastarat.nets.models import Network, Taps, folded_batchnorm, forward_with_features, set_kernels, unfolded_batchnorm
from fastarat.nets.winograd import held, set_winograd
from fastarat.optim import SGD, lay_out_state

_NEVER = 2**62
# Inductor must not wrap its own CUDA graphs inside ours.
_INDUCTOR = {"triton.cudagraphs": False}
RATES = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
default_sgd = partial(torch.optim.SGD, **RATES, fused=True)


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
        # Low-precision copies of the weights, set while an attack runs; running statistics stay when `still`.
        self.weights: dict[str, Tensor] | None = None
        self.still = False
        device = generator.device
        # Device tensors, so that a captured step sees them move.
        dtype = network_dtype(model)
        self.progress = torch.zeros((), device=device, dtype=dtype)
        self.epoch = torch.ones((), device=device, dtype=dtype)

    def views(self, labels: Tensor, **tensors) -> Views:
        return Views(labels, num_steps=self.num_steps, progress=self.progress, epoch=self.epoch, **tensors)

    def companion(self, module: nn.Module, images: Tensor) -> Tensor:
        with self.autocast(images):
            return module(images)

    def autocast(self, images: Tensor) -> contextlib.AbstractContextManager:
        if self.precision not in HALF:
            return contextlib.nullcontext()
        # Parameters change between steps: a cached cast would make the attack differentiate stale weights.
        return torch.autocast(images.device.type, dtype=HALF[self.precision], cache_enabled=False)

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
        updates = () if self.still else updates
        with mode_of(self.model, training), branch(self.model, *branches, updates=updates), self.autocast(images):
            if self.weights is None:
                logits = forward_with_features(self.model, images, taps)
            else:
                logits = functional_call(self.model, self.weights, (images,))
        return logits, () if taps is None else taps.ordered()


class TrainStep:
    """A defense's training step for any network and any loop.

    ```
    step = fastarat.TrainStep(
        model, fastarat.ARAT(), images, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)
    )
    for images, labels in loader:
        terms = step(images, labels)
    ```

    The model is changed in place: its BatchNorm layers become split (or grouped) ones, its weights channels-last.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K]; on the device the step runs on.
        defense: a `Defense`.
        example: float32 [>=2, C, H, W], shape of the batches; only its shape is read.
        optimizer: called with the list of parameters (the model's and the companions'); default PyTorch's SGD, fused.
            `fastarat.SGD` writes the bf16 or fp16 weights of the next attack in its own pass; weights that are then
            written to through `.data` need its `refresh`.
        epsilon, step_size: pixel units; step_size defaults to epsilon / 4.
        num_steps, num_restarts, norm, attack_bn, start, objective: the attack; None follows the defense.
        precision: "fp32", "tf32", "bf16", "fp16" (with loss scaling).
        channels_last: memory format of weights and images.
        kernels: "auto", "triton", "plain".
        capture: replay the whole step as one CUDA graph: "auto" (on CUDA, when the defense allows it), True, False, or
            "fake" (the same buffers and checks on any device, with a call in place of the replay). Two batch shapes
            are captured, a full and a last one; others run eagerly. `why_eager` says why a step is not captured.
        compile_loss: torch.compile the loss (fullgraph), inside the capture.
        fold: in an eval-mode attack, fold BatchNorm into the convolutions once per step (built-in networks; on a GPU
            only where cuDNN adds bias and ReLU to a convolution itself).
        winograd: on a CPU, Winograd convolutions where they are faster (built-in networks, float32).
        awp: gamma_w of adversarial weight perturbation (Wu et al., NeurIPS 2020), or None; awp_warmup: epochs without.
    careful: whether the attack's first step is float32, and the clean logits of its KL, though the rest of it is not.
    one_pass: whether the optimiser's step also writes the attack's low-precision weights.
    Call: step(images float32 [B, C, H, W], labels int64 [B]) -> dict of detached scalar terms on the device, which a
        captured step overwrites at its next call. Every call (on a GPU the first of each shape) looks at the values:
        images in [0, 1], labels within the classes.
    Raises: UserError for a network without BatchNorm asked to split, an unknown option, a budget or count out of range,
        or a step that cannot be captured though capture=True; (call) for images or labels that are not so.
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
        norm: Norm = "linf",
        attack_bn: str | None = None,
        start: str | None = None,
        objective: str | None = None,
        precision: Precision = "fp32",
        channels_last: bool = True,
        kernels: str = "auto",
        capture: bool | Literal["auto", "fake"] = "auto",
        compile_loss: bool = False,
        fold: bool = True,
        winograd: bool = True,
        awp: float | None = None,
        awp_warmup: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(
                f"model={shown(model)}: expected an nn.Module, images [B, C, H, W] in [0, 1] -> logits [B, K]"
            )
        if not isinstance(defense, Defense):
            raise UserError(f"defense={shown(defense)}: expected a Defense, such as fastarat.TRADES()")
        if optimizer is not None and not callable(optimizer):
            raise UserError(
                f"optimizer is a {type(optimizer).__name__}: expected a function of the list of parameters, such as "
                "lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)"
            )
        check_images(example, "example", channels=input_channels(model))
        shape = example.shape[1:]
        epsilon, step_size, norm = checked_budget(epsilon, step_size, norm, shape=shape)
        num_steps, num_restarts = whole("num_steps", num_steps), whole("num_restarts", num_restarts)
        precision = named("precision", precision, Precision.__args__)
        if not isinstance(capture, bool):
            capture = named("capture", capture, ("auto", "on", "off", "fake"))
            capture = {"on": True, "off": False}.get(capture, capture)
        if awp is not None:
            awp = within("awp", coerce(awp, float, "awp"), "(0, 1)", "a share of each weight's norm, such as 0.005")
        awp_warmup, seed = whole("awp_warmup", awp_warmup, 0), checked_seed(seed)
        channels_last, compile_loss, fold, winograd = (
            coerce(value, bool, key)
            for key, value in {
                "channels_last": channels_last,
                "compile_loss": compile_loss,
                "fold": fold,
                "winograd": winograd,
            }.items()
        )
        self.defense = defense
        own = list(model.parameters())
        if not own:
            raise UserError(f"model is a {type(model).__name__} without parameters: expected a network to train")
        if not any(p.requires_grad for p in own):
            raise UserError(
                "no parameter of the model requires a gradient, so nothing would be trained; write "
                "model.requires_grad_(True)"
            )
        self.device = own[0].device
        kernels = attacks.checked_backend("kernels", kernels, self.device)
        if defense.splits:
            model = model if branches_of(model) else split_batchnorm(model)
        model = grouped_batchnorm(model)
        set_kernels(model, kernels)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(memory_format=self.memory_format)
        self._channels, self._shapes_seen = shape[0], set()
        self.num_classes = self._count_classes(shape)
        self.companions = defense.companions(model, torch.rand_like(example[:2], device=self.device)).to(self.device)
        self.companions = self.companions.to(memory_format=self.memory_format).train()
        set_kernels(self.companions, kernels)
        for module in (self.model, self.companions):
            set_winograd(module, winograd)
        self.parameters = [p for m in (self.model, self.companions) for p in m.parameters() if p.requires_grad]
        self.optimizer = (optimizer or default_sgd)(self.parameters)
        _check_optimizer(self.optimizer, self.parameters)

        self.epsilon = epsilon
        self.norm = norm
        # None follows the defense; its own "none" is a start.
        modes, starts = attacks.BatchNormMode.__args__, attacks.Start.__args__
        self.attack_bn = named("attack_bn", defense.bn_mode(norm) if attack_bn is None else attack_bn, modes)
        self.start = named("start", defense.start_kind(norm) if start is None else start, starts)
        self.objective = attacks.objective_name(defense.objective if objective is None else objective)
        self.careful = precision in HALF and attacks.starts_flat(self.objective, self.start)
        self.num_steps, self.num_restarts = num_steps, num_restarts
        self._pgd = partial(
            attacks.pgd,
            epsilon=epsilon,
            step_size=step_size,
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
        self.awp, self.awp_warmup = awp, awp_warmup
        dtype = HALF.get(precision, torch.float32)
        self.fold = fold and self.attack_bn == "eval" and isinstance(self.model, Network)
        self.fold = self.fold and why_not_fold(self.device, dtype) is None
        self._low: dict[str, Tensor] = {}
        if precision in HALF:
            # Cast once per step instead of once per forward: the attack runs eleven of them on the same weights.
            self._low = {
                name: torch.empty_like(p, dtype=HALF[precision], requires_grad=False)
                for name, p in self.model.named_parameters()
                if p.dim() >= 2
            }
        # Only an optimiser that says so writes the copies; another's weights are cast when the attack begins.
        self.one_pass = bool(self._low) and isinstance(self.optimizer, SGD)
        if self.one_pass:
            own = dict(self.model.named_parameters())
            self.optimizer.keep_copies({own[name]: copy for name, copy in self._low.items()})
        self._seen: list[int] = []
        self._trained = self.model
        convs = {id(conv.weight) for conv, _ in self.model.foldable()} if self.fold else set()
        self._folded = {name for name, p in self.model.named_parameters() if id(p) in convs}
        self._terms, self._terms_checked = self._heads_and_loss, False
        if compile_loss:
            self._terms = torch.compile(self._heads_and_loss, fullgraph=True, dynamic=False, options=_INDUCTOR)
        self._graphs: dict[tuple[int, ...], Captured] = {}
        self._capture, self.why_eager = self._capture_mode(capture, precision)

    def _count_classes(self, shape: tuple[int, int, int]) -> int:
        """K, by one forward in eval mode: a network that does not take such images, or return logits, shows here."""
        cudnn = torch.backends.cudnn
        images = torch.zeros(2, *shape, device=self.device).to(memory_format=self.memory_format)
        autotunes, cudnn.benchmark = cudnn.benchmark, False  # no plan is worth finding for two images
        try:
            with torch.no_grad(), mode_of(self.model, False):
                logits = logits_of(self.model, images, self.model)
                check_no_probabilities(logits)
                return logits.shape[1]
        finally:
            cudnn.benchmark = autotunes

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Raise UserError for a batch that is not what the step takes; a GPU's values are read once per shape."""
        check_images(images, channels=self._channels)
        check_labels(labels, images)
        if images.shape[1] != self._channels:
            raise UserError(f"images have {images.shape[1]} channels, the example had {self._channels}")
        check_device(self.device, images=images, labels=labels)
        if len(images) == 1 and any(isinstance(m, nn.BatchNorm1d) for m in self.companions.modules()):
            raise UserError(
                f"images are a batch of one: BatchNorm in what {type(self.defense).__name__} trains beside the model "
                "needs at least 2 images; leave a last batch of one out, drop_last=True"
            )
        if (waits(images) and images.shape in self._shapes_seen) or not readable(images):
            return
        check_pixels(images)
        check_classes(labels, self.num_classes)
        self._shapes_seen.add(images.shape)

    def rehearse(self, num_classes: int, shape: tuple[int, int, int]) -> None:
        """Run one step on two random images and undo it, so that a mistake in a defense shows before any training.

        shape: (C, H, W). Raises: UserError naming the defense's file and method, and what was expected of it.
        """
        images = torch.rand(2, *shape, device=self.device).to(memory_format=self.memory_format)
        labels = torch.arange(2, device=self.device) % num_classes
        where = _where(self.defense)
        parameters = list(inspect.signature(type(self.defense).loss).parameters)
        if len(parameters) != 2:
            raise UserError(f"{where}.loss takes ({', '.join(parameters)}): expected (self, views)")
        self._terms_checked = False
        # The eager loss: its traceback names a line of the person's file, and compiling for two images serves nothing.
        own, self._terms = self._terms, self._heads_and_loss
        try:
            with self._preserved():
                self._step(images, labels)
        except UserError:
            raise
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _file(self.defense)]
            place = f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else f"{where}"
            first = str(error).strip().split("\n")[0]
            hint = ""
            if self.defense.attacks and not self.defense.needs_clean:
                hint = "; views.logits_clean is None unless the class sets needs_clean = True"
            elif not self.defense.attacks:
                hint = "; views.logits_adv is None because the class sets attacks = False"
            raise UserError(f"{place}: {type(error).__name__}: {first}{hint}") from error
        finally:
            self._terms = own

    def _capture_mode(self, wanted: bool | str, precision: Precision) -> tuple[str | None, str]:
        reason = self.defense.why_eager
        if not reason and precision == "fp16":
            reason = "the fp16 loss scale is read on the host"
        if not reason and wanted != "fake" and self.device.type != "cuda":
            reason = f"{self.device.type} has no CUDA graphs"
        if wanted is False:
            return None, "asked for"
        if reason:
            if wanted is True:
                raise UserError(f"this step cannot be captured: {reason}; write capture='auto' or False")
            return None, reason
        for group in self.optimizer.param_groups:
            if self.device.type == "cuda" and not (group.get("fused") or group.get("capturable")):
                why = "the optimiser reads its learning rate on the host; build it with fused=True or capturable=True"
                if wanted is True:
                    raise UserError(f"this step cannot be captured: {why}")
                return None, why
            if group.get("dampening"):
                return None, "momentum dampening needs a first step of its own"
            # A Python number would freeze into the graph.
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device).clone()
        return "fake" if wanted == "fake" else "cuda", ""

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self._check(images, labels)
        images = images.to(memory_format=self.memory_format)
        shape = tuple(images.shape)
        if self._capture is not None and shape not in self._graphs and len(self._graphs) < 2:
            self._graphs[shape] = self._captured(images, labels)
        self._cast_if_written()
        return self._graphs.get(shape, self._step)(images, labels)

    def _cast_if_written(self) -> None:
        """Cast the weights anew if anything but the optimiser has written to them since it did.

        A replayed graph leaves no trace on the version of a tensor, and neither does a write through `.data`.
        """
        if self.one_pass and self._seen != (versions := [p._version for p in self.optimizer.copies]):
            self.optimizer.refresh()
            self._seen = versions

    def _captured(self, images: Tensor, labels: Tensor) -> Captured:
        """Capture the step for this shape; the warm-up steps that capturing needs leave no trace."""
        pool = next((g.pool for g in self._graphs.values()), None)
        generators = (self.generator,) if self._capture == "cuda" else ()
        with self._preserved():
            try:
                return capture(self._step, (images, labels), mode=self._capture, generators=generators, pool=pool)
            except UserError:
                raise
            except RuntimeError as error:
                first = str(error).strip().split("\n")[0]
                raise UserError(
                    f"this step cannot be captured as a CUDA graph ({first}): pass capture=False"
                ) from error

    @contextlib.contextmanager
    def _preserved(self) -> Iterator[None]:
        """Put every tensor the step changes, and every generator, back in place after the block."""

        def held() -> list[Tensor]:
            modules = [t for m in (self.model, self.companions) for t in (*m.parameters(), *m.buffers())]
            optimizer = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
            return [*modules, *optimizer, *self.meter.tensors(), self.steps]

        before = {id(t): t.detach().clone() for t in held()}
        generators = self.generator.get_state(), torch.get_rng_state()
        measured = self.meter.sums is not None
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        try:
            yield
        finally:
            with torch.no_grad():
                for t in held():
                    # Born during the warm-up: momentum and counters, whose first value is zero.
                    t.copy_(before[id(t)]) if id(t) in before else t.zero_()
                if not measured:
                    self.meter.reset()
            self.generator.set_state(generators[0])
            torch.set_rng_state(generators[1])
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, self.device)
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # First, so that the last step's gradients do not take up memory beside this one's activations.
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        images = self.defense.inputs(images, epsilon=self.epsilon, norm=self.norm, generator=self.generator)
        attacked = self.attack(images, labels) if self.defense.attacks else None
        pushed = [] if self.awp is None or attacked is None else self._push_weights(images, labels, attacked)
        views = self.defense.forward(self.forward, self.companions, images, labels, attacked)
        terms = self._checked_terms(views)
        self.defense.backward(terms, self.model, self.scaler.scale, views)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.one_pass:
            self._seen = [p._version for p in self.optimizer.copies]
        if pushed:
            with torch.no_grad():
                torch._foreach_sub_(*pushed)
        self.steps += 1
        self.defense.after_step(self.companions, self.model, self.steps)
        # Here, inside the graph: weights pulled back, or written by the defense, are not what the optimiser cast.
        self._cast_if_written()
        terms = {name: term.detach() for name, term in terms.items()}
        watched = {}
        if attacked is not None and attacked.objective is not None:
            watched["the attack's objective"] = attacked.objective
        self.meter.add(terms, views, watched)
        return terms

    def _checked_terms(self, views: Views) -> dict[str, Tensor]:
        terms = self._terms(views)
        if not self._terms_checked:  # the first are told of the rest; no value is read
            _check_terms(terms, f"{_where(self.defense)}.loss")
            self._terms_checked = True
        return terms

    def _heads_and_loss(self, views: Views) -> dict[str, Tensor]:
        return self.defense.loss(self.defense.heads(self.companions, views))

    def _push_weights(self, images: Tensor, labels: Tensor, attacked: attacks.Attacked) -> list[list[Tensor]]:
        """Move convolution and classifier weights up the loss by gamma_w of their norm (AWP); return weights, moves.

        No running statistic moves: the released code discards the buffers of its proxy network.
        """
        weights = [p for p in self.model.parameters() if p.dim() >= 2 and p.requires_grad]
        buffers = list(self.companions.buffers())
        kept = [b.clone() for b in buffers]
        self.forward.still = True
        try:
            views = self.defense.forward(self.forward, self.companions, images, labels, attacked)
            grads = torch.autograd.grad(sum(self._checked_terms(views).values()), weights)
        finally:
            self.forward.still = False
        with torch.no_grad():
            if buffers:
                torch._foreach_copy_(buffers, kept)
            on = (self.forward.epoch > self.awp_warmup).to(self.forward.epoch) * self.awp
            moves = [on * p.norm() / (g.norm() + 1e-20) * g for p, g in zip(weights, grads, strict=True)]
            torch._foreach_add_(weights, moves)
        return [weights, moves]

    def attack(self, images: Tensor, labels: Tensor, mode: str | None = None) -> attacks.Attacked:
        """Craft adversarial images for `images` (the defense's clean batch, float32 [B, C, H, W]).

        mode: BN during the attack, default this step's. The model is left in the mode it was in.
        """
        mode = mode or self.attack_bn
        updates = () if mode == "train-frozen" else None

        def logits(points: Tensor) -> Tensor:
            return self.forward(points, "adv", updates=updates, training=mode != "eval")[0]

        def exact(points: Tensor) -> Tensor:
            with self._in_float32():
                return logits(points)

        self._cast_if_written()
        with mode_of(self.model, mode != "eval"), frozen(self.model), self._attack_weights(mode):
            first = exact if self.careful else logits
            target = labels
            if self.objective == "kl":
                with torch.no_grad():
                    target = first(images)
            runs = [partial(self._one_attack, first, logits, images, labels, target) for _ in range(self.num_restarts)]
            if len(runs) == 1:
                return runs[0]()
            return attacks.strongest(logits, runs, target, self.objective)

    @contextlib.contextmanager
    def _attack_weights(self, mode: str) -> Iterator[None]:
        """Weights as the attack reads them: cast or transformed once, and in eval mode with BatchNorm folded in."""
        dtype = HALF.get(self.forward.precision)
        with contextlib.ExitStack() as stack:
            low = self._low
            if mode == "eval" and self.fold:
                stack.enter_context(folded_batchnorm(self.model, dtype))
                low = {name: t for name, t in low.items() if name not in self._folded}
            if not low:
                stack.enter_context(held(self.model))
            else:
                # The optimiser has written the copies, unless another network stands in for its own (an average).
                if not (self.one_pass and self.model is self._trained):
                    own = dict(self.model.named_parameters())
                    with torch.no_grad():
                        torch._foreach_copy_(list(low.values()), [own[name] for name in low])
                    self._seen = []
                self.forward.weights = low
                stack.callback(setattr, self.forward, "weights", None)
            yield

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Take the weights as they are, without autocast (on a GPU in TF32 still, where that is allowed)."""
        held = self.forward.precision, self.forward.weights
        self.forward.precision, self.forward.weights = "fp32", None
        try:
            with unfolded_batchnorm(self.model):
                yield
        finally:
            self.forward.precision, self.forward.weights = held

    def _one_attack(self, first, logits, images: Tensor, labels: Tensor, target: Tensor) -> attacks.Attacked:
        start = attacks.random_start(
            images, epsilon=self.epsilon, kind=self.start, norm=self.norm, generator=self.generator
        )
        forward = logits if first is logits else attacks.first_then(first, logits)
        return self.defense.attack(self._pgd, forward, images, labels, target, start, run=self.forward)

    def at(self, *, epoch: float, progress: float) -> None:
        """Say where the run is, for defenses that change with it: epoch from 1, progress in [0, 1]."""
        self.forward.epoch.fill_(epoch)
        self.forward.progress.fill_(progress)

    def set_momentum(self, momentum: float) -> None:
        """Set SGD's momentum; a captured step does not see it change."""
        for group in self.optimizer.param_groups:
            group["momentum"] = momentum

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
        lay_out_state(self.optimizer)
        self.scaler.load_state_dict(state["scaler"])
        self.steps.copy_(state["steps"])
        for group in self.optimizer.param_groups:
            if self._capture is not None:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device).clone()
        # Loading replaced the optimiser's tensors, which the graphs hold by address.
        self._graphs.clear()


def _file(defense: Defense) -> str:
    return getattr(sys.modules.get(type(defense).__module__), "__file__", None) or type(defense).__module__


def _where(defense: Defense) -> str:
    return f"{_file(defense)}: {type(defense).__qualname__}"


def _check_optimizer(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or not hasattr(optimizer, "step"):
        raise UserError(
            f"the optimizer function returned {shown(optimizer)}: expected an optimizer, such as "
            "torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)"
        )
    held, wanted = {id(p) for g in groups for p in g["params"]}, {id(p) for p in parameters}
    if missing := len(wanted - held):
        raise UserError(
            f"the optimizer leaves out {missing} of the {len(wanted)} parameters its function was given, which would "
            "never be trained: build it of that list (model.parameters() from before BatchNorm was split lack the "
            "second set and the defense's own); a parameter that shall stay gets requires_grad_(False) before"
        )


def _check_terms(terms: object, where: str) -> None:
    if not isinstance(terms, dict) or not terms:
        raise UserError(
            f"{where} returned {type(terms).__name__}: expected a dict of named scalar terms, {{'ce': loss}}"
        )
    for name, term in terms.items():
        if not isinstance(term, Tensor):
            raise UserError(f"{where}: term {name!r} is a {type(term).__name__}: expected a scalar tensor")
        if term.dim():
            raise UserError(
                f"{where}: term {name!r} has shape {list(term.shape)}: expected a scalar; reduce it, .mean()"
            )
    if not any(term.requires_grad for term in terms.values()):
        raise UserError(
            f"{where}: no term has a gradient, so nothing would be learnt: compute it from views.logits_adv or "
            "views.logits_clean, without detach or .item()"
        )


class Meter:
    """Sums of terms and correct predictions on the device, and the first step at which a term was not finite.

    What is watched beside the terms is not summed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = []
        self.watched: list[str] = []
        self.sums: Tensor | None = None
        self.first_bad: Tensor | None = None
        self.steps: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [] if self.sums is None else [self.sums, self.first_bad, self.steps]

    def reset(self) -> None:
        """Forget everything, in place: a captured step goes on writing to the same tensors."""
        if self.sums is not None:
            self.sums.zero_()
            self.steps.zero_()
            self.first_bad.fill_(_NEVER)

    def add(self, terms: dict[str, Tensor], views: Views, watched: dict[str, Tensor]) -> None:
        values = {**terms}
        size = views.labels.shape[0]
        for key, logits in (("clean_acc", views.logits_clean), ("robust_acc", views.logits_adv)):
            if logits is not None:
                values[key] = (logits.detach().argmax(1) == views.labels).float().mean()
        row = torch.stack([v.float() for v in (*values.values(), *watched.values())])
        if self.sums is None:
            self.names, self.num_terms, self.watched = list(values), len(terms), list(watched)
            self.sums = torch.zeros(len(values) + 1, dtype=torch.float64, device=self.device)
            self.first_bad = torch.full((len(row),), _NEVER, dtype=torch.int64, device=self.device)
            self.steps = torch.zeros((), dtype=torch.int64, device=self.device)
        bad = torch.where(torch.isfinite(row), _NEVER, self.steps)
        torch.minimum(self.first_bad, bad, out=self.first_bad)
        self.sums[:-1] += torch.nan_to_num(row[: len(values)]).double() * size
        self.sums[-1] += size
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means per image since the last reset, with `loss` the sum of the terms; one host read."""
        values = [0.0] if self.sums is None else self.sums.tolist()
        if not values[-1]:
            return {}
        means = {name: value / values[-1] for name, value in zip(self.names, values[:-1], strict=True)}
        return {"loss": sum(list(means.values())[: self.num_terms]), **means}

    def bad(self) -> tuple[int, str] | None:
        """Step (from 0, since the last reset) and name of the first term that was not finite, or None."""
        if self.first_bad is None:
            return None
        steps = dict(zip((*self.names, *self.watched), self.first_bad.tolist(), strict=True))
        looked_at = (*self.watched, *self.names[: self.num_terms])  # what went wrong first in the step comes first
        name = min(looked_at, key=steps.get)
        return None if steps[name] == _NEVER else (steps[name], name)
