"""CUDA-graph twins of functions from tensors to tensors: captured once, replayed with no Python in between."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastarat.errors import UserError
from fastarat.kernels import own_arrivals
from fastarat.specs import Capture

Mode = Literal["cuda", "fake"]


def capture_mode(
    wanted: Capture, device: torch.device, optimizer: torch.optim.Optimizer, why_not: str
) -> tuple[Mode | None, str]:
    """Return how a training step is to be captured, None for not at all, and why not.

    why_not: what else forbids it, or "". Raises: UserError when it was asked for ("on") and cannot be had.
    """
    reason = why_not
    if not reason and wanted != "fake" and device.type != "cuda":
        reason = f"{device.type} has no CUDA graphs"
    for group in optimizer.param_groups:
        if not reason and device.type == "cuda" and not (group.get("fused") or group.get("capturable")):
            reason = "the optimiser reads its learning rate on the host; build it with fused=True or capturable=True"
        if not reason and group.get("dampening"):
            reason = "momentum dampening needs a first step of its own"
    # After the reasons: who asks for no capture is told "asked for", whatever else would forbid it.
    if wanted == "off":
        return None, "asked for"
    if reason and wanted == "on":
        raise UserError(f"this step cannot be captured: {reason}; write capture='auto' or 'off'")
    if reason:
        return None, reason
    return "fake" if wanted == "fake" else "cuda", ""


@contextmanager
def preserved(
    tensors: Callable[[], Sequence[Tensor]], device: torch.device, generators: Sequence[torch.Generator]
) -> Iterator[None]:
    """Put tensors, generators and PyTorch's own randomness back in place after the block.

    tensors: asked before and after; one that was born in between (momentum, a counter) becomes its first value, zero.
    """
    # By identity: the tensors themselves must stay, since a graph and an optimiser hold them by address.
    before = {id(t): t.detach().clone() for t in tensors()}
    states = [g.get_state() for g in generators], torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        with torch.no_grad():
            for t in tensors():
                t.copy_(before[id(t)]) if id(t) in before else t.zero_()
        for generator, state in zip(generators, states[0], strict=True):
            generator.set_state(state)
        torch.set_rng_state(states[1])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector still: the end of an old graph, should it find one, would break the capture."""
    gc.collect()
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class Captured:
    """What `capture` returns: call it like the function, with tensors like the example.

    The inputs are copied into buffers this object owns, the graph is replayed, and the returned tensors are the same
    ones at every call: the next call overwrites them, so clone what must last.

    Any memory layout is taken: copying into the buffers gives the example's.

    Raises (call): ValueError naming the argument whose shape, dtype or device differs from the example's, before
    anything runs.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        example: Sequence[Tensor],
        *,
        mode: Mode,
        generators: Sequence[torch.Generator] = (),
        warmup: int = 3,
        pool: Any = None,
    ) -> None:
        self.fn, self.mode = fn, mode
        # Buffers of our own, in the example's layout: a caller's tensor may be freed or reused after this returns.
        self.inputs = [torch.empty_like(t, requires_grad=False).copy_(t.detach()) for t in example]
        self._signature = [(tuple(t.shape), t.dtype, t.device) for t in self.inputs]
        if mode == "fake":
            self._outputs: Any = None
            for _ in range(warmup):
                self.fn(*self.inputs)
            return
        device = self.inputs[0].device
        # Lazy work (cuDNN plans, Triton and Inductor compilation, momentum buffers) must happen before capture, and
        # on a side stream, so that no autograd node remembers the default one. One stream for all captures: a memory
        # pool gives a block back only to the stream that freed it.
        stream = _capture_stream(device)
        # The kernels' counters are the graph's own: it may be replayed on any stream, beside anything.
        with own_arrivals() as self._counters:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(warmup):
                    self.fn(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            self.graph = torch.cuda.CUDAGraph()
            for generator in generators:
                self.graph.register_generator_state(generator)
            # Other threads (a loader pinning memory) may call CUDA meanwhile; only this one's calls are captured.
            with (
                no_collection(),
                torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                self._outputs = self.fn(*self.inputs)

    @property
    def pool(self) -> Any:
        """Memory pool, to be shared with the next capture when the two never run at once."""
        return self.graph.pool() if self.mode == "cuda" else None

    def __call__(self, *tensors: Tensor) -> Any:
        if len(tensors) != len(self.inputs):
            raise ValueError(f"captured for {len(self.inputs)} tensors, called with {len(tensors)}")
        for i, (given, (shape, dtype, device)) in enumerate(zip(tensors, self._signature, strict=True)):
            for what, is_, was in (
                ("shape", tuple(given.shape), shape),
                ("dtype", given.dtype, dtype),
                ("device", given.device, device),
            ):
                if is_ != was:
                    raise ValueError(
                        f"argument {i} has {what} {is_}, captured for {was}: capture again for it, or call the "
                        "function itself"
                    )
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given.detach())
        if self.mode == "cuda":
            self.graph.replay()
        else:
            self._replay_fake()
        return self._outputs

    def _replay_fake(self) -> None:
        """Run the function, and put its results where the last ones were, as a replay would."""
        results = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, self.fn(*self.inputs))
        if self._outputs is None:
            self._outputs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, results)
            return
        new, spec = tree_flatten(results)
        own, _ = tree_flatten(self._outputs)
        for kept, value in zip(own, new, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(value)
        self._outputs = tree_unflatten(own, spec)


def capture(
    fn: Callable[..., Any],
    example: Sequence[Tensor],
    *,
    mode: Mode | None = None,
    generators: Sequence[torch.Generator] | None = None,
    warmup: int = 3,
    pool: Any = None,
) -> Captured:
    """Capture `fn` as one CUDA graph for tensors like `example`.

    ```
    attack = fastarat.attacks.PGD(model, epsilon=8 / 255, step_size=2 / 255, num_steps=10)
    fast = fastarat.capture(attack, (images, labels))
    adversarial = fast(images, labels).images
    ```

    Args:
        fn: tensors -> tensors (nested tuples, NamedTuples, dicts); no host reads, no shape that depends on values.
            Module parameters and buffers it closes over are read at each replay, so a weight updated in place takes
            effect; a tensor that is *replaced* does not. Python numbers freeze.
        example: tensors on one device; their values are used for warming up, and are not kept.
        mode: "cuda"; "fake" runs the same buffers and checks with a plain call in place of the replay, on any
            device. Default: "cuda" for CUDA tensors; a CPU has no graphs.
        generators: that `fn` draws from; default `fn.generators`. Each replay advances them.
        warmup: calls before the capture. They are real calls: state that `fn` changes has changed after them.
        pool: memory pool of another capture, for graphs that never run at once.
    Returns: Captured; its outputs are overwritten by its next call.
    Raises: UserError when the tensors are not on one CUDA device.
    """
    devices = {t.device for t in example}
    if len(devices) != 1:
        raise UserError(f"capture needs its example on one device, got {', '.join(sorted(map(str, devices)))}")
    if mode is None:
        mode = "cuda"
    if mode == "cuda" and next(iter(devices)).type != "cuda":
        raise UserError(
            f"capture needs CUDA tensors, got {next(iter(devices))}: call the function itself, or mode='fake'"
        )
    if generators is None:
        generators = tuple(getattr(fn, "generators", ()))
    return Captured(fn, example, mode=mode, generators=generators, warmup=warmup, pool=pool)


class PerShape:
    """A function of (images, labels), captured for the first two shapes it is called with; others run eagerly.

    Two, a full batch and a last one, share a memory pool: they never run at once.
    around: the context that a capture happens in, which undoes its warm-up calls. Raises (call): UserError when the
    function cannot be captured.
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor], Any],
        mode: Mode | None,
        *,
        generators: Sequence[torch.Generator],
        around: Callable[[], AbstractContextManager],
    ) -> None:
        self.fn, self.mode, self.around = fn, mode, around
        self.generators = generators if mode == "cuda" else ()
        self.graphs: dict[tuple[torch.Size, int | None], Captured] = {}

    def clear(self) -> None:
        """Forget the graphs: what they hold by address has been replaced."""
        self.graphs.clear()

    def captured(self, images: Tensor, labels: Tensor, total: int | None = None) -> Callable[[Tensor, Tensor], Any]:
        """Return what serves this shape, captured now if it is one of the first two."""
        # Ranks capture together: a batch of another total is another one on all of them, though some shards be alike.
        key = images.shape, total
        # A third shape would be captured once and replayed rarely: each graph holds a whole step's memory.
        if self.mode is not None and key not in self.graphs and len(self.graphs) < 2:
            pool = next((g.pool for g in self.graphs.values()), None)
            options = {"mode": self.mode, "generators": self.generators, "pool": pool}
            with self.around():
                try:
                    self.graphs[key] = capture(self.fn, (images, labels), **options)
                except UserError:
                    raise
                except RuntimeError as error:
                    first = str(error).strip().split("\n")[0]
                    raise UserError(
                        f"this step cannot be captured as a CUDA graph ({first}): write capture='off'"
                    ) from error
        return self.graphs.get(key, self.fn)

    def __call__(self, images: Tensor, labels: Tensor, total: int | None = None) -> Any:
        return self.captured(images, labels, total)(images, labels)
