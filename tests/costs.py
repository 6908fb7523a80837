"""Count what one training step costs, in the units of the papers' comparisons."""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastarat import checks as engine

_aten = torch.ops.aten
# Operations whose result the host must wait for.
_HOST = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._unique2}


class Costs(NamedTuple):
    """Work of one step, in batches of B images (a [clean; adv] forward counts 2).

    forwards: of the network that is trained and tested. input_backwards: backwards to its input, without weight
    gradients. full_backwards: backwards that make weight gradients, those to the input as well included.
    teacher_forwards, teacher_backwards: of the convolutional networks among the companions.
    """

    forwards: float
    input_backwards: float
    full_backwards: float
    teacher_forwards: float = 0
    teacher_backwards: float = 0


class Counter(TorchDispatchMode):
    """Sees every operation of a step. A backward is known by what it asks of a network's first convolution."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.counts = dict.fromkeys(Costs._fields, 0.0)
        self.host_reads: list[str] = []
        self._waiting = ""
        # The first convolutions' arguments, kept alive so that no other tensor gets their addresses.
        self._first: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}

    @property
    def costs(self) -> Costs:
        return Costs(**self.counts)

    def entering(self, who: str, images: Tensor) -> None:
        self.counts["teacher_forwards" if who == "teacher" else "forwards"] += len(images) / self.size
        self._waiting = who

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet is _aten.convolution and self._waiting:
            self._first[args[0].data_ptr(), args[1].data_ptr()] = (self._waiting, args[0], args[1])
            self._waiting = ""
        elif packet is _aten.convolution_backward:
            known = self._first.get((args[1].data_ptr(), args[2].data_ptr()))
            to_input, to_weight, _ = args[10]
            if known and known[0] == "teacher":
                self.counts["teacher_backwards"] += len(args[1]) / self.size
            elif known and (to_input or to_weight):
                kind = "full_backwards" if to_weight else "input_backwards"
                self.counts[kind] += len(args[1]) / self.size
        elif packet in _HOST or (packet is _aten.index and any(_is_mask(i) for i in args[1])):
            self.host_reads.append(str(func))
        return func(*args, **(kwargs or {}))


class Backwards(TorchDispatchMode):
    """Counts gradients of convolutions: to_input, to_weight; convolutions: how many there are (distinct weights)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_input = self.to_weight = 0
        self._weights: set[int] = set()

    @property
    def convolutions(self) -> int:
        return len(self._weights)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is _aten.convolution_backward:
            to_input, to_weight, _ = args[10]
            self.to_input += to_input
            self.to_weight += to_weight
            self._weights.add(args[2].data_ptr())
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def counting(step, size: int):
    """Count what `step` (a TrainStep) does inside the block, in batches of `size` images; yields a Counter."""
    counter = Counter(size)
    waits = engine.waits
    engine.waits = lambda images: True  # a CPU's batches are looked at in every call; a GPU's, once per shape
    teachers = [m for m in step.companions.children() if any(isinstance(c, nn.Conv2d) for c in m.modules())]
    hooks = [
        module.register_forward_pre_hook(lambda m, args, who=who: counter.entering(who, args[0]))
        for who, modules in (("student", [step.model]), ("teacher", teachers))
        for module in modules
    ]
    try:
        with counter:
            yield counter
    finally:
        engine.waits = waits
        for hook in hooks:
            hook.remove()


class Additions(TorchDispatchMode):
    """Counts additions of two tensors of at least `least` elements."""

    def __init__(self, least: int = 1024) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::add", "aten::add_"):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.count += len(tensors) == 2 and all(t.numel() >= self.least for t in tensors)
        return func(*args, **(kwargs or {}))
