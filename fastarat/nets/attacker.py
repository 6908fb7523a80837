"""The network as an attack sees it: the model's BatchNorm modules, and weights made for the attack once per step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fastarat.kernels import Norm, fold_batchnorm, kind_of, why_not_conv_bias_relu, why_not_fold
from fastarat.nets.batchnorm import route_of
from fastarat.nets.convs import FoldedConv, Stem
from fastarat.nets.models import Network
from fastarat.specs import known

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that store weights and activations in 16 bits, by name."""


def autocast(images: Tensor, precision: str) -> contextlib.AbstractContextManager:
    """Return the context in which a network computes in `precision` on the device of `images`."""
    if precision not in HALF:
        return contextlib.nullcontext()
    # Parameters change between steps: a cached cast would make the attack differentiate stale weights.
    return torch.autocast(images.device.type, dtype=HALF[precision], cache_enabled=False)


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
    """Put `model` into train or eval mode inside the block; each of its modules comes back in the mode it had."""
    before = [] if model.training == training else [(m, m.training) for m in model.modules()]
    if before:
        model.train(training)
    try:
        yield
    finally:
        for m, was in before:
            m.training = was


class Attacker:
    """What an attack differentiates: `refresh()` after the weights have changed, then `attacker(points)` -> logits.

    Three kinds, decided here: the model itself (full precision); a twin whose weights are cast to 16 bits, once per
    step instead of once per forward; a twin whose BatchNorm is folded into the convolutions before it (only for
    eval-mode forwards through the branch "adv"). A twin shares everything else with the model, BatchNorm modules,
    buffers and hooks included, so running statistics, branches and modes are the model's own.

    Args:
        model: images float32 [B, C, H, W] in [0, 1] -> logits [B, K].
        precision: of the forwards: "fp32", "tf32", "bf16", "fp16".
        fold: fold BatchNorm where that pays: built-in networks, on a GPU only if cuDNN adds bias and ReLU itself.
        exact: fold it for `exact` as well, at the price of another float32 copy of the weights.
    folds: whether BatchNorm is folded. Parameters get no gradient inside `frozen(model)`. fresh: whether the
    weights have not changed since `refresh`, as far as is known: who changes them says so.
    """

    def __init__(self, model: nn.Module, *, precision: str = "fp32", fold: bool = False, exact: bool = False) -> None:
        self.model, self.network, self.precision = model, model, precision
        self.route, self._fold_asked, self._exact_asked = route_of(model), fold, exact
        self.fresh, self._versions = False, []
        self._prepare()

    def _prepare(self) -> None:
        """Make room for the weights that the attack has of its own."""
        model, dtype = self.model, HALF.get(self.precision)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._folded: dict[nn.Conv2d, FoldedConv] = {}
        self._exact: dict[nn.Conv2d, FoldedConv] = {}
        if self._fold_asked and isinstance(model, Network) and why_not_fold(device, dtype or torch.float32) is None:
            self._folded = _folded_convs(model, dtype)
            if self._exact_asked and dtype is not None and why_not_fold(device, torch.float32) is None:
                self._exact = _folded_convs(model, None)
        self.exact_network = model
        self.folds = bool(self._folded)
        # What autocast would cast at every forward. BatchNorm's affine stays the model's, in float32.
        layers = {id(p) for m in model.modules() if _casts(m) for p in (m.weight, m.bias)}
        # A hook that makes a weight of others (spectral norm) goes on making it of float32 ones.
        made_into = {id(p) for m in model.modules() if m._forward_pre_hooks for p in m.parameters(False)}
        self._cast: dict[str, Tensor] = {
            name: torch.empty_like(p, dtype=dtype, requires_grad=False)
            for name, p in model.named_parameters()
            if dtype is not None and (id(p) in layers or (p.dim() >= 2 and id(p) not in made_into))
        }
        # Networks of ours use their layers' parameters as they are, once: there a cast is what autocast would give.
        lent = isinstance(model, Network)
        self._lent = [name for name, p in model.named_parameters() if lent and name in self._cast and id(p) in layers]
        self._made_for = self._layers()

    def _layers(self) -> list[tuple[str, int, torch.Size]]:
        """What the room depends on: it is made anew when a person puts another layer in a layer's place."""
        return [(name, id(m), w.shape) for name, m in self.model.named_modules() for w in m.parameters(recurse=False)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the attack's weights anew from the model's, in place: a captured step reads them by address.

        The twin's structure is made anew as well (its modules are a few Python dictionaries), so that whatever a
        person changes on the model between steps, a drop rate or a layer, is what the attack sees. What a forward
        writes to a plain attribute of its module (a counter, say) stays on the twin; buffers are the model's.
        """
        self.route, self.fresh = route_of(self.model), True
        self._versions = [p._version for p in self.model.parameters()]
        # Full precision attacks the model itself: a copy would cost memory and could only be stale.
        if not self._cast and not self._folded:
            return
        if self._layers() != self._made_for:
            self._prepare()
        own = dict(self.model.named_parameters())
        if self._cast:
            torch._foreach_copy_(list(self._cast.values()), [own[name] for name in self._cast])
        if isinstance(self.model, Network) and self._folded:
            _fold(self.model, self._folded, self._exact)
        # By the parameter, not its name: tied weights stay tied in the twin.
        weights = {id(own[name]): cast for name, cast in self._cast.items()}
        self.network = _twin(self.model, weights, {**self._folded})
        self.exact_network = _twin(self.model, {}, {**self._exact}) if self._exact else self.model

    def lend(self) -> dict[str, Tensor]:
        """Return the casts, by parameter's name, for a training forward: autocast need not make them again.

        Differentiable: what they get is the parameters' gradient. They are made anew unless `fresh`.
        """
        if not self._lent:
            return {}
        if not self.fresh:
            self.refresh()
        if self._versions != [p._version for p in self.model.parameters()]:
            return {}  # written in between; what an earlier forward keeps for its backward must not be written over
        own = dict(self.model.named_parameters())
        lent = {name: self._cast[name] for name in self._lent}
        moving = [name for name in lent if own[name].requires_grad]
        if moving:
            casts = _Lent.apply([lent[name] for name in moving], *(own[name] for name in moving))
            lent |= zip(moving, casts, strict=True)
        return lent

    def __call__(self, points: Tensor) -> Tensor:
        """points: float32 [B, C, H, W] -> logits [B, K]."""
        with autocast(points, self.precision):
            return self.network(points)

    def exact(self, points: Tensor) -> Tensor:
        """points -> logits in float32 (on a GPU in TF32): the model's own, or a folded twin's if `exact` is set."""
        return self.exact_network(points)


def _casts(m: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether autocast would cast this layer's weight and bias as they are, and nobody makes them of something else."""
    return type(m).forward in (nn.Conv2d.forward, nn.Linear.forward, Stem.forward) and not (
        m._forward_pre_hooks or parametrize.is_parametrized(m)
    )


class _Lent(torch.autograd.Function):
    """Casts that exist already, as functions of the weights they were made from; one cast back for all gradients."""

    @staticmethod
    def forward(ctx, casts: list[Tensor], *weights: Tensor):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [w.dtype for w in weights]
        return tuple(cast.detach() for cast in casts)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        found = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        wide = [torch.empty_like(g, dtype=dtype) for g, dtype in found]
        if wide:
            torch._foreach_copy_(wide, [g for g, _ in found])
        back = iter(wide)
        return None, *(None if g is None else next(back) for g in grads)


def _twin(module: nn.Module, weights: dict[int, Tensor], made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy the structure of `module`, with other weights by the parameter's id; modules in `made` have theirs."""
    if isinstance(module, (_BatchNorm, torch.jit.ScriptModule)):
        return module
    if module not in made:
        # As torch.nn.DataParallel makes its replicas: a deep copy would copy tensors, and fail on hooked weights.
        twin = made[module] = object.__new__(type(module))
        for name in {s for cls in type(module).__mro__ for s in getattr(cls, "__slots__", ()) if hasattr(module, s)}:
            setattr(twin, name, getattr(module, name))
        twin.__dict__ = module.__dict__ | {
            "_parameters": {n: None if p is None else weights.get(id(p), p) for n, p in module._parameters.items()},
            "_modules": {n: None if m is None else _twin(m, weights, made) for n, m in module._modules.items()},
        }
    return made[module]


def _folded_convs(model: Network, dtype: torch.dtype | None) -> dict[nn.Conv2d, FoldedConv]:
    """Convolutions that take up the BatchNorm after them, still empty, by the model's own ones."""
    # Two that are added up need one bias between them: the shortcut has none.
    bare, adding = {shortcut for shortcut, _ in model.shortcuts()}, set(model.adding())
    made = {}
    for conv, bn in model.foldable():
        of = dtype or conv.weight.dtype
        # A shortcut has no ReLU either, and so no use for the fused call.
        kind = None if conv in bare else kind_of(conv, conv in adding)
        fused = kind is not None and why_not_conv_bias_relu(conv.weight.device, of, kind) is None
        made[conv] = FoldedConv(conv, of, conv not in bare, fused, bn.backend)
    return made


def _fold(model: Network, *folded: dict[nn.Conv2d, FoldedConv]) -> None:
    """Fold the "adv" branch's running statistics and affine into the convolutions of each twin at once."""
    norms = {}
    for conv, bn in model.foldable():
        held = bn.branch_set("adv")
        norms[conv] = Norm(held.weight, held.bias, known(held.running_mean), known(held.running_var), bn.eps)
    sides = {conv: norms[shortcut] for shortcut, conv in model.shortcuts()}
    for conv, norm in norms.items():
        into = [(made[conv].weight, made[conv].bias) for made in folded if made]
        fold_batchnorm(conv.weight, norm, into, shortcut=sides.get(conv), backend=folded[0][conv].backend)
