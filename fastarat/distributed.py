"""Several processes, one training: who is who among them, and what they tell one another.

`torchrun` starts the processes; PyTorch's own collectives connect them: NCCL between GPUs, gloo between CPUs, and gloo
beside NCCL for what the hosts agree on. Without a launcher there is a world of one, in which nothing here costs
anything.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastarat.device import pick_device
from fastarat.errors import UserError

__all__ = [
    "OnPaper", "Rows", "SharedGenerator", "Votes", "World", "communication_s", "drawn", "even", "heard", "joined",
    "launched", "one_process",
]  # fmt: skip

_T = TypeVar("_T")
_PATIENCE = datetime.timedelta(days=1)  # one process may validate, or time a precision, while the others wait
_BUCKET = 1 << 26  # bytes that are sent at once: large enough for the bandwidth, small beside the gradients
_AFTER_YOU_S = 0.3  # the launcher ends all once one has ended: the one that speaks must have spoken
_LOST = re.compile(r"[Cc]onnection|[Bb]roken pipe|closed by peer|Gloo|gloo|NCCL|Socket|[Tt]imed out|StoreError")


class Launched(NamedTuple):
    """What a launcher says of this process by the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0


def launched() -> Launched:
    """Return what torchrun says of this process: a world of one where there is none. Raises: UserError."""

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, "")
        if text and not text.isdecimal():
            raise UserError(f"{name}={text[:40]!r} in the environment: expected a number, as torchrun sets it")
        return int(text) if text else otherwise

    size = number("WORLD_SIZE", 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={size} is set and {missing[0]} is not: start several processes with torchrun "
            f"--nproc-per-node={size} -m fastarat train, or unset WORLD_SIZE for one"
        )
    rank = number("RANK", 0)
    return Launched(
        rank,
        max(1, size),
        number("LOCAL_RANK", rank),
        number("LOCAL_WORLD_SIZE", max(1, size)),
        number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def heard(error: BaseException | None = None) -> bool:
    """Whether this process speaks for all of them: rank 0, or for an `error` the first to fail.

    Before they have met, an error is said once on each machine.
    """
    silent = getattr(error, "silent", None)
    if silent is not None:
        return not silent
    local = os.environ.get("LOCAL_RANK", "0")
    first = os.environ.get("RANK", "0") if error is None else local
    return os.environ.get("WORLD_SIZE", "1") in ("", "0", "1") or first in ("", "0")


def one_process(what: str) -> None:
    """Raise UserError inside a launcher that starts a command several times, torchrun's way. what: the command."""
    if (size := os.environ.get("WORLD_SIZE", "")).isdecimal() and int(size) > 1:
        raise UserError(
            f"WORLD_SIZE={size}: {what} runs in one process on one device, and a launcher such as torchrun starts the "
            f"same {size} times; start it without one (fastarat train is what torchrun may start; several seeds at "
            "once: fastarat compare --parallel)"
        )


def even(count: int, parts: int, index: int) -> slice:
    """Return part `index` of `count` rows cut into `parts`, the first ones a row longer where it does not divide.

    Of fewer rows no part is longer than of more.
    """
    least, over = divmod(count, parts)
    begin = index * least + min(index, over)
    return slice(begin, begin + least + (index < over))


@dataclass(eq=False)
class World:
    """The processes of one training, as this one sees them; `World()` is a world of one.

    rank: of this process, from 0; 0 prints and writes. size: how many. local_rank: among those of its machine.
    device: it computes on. restarts: how often the launcher has started all of them anew.
    sent: by kind, how many collectives on the device there were and how many bytes each process put into them.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restarts: int = 0
    host: Any = field(default=None, repr=False)
    sent: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self  # a copied network is in the same world

    def __reduce__(self) -> tuple[Any, ...]:
        return World, ()  # another process, which reads a pickled network, is in none

    @property
    def first_one(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return this rank's rows of `count`: contiguous, sizes that differ by one at most."""
        return even(count, self.size, self.rank)

    def parts(self, total: int, accumulate: int = 1) -> tuple[slice, ...]:
        """Return this rank's rows of a batch of `total`, of each of its `accumulate` micro-batches.

        The batch is cut into micro-batches first and each of those among the ranks: with any number of ranks the
        micro-batches hold the same images.
        """
        whole = [even(total, accumulate, i) for i in range(accumulate)]
        own = [self.shard(m.stop - m.start) for m in whole]
        return tuple(slice(m.start + s.start, m.start + s.stop) for m, s in zip(whole, own, strict=True))

    def _note(self, kind: str, tensor: Tensor) -> None:
        tally = self.sent.setdefault(kind, [0, 0])
        tally[0] += 1
        tally[1] += tensor.numel() * tensor.element_size()

    def sum_(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Replace each tensor by its sum over the ranks, in place; many small ones travel as few large ones.

        On the device, without waiting on the host: a captured step may hold it. All ranks give the same shapes.
        """
        self._reduce(tensors, "sum", kind)

    def mean_(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Replace each floating point tensor by its mean over the ranks, in place."""
        if self.size > 1 and tensors:
            self._reduce(tensors, "sum", kind)
            torch._foreach_div_(list(tensors), float(self.size))

    def smallest_(self, tensors: Sequence[Tensor], kind: str = "other") -> None:
        """Replace each tensor by its least value over the ranks, in place, element by element."""
        self._reduce(tensors, "min", kind)

    @torch.no_grad()
    def _reduce(self, tensors: Sequence[Tensor], how: str, kind: str) -> None:
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            # Contiguous already, a single tensor travels as it is.
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([t.reshape(-1) for t in bucket])
            self._note(kind, flat)
            self._all_reduce(flat, how)
            if not alone:
                parts = flat.split([t.numel() for t in bucket])
                torch._foreach_copy_(list(bucket), [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)])

    def _all_reduce(self, flat: Tensor, how: str) -> None:
        dist.all_reduce(flat, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MIN)

    def gathered(self, tensor: Tensor, kind: str = "other") -> Tensor:
        """Return every rank's `tensor`, one shape on all, stacked: [size, ...]; on the device, without gradient."""
        if self.size == 1:
            return tensor[None]
        self._note(kind, tensor)
        out = tensor.new_empty(self.size * tensor.numel())
        self._all_gather(out, tensor.detach().contiguous().view(-1))
        return out.view(self.size, *tensor.shape)

    def _all_gather(self, out: Tensor, flat: Tensor) -> None:
        # One function under two names, of which PyTorch 2.13 warns of the older.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, flat)

    # What follows is between the hosts: it waits, and no device knows of it.

    def gather(self, value: _T) -> list[_T]:
        """Return every rank's `value`, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.host)
        return found

    def first(self, do: Callable[[], _T]) -> _T:
        """Let rank 0 do something, and return what it found on all ranks; they wait for it.

        What it raises for people, UserError and KeyboardInterrupt, is raised on all of them.
        """
        if self.size == 1:
            return do()
        outcome: tuple[Any, BaseException | None] = None, None
        if self.rank == 0:
            try:
                outcome = do(), None
            except (UserError, KeyboardInterrupt) as error:
                outcome = None, error
        box: list[Any] = [outcome]
        dist.broadcast_object_list(box, src=0, group=self.host)
        value, error = box[0]
        if error is not None:
            raise outcome[1] or error
        return value

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank."""
        return any(self.gather(flag))

    def same(self, what: str, value: Any, mend: str) -> None:
        """Raise UserError, on all ranks, unless `value` is equal on all of them. mend: what to do about it."""
        found = self.gather(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise UserError(f"the processes see different {what}: rank 0 {found[0]}, rank {rank} {other}; {mend}")


class OnPaper(World):
    """A world that sends nothing and counts it all the same: what a step in so many processes would send."""

    def _all_reduce(self, flat: Tensor, how: str) -> None:
        pass

    def _all_gather(self, out: Tensor, flat: Tensor) -> None:
        out.view(self.size, -1).copy_(flat)


def communication_s(sent: Mapping[str, Sequence[int]], size: int, *, bandwidth: float, latency: float) -> float:
    """Return the seconds that collectives take by arithmetic: a ring's transfers, and a latency each; none overlaps.

    sent: as `World.sent`. bandwidth: bytes per second and process, each way. latency: seconds per collective.
    """
    share = 2 * (size - 1) / size
    return sum(count * latency + share * volume / bandwidth for count, volume in sent.values())


class Votes:
    """Numbers of which all ranks learn the largest, one step late: so no step waits for the slowest host.

    In a world of one they are known at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[Any, Tensor] | None = None

    def cast(self, *values: int) -> tuple[int, ...]:
        """Give this step's numbers, the same count on all ranks; return the largest of the step before's."""
        if self.world.size == 1:
            return values
        found = self._found() or (0,) * len(values)
        ballot = torch.tensor(values, dtype=torch.int64)
        self._pending = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.world.host, async_op=True), ballot
        return found

    def now(self, *values: int) -> tuple[int, ...]:
        """Return the largest on any rank of what was given last and of `values`; waits."""
        if self.world.size == 1:
            return values
        before = self._found() or values
        return tuple(map(max, zip(*self.world.gather(values), before, strict=True)))

    def _found(self) -> tuple[int, ...] | None:
        if self._pending is None:
            return None
        work, ballot = self._pending
        self._pending = None
        work.wait()
        return tuple(ballot.tolist())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype, in order, by what is sent at once."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[Tensor] = []
        size = 0
        for t in tensors:
            if t.dtype != dtype:
                continue
            if bucket and size + t.numel() * t.element_size() > _BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(t)
            size += t.numel() * t.element_size()
        if bucket:
            yield bucket


@contextlib.contextmanager
def joined(device: Any = "auto") -> Iterator[World]:
    """Be one of the launcher's processes inside the block, on a device of one's own; alone without a launcher.

    device: "auto" and "cuda" give each process the GPU of its local rank, "cpu" the host. A process group that is
    there already is used, and left.
    Raises: UserError for more processes than GPUs, and where another process of the run has ended; of those that fail
        together one alone is `heard`.
    """
    env = launched()
    if env.size == 1:
        yield World(device=pick_device(device), restarts=env.restarts)
        return
    chosen = _own_device(device, env)
    ours = not dist.is_initialized()
    of_device = torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext()
    with of_device:
        if ours:
            # device_id: the communicators are made now, where a failure is a line, and not in the first step.
            gpu = chosen if chosen.type == "cuda" else None
            backend = "gloo" if gpu is None else "nccl"
            dist.init_process_group(backend, store=_store(env), rank=env.rank, world_size=env.size, device_id=gpu)
        failed = True
        try:
            host = dist.new_group(backend="gloo", timeout=_PATIENCE)
            yield World(env.rank, env.size, env.local_rank, chosen, env.restarts, host)
            failed = False
        except (UserError, KeyboardInterrupt) as error:
            _fall_silent(error, env)
            raise
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or not _LOST.search(str(error)):
                raise
            first = " ".join(str(error).split())[:160]
            lost = UserError(
                f"rank {env.rank} of {env.size} has lost the others: one of them has ended ({first}); what is kept "
                "stays, and the same command with --resume RUN goes on"
            )
            _fall_silent(lost, env)
            raise lost from error
        finally:
            # NCCL would wait for ranks that are gone.
            if ours and not (failed and chosen.type == "cuda"):
                dist.destroy_process_group()


def _own_device(device: Any, env: Launched) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "cpu":
        return torch.device("cpu")
    if str(device) != "cuda":
        raise UserError(
            f"device={device}: of {env.size} processes each takes the GPU of its local rank; write --device cuda, cpu "
            "or auto"
        )
    count = torch.cuda.device_count()
    if env.local_size > count:
        raise UserError(
            f"{env.local_size} processes on a machine with {count} GPU(s): start it with --nproc-per-node={count}"
            if count
            else f"device=cuda: this machine has no GPU for its {env.local_size} processes; write --device cpu"
        )
    return pick_device(f"cuda:{env.local_rank}")


def _store(env: Launched) -> dist.Store:
    """Where the processes find one another; the launcher holds it, so that it outlives them."""
    store, _, _ = next(iter(dist.rendezvous("env://")))
    # After a restart it still holds the addresses of the processes that are gone.
    return dist.PrefixStore(f"fastarat/{env.restarts}", store)


def _fall_silent(error: Any, env: Launched) -> None:
    """Mark an error as said unless nobody else of this run has failed before."""
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        error.silent = store.add(f"fastarat/failed/{env.restarts}", 1) > 1
    except (RuntimeError, ValueError):
        error.silent = env.rank > 0
    if error.silent:
        time.sleep(_AFTER_YOU_S)


class Rows(NamedTuple):
    """Which of a batch of `total` images are here: `own`, a slice or int64 [B]."""

    total: int
    own: slice | Tensor


class SharedGenerator(torch.Generator):
    """A generator from which all ranks draw what one process would draw for the whole batch, and keep their own rows.

    rows: of the batch at hand; None: what is drawn is of this rank alone. So the images of a batch meet the same noise
    whatever the number of ranks, at the price of the whole batch's noise on each device for a moment.
    """

    rows: Rows | None = None


def drawn(fill: Callable[[Tensor], Tensor], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return float32 random numbers, one for each element of `like`, in its layout.

    fill: writes them into a tensor, from `generator`, and returns it.
    """
    rows = getattr(generator, "rows", None)
    if rows is None:
        return fill(torch.empty_like(like, dtype=torch.float32, requires_grad=False))
    strides = torch.empty_like(like, device="meta").stride()
    whole = torch.empty_strided((rows.total, *like.shape[1:]), strides, dtype=torch.float32, device=like.device)
    return fill(whole)[rows.own].clone()
