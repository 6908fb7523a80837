"""Batch normalisation with one parameter set per branch (split BatchNorm), fused with what follows it.

AR-AT sends clean and adversarial images through one network whose convolutions are shared while each kind of
image has its own BatchNorm (Waseda et al., ICLR 2025, section 4). The layers here also let a *shared* BatchNorm
process a concatenated batch [clean; adv] exactly as two separate forwards would: each part is normalised by its
own batch statistics, and the running statistics are updated in a stated order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastarat.distributed import World
from fastarat.errors import UserError, nearest
from fastarat.kernels import joins, split_bn, split_bn_join
from fastarat.nets.sync import over_all

BRANCHES = ("clean", "adv")


class Route:
    """Which BatchNorm set normalises which part of the batch: one object that all layers of a network share.

    groups: branch names, one per equal part of the batch. updates: order in which running statistics follow, None:
    that of `groups`. pending: updates waiting for the end of `through`, None outside: then they happen at once.
    forks: whether a tensor inside the network may be forked (`kernels.fork`), which gives the gradient by it to nobody
    else: only inside `through`, and where no module has a hook that could have handed the tensor out.
    """

    def __init__(self) -> None:
        self.groups: tuple[str, ...] = ("adv",)
        self.updates: tuple[str, ...] | None = None
        self.pending: list | None = None
        self.forks = False
        # PyTorch's own dictionaries, by their ids: a hook that is registered later is found in them.
        self._hooks: dict[int, dict] = {}

    def watch(self, model: nn.Module) -> None:
        """Fork from now on, and look at the hooks of these modules first."""
        for m in model.modules():
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
                self._hooks[id(hooks)] = hooks

    def __getstate__(self) -> dict:
        # A copy of a layer is not a copy of all hooks of its network; it forks when it is watched.
        return self.__dict__ | {"_hooks": {}, "pending": None, "forks": False}

    @contextmanager
    def through(self, *groups: str, updates: Sequence[str] | None = None) -> Iterator[None]:
        """Send forwards inside the block through these branches; running statistics move, in order, when it ends.

        The names are taken as they are: `branch` checks them.
        """
        before = self.groups, self.updates, self.pending, self.forks
        pending: list = []
        self.groups, self.updates, self.pending = groups, None if updates is None else tuple(updates), pending
        hooks = torch.nn.modules.module
        of_all = hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks
        self.forks = bool(self._hooks) and not any((*of_all, hooks._global_backward_pre_hooks, *self._hooks.values()))
        try:
            yield
        finally:
            self.groups, self.updates, self.pending, self.forks = before
            _apply_updates(pending)


def route_of(model: nn.Module) -> Route:
    """Return the route that all BatchNorm layers of this module's kind in `model` share, from now on if not before."""
    layers = _layers(model)
    route = layers[0].route if layers else Route()
    route.watch(model)
    for m in layers:
        m.route = route
    return route


def _layers(model: nn.Module) -> list[BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, BatchNorm2d)]


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` fused with an optional residual add and ReLU, and aware of concatenated sub-batches.

    Key names, buffers and numerics are those of `nn.BatchNorm2d`. Inside `branch(model, "clean", "adv")` the rows
    of the batch are two equal parts, each normalised by its own batch statistics with the same affine.

    Args (forward):
        x: float [B, C, H, W], channels-last for speed.
        residual: same shape and dtype as x, added after the affine, or None.
        relu: apply max(., 0) last.
        through: a BatchNorm that `residual` has yet to go through, its own; None: residual is added as it is.
    Returns: same shape and dtype as x.
    Raises: ValueError when the rows cannot be split evenly, or a part holds one value per channel in training.
    """

    _ndims = (4,)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        **factory,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        self.route = Route()
        self.backend = "auto"
        self.world: World | None = None
        # What a wrapped subclass applied after its normalisation (timm's BatchNormAct2d: drop and act).
        self.drop: nn.Module | None = None
        self.act: nn.Module | None = None

    def branch_set(self, name: str) -> nn.BatchNorm2d:
        """Return the module that holds the affine and running statistics of branch `name`."""
        return self

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() not in self._ndims:
            raise ValueError(f"{type(self).__name__} expects {self._ndims}-dimensional input, got {tuple(x.shape)}")

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        through: BatchNorm2d | None = None,
    ) -> Tensor:
        self._check_input_dim(x)
        if residual is not None and through is not None:
            if relu and self._joins(through, x, residual):
                return self._joined(x, residual, through)
            residual = through(residual)
        shape = x.shape
        # One kernel for all shapes: [B, C] and [B, C, L] are images one pixel wide.
        if x.dim() != 4:
            x = x.reshape(shape[0], shape[1], -1, 1)
        sets = [self.branch_set(name) for name in self.route.groups]
        weight, bias = _stack(sets, "weight", x), _stack(sets, "bias", x)
        # A layer that tracks nothing has only batch statistics, in eval mode too.
        if self.training and self.world is not None:
            weight, bias, of_all, rows = over_all(x, weight, bias, self.eps, self.world)
            y = split_bn(x, weight, bias, residual, relu, running=of_all, eps=self.eps, backend=self.backend).y
            if self.running_mean is not None:
                self._note(sets, of_all[0], of_all[1] * (rows / (rows - 1)), None)
        elif self.training or self.running_mean is None:
            y, mean, var = split_bn(x, weight, bias, residual, relu, eps=self.eps, backend=self.backend)
            if self.training and self.running_mean is not None:
                self._note(sets, mean.detach(), var.detach(), x.numel() // (x.shape[1] * len(sets)))
        else:
            running = (_stack(sets, "running_mean", x), _stack(sets, "running_var", x))
            y = split_bn(x, weight, bias, residual, relu, running=running, eps=self.eps, backend=self.backend).y
        if y.shape != shape:  # else y itself, which may be forked: a view of it may not
            y = y.reshape(shape)
        if self.drop is not None:
            y = self.drop(y)
        return y if self.act is None else self.act(y)

    def _joins(self, other: BatchNorm2d, x: Tensor, x2: Tensor) -> bool:
        # Not where somebody's hook is to see what `other` returns (it returns nothing then), or it is somebody's own.
        ours = isinstance(other, BatchNorm2d) and type(other).forward is BatchNorm2d.forward
        if not ours or not self.route.forks or other.route is not self.route or not joins(x, x2, self.backend):
            return False
        plain = all(m.drop is m.act is m.world is None and m.running_mean is not None for m in (self, other))
        return plain and self.training and other.training and self.backend == other.backend

    def _joined(self, x: Tensor, x2: Tensor, other: BatchNorm2d) -> Tensor:
        both = [[m.branch_set(name) for name in self.route.groups] for m in (self, other)]
        affine, affine2 = ((_stack(sets, "weight", x), _stack(sets, "bias", x)) for sets in both)
        y, *stats = split_bn_join(x, *affine, x2, *affine2, eps=self.eps, eps2=other.eps)
        rows = x.numel() // (x.shape[1] * len(self.route.groups))
        for m, sets, (mean, var) in zip((self, other), both, (stats[:2], stats[2:]), strict=True):
            m._note(sets, mean.detach(), var.detach(), rows)
        return y

    def _note(self, sets: list[nn.BatchNorm2d], mean: Tensor, var: Tensor, rows: int | None) -> None:
        """rows: that `var`, biased, is of; None for an unbiased one."""
        route, unbias = self.route, 1.0 if rows is None else rows / (rows - 1)
        parts = [route.groups.index(name) for name in (route.groups if route.updates is None else route.updates)]
        updates = [(sets[part], mean[part], var[part], unbias) for part in parts]
        if route.pending is None:
            _apply_updates(updates)
        else:
            route.pending.extend(updates)


class SplitBatchNorm2d(BatchNorm2d):
    """BatchNorm with one affine and one set of running statistics per branch (Waseda et al., ICLR 2025).

    The last of `branches` is the one used outside `branch(...)` and at test time; it keeps the ordinary key names
    (`weight`, `running_mean`, ...), so dropping the others' keys (`clean.weight`, ...) leaves a checkpoint that an
    ordinary network loads. The other branches are `nn.BatchNorm2d` children under their own names.

    Args:
        num_features: C, channels.
        branches: names, at least two; rows of a concatenated batch come in the order given to `branch(...)`.
    Forward: as `BatchNorm2d`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        branches: Sequence[str] = BRANCHES,
        **factory,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **factory)
        if isinstance(branches, str) or len(branches) < 2 or len(set(branches)) != len(branches):
            raise UserError(f"branches={branches!r}: expected at least two different names, such as ('clean', 'adv')")
        self.branches = tuple(branches)
        for name in self.branches[:-1]:
            self.add_module(name, nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats, **factory))

    def branch_set(self, name: str) -> nn.BatchNorm2d:
        if name not in self.branches:
            raise UserError(
                f"unknown BatchNorm branch {name!r}: this model has {', '.join(self.branches)}"
                f"{nearest(name, self.branches)}"
            )
        return self if name == self.branches[-1] else getattr(self, name)


class BatchNorm1d(BatchNorm2d):
    """`BatchNorm2d` for [B, C] or [B, C, L] input."""

    _ndims = (2, 3)


class SplitBatchNorm1d(SplitBatchNorm2d):
    """`SplitBatchNorm2d` for [B, C] or [B, C, L] input."""

    _ndims = (2, 3)


_PLAIN = {2: BatchNorm2d, 1: BatchNorm1d}
_SPLIT = {2: SplitBatchNorm2d, 1: SplitBatchNorm1d}


def has_batchnorm(model: nn.Module) -> bool:
    """Whether any layer of a network is BatchNorm."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def split_batchnorm(model: nn.Module, branches: Sequence[str] = BRANCHES) -> nn.Module:
    """Give every BatchNorm layer of `model` one parameter set per branch, all starting from the layer's own.

    Works in place on any network (timm's and torchvision's too) and returns it; a network that is itself one
    BatchNorm layer comes back as a new module. Layers that are split already stay as they are.

    Raises: UserError when there is no BatchNorm layer, or one of a kind whose forward is unknown.
    Source: Waseda et al., ICLR 2025 (split BatchNorm).
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"cannot split a {type(model).__name__}: expected an nn.Module")
    if not has_batchnorm(model):
        raise UserError(
            f"{type(model).__name__} has no BatchNorm layer to split: use a network with BatchNorm, or turn "
            "splitting off (--no-defense.split-bn)"
        )
    return _convert(model, lambda m: not isinstance(m, SplitBatchNorm2d), lambda m: _rebuilt(m, branches))


def grouped_batchnorm(model: nn.Module) -> nn.Module:
    """Replace plain `nn.BatchNorm*d` by this module's fused, sub-batch-aware form; parameters and keys stay.

    Needed before a concatenated [clean; adv] batch goes through a network with shared BatchNorm, because plain
    BatchNorm would mix the statistics of the two parts. In place; returns the model.
    """
    return _convert(model, lambda m: not isinstance(m, BatchNorm2d), lambda m: _rebuilt(m, None))


def single_branch(model: nn.Module, name: str = "adv") -> nn.Module:
    """Return a deep copy whose split layers are replaced by the fused ordinary form holding branch `name` alone."""
    model = copy.deepcopy(model)
    return _convert(model, lambda m: isinstance(m, SplitBatchNorm2d), lambda m: _rebuilt(m, None, name))


@contextmanager
def branch(model: nn.Module, *groups: str, updates: Sequence[str] | None = None) -> Iterator[nn.Module]:
    """Choose which BatchNorm set normalises the batch, for every layer of `model`, inside a `with` block.

    `branch(model, "adv")`: the whole batch uses "adv". `branch(model, "clean", "adv")`: the batch is [clean; adv],
    2B rows, first half "clean". In a network with shared BatchNorm the names only divide the batch. Nothing happens
    in a network without such layers.

    Args:
        groups: branch names, one per equal part of the batch.
        updates: order in which running statistics are updated after a train-mode forward, a subset of `groups`
            that may repeat; default: `groups`. `()` leaves them untouched (batch statistics, frozen running ones).

    Running-statistic updates take effect, in order, when the block ends.
    Raises: UserError for an unknown branch name, no name at all, or an update of a branch that is not in `groups`.
    """
    check_groups(groups, updates)
    layers = _layers(model)
    for m in layers:
        for name in groups:
            m.branch_set(name)
    # A route of the block's own: `model` may be a part of a network whose other layers go another way. It forks
    # nothing: who calls the network here may look at any tensor in it.
    own, before = Route(), [m.route for m in layers]
    for m in layers:
        m.route = own
    try:
        with own.through(*groups, updates=updates):
            yield model
    finally:
        for m, route in zip(layers, before, strict=True):
            m.route = route


def check_groups(groups: Sequence[str], updates: Sequence[str] | None) -> None:
    """Raise UserError where no branch is named, or an update of one that is not among those named."""
    if not groups:
        raise UserError(
            "branch(model, ...) names no branch: write branch(model, 'adv'), or 'clean', 'adv' for [clean; adv]"
        )
    if other := [name for name in updates or () if name not in groups]:
        raise UserError(
            f"updates={tuple(updates or ())}: {other[0]!r} is not among the branches named, {', '.join(groups)}"
        )


def branches_of(model: nn.Module) -> tuple[str, ...]:
    """Return the branch names of a split model, or () when no layer is split."""
    for m in model.modules():
        if isinstance(m, SplitBatchNorm2d):
            return m.branches
    return ()


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose "auto", "triton" or "plain" for every BatchNorm layer of this module's kind."""
    for m in _layers(model):
        m.backend = backend


def set_world(model: nn.Module, world: World | None) -> None:
    """Take batch statistics over all processes of `world` in every BatchNorm layer of this module's kind; None: not."""
    for m in _layers(model):
        m.world = world


def _stack(sets: list[nn.BatchNorm2d], name: str, x: Tensor) -> Tensor:
    first = getattr(sets[0], name)
    if first is None:  # affine=False
        fill = torch.ones if name == "weight" else torch.zeros
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        return fill(len(sets), x.shape[1], device=x.device, dtype=dtype)
    if len(sets) == 1:
        return first[None]
    if all(s is sets[0] for s in sets):
        return first.expand(len(sets), -1)
    return torch.stack([getattr(s, name) for s in sets])


@torch.no_grad()
def _apply_updates(pending: list) -> None:
    """Move running statistics towards batch ones, all layers at once; emptied as it goes.

    One buffer may be due several updates (shared BatchNorm: clean, then adversarial): they are applied in waves,
    because a multi-tensor call gives no order between two entries that name the same buffer.
    """
    while pending:
        wave, later, seen = [], [], set()
        for entry in pending:
            (later if id(entry[0]) in seen else wave).append(entry)
            seen.add(id(entry[0]))
        pending[:] = later
        torch._foreach_add_([s.num_batches_tracked for s, *_ in wave], 1)
        by_momentum: dict[float, list] = {}
        for s, mean, var, unbias in wave:
            if s.momentum is None:  # the cumulative mean, its weight read on the device
                share = 1.0 / s.num_batches_tracked
                s.running_mean.lerp_(mean.to(s.running_mean.dtype), share.to(s.running_mean.dtype))
                s.running_var.lerp_((var * unbias).to(s.running_var.dtype), share.to(s.running_var.dtype))
            else:
                by_momentum.setdefault(s.momentum, []).append((s, mean, var, unbias))
        for momentum, entries in by_momentum.items():
            means = [mean.to(s.running_mean.dtype) for s, mean, _, _ in entries]
            variances = torch._foreach_mul(
                [var.to(s.running_var.dtype) for s, _, var, _ in entries], [u for *_, u in entries]
            )
            running = [s.running_mean for s, *_ in entries] + [s.running_var for s, *_ in entries]
            torch._foreach_lerp_(running, means + list(variances), momentum)


def _convert(
    model: nn.Module, wanted: Callable[[nn.Module], bool], build: Callable[[nn.Module], nn.Module]
) -> nn.Module:
    if isinstance(model, _BatchNorm):
        return build(model) if wanted(model) else model
    for name, child in model.named_children():
        new = _convert(child, wanted, build)
        if new is not child:
            setattr(model, name, new)
    return model


def _rebuilt(old: nn.Module, branches: Sequence[str] | None, source: str | None = None) -> nn.Module:
    """Build our form of BatchNorm layer `old`; parameters move (the same objects), extra branches are copies."""
    if isinstance(old, nn.SyncBatchNorm) or not isinstance(old, (nn.BatchNorm1d, nn.BatchNorm2d)):
        raise UserError(f"cannot convert a {type(old).__name__} layer: use nn.BatchNorm1d or nn.BatchNorm2d")
    ours = isinstance(old, BatchNorm2d)
    own_forward = type(old).forward not in (nn.BatchNorm2d.forward, _BatchNorm.forward)
    if not ours and own_forward and not hasattr(old, "act"):
        raise UserError(
            f"cannot convert {type(old).__name__}: its forward does more than BatchNorm; use nn.BatchNorm2d there"
        )
    dims = 1 if isinstance(old, (nn.BatchNorm1d, BatchNorm1d, SplitBatchNorm1d)) else 2
    held = old.branch_set(source) if source and isinstance(old, BatchNorm2d) else old
    args = (old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    if branches is None:
        new = _PLAIN[dims](*args)
    else:
        new = _SPLIT[dims](*args, branches=branches)
        reference = held.running_mean if held.running_mean is not None else held.weight
        if reference is not None:
            new.to(device=reference.device, dtype=reference.dtype)
        for name in branches[:-1]:
            part = getattr(new, name)
            part.load_state_dict({k: v for k, v in held.state_dict().items() if "." not in k})
            for p in part.parameters():
                p.requires_grad_(held.weight.requires_grad)
    for name in ("weight", "bias"):
        if getattr(held, name) is not None:
            setattr(new, name, getattr(held, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        if getattr(held, name) is not None:
            new.register_buffer(name, getattr(held, name))
    new.drop = getattr(old, "drop", None)
    new.act = getattr(old, "act", None)
    if ours:
        new.backend = old.backend
    return new.train(old.training)
