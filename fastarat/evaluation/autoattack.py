"""AutoAttack: the attacks of its authors, in a loop of ours that reports, saves after every batch and resumes.

Source: Croce and Hein, ICML 2020 (standard version); the packages are `pyautoattack` and `autoattack`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastarat.device import switched
from fastarat.doctor import version_of
from fastarat.errors import UserError
from fastarat.evaluation.checks import furthest
from fastarat.evaluation.search import SEARCH, quick_forward
from fastarat.evaluation.sharing import together
from fastarat.evaluation.task import Entry, Task, share
from fastarat.files import parse_json, seal, tensors_hash, write_text
from fastarat.specs import known

_STATE = ("fingerprint", "robust", "pending", "done", "partial")


def find_package() -> ModuleType:
    """Import AutoAttack under either of its names. Raises: UserError where there is none."""
    for name in ("pyautoattack", "autoattack"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise UserError("AutoAttack is not installed: run pip install pyautoattack")


def named_version(package: ModuleType) -> str:
    """Return name and version of the package, as results record them."""
    return f"{package.__name__} {version_of(package.__name__, package)}"


@dataclass
class AutoAttackRun:
    """The official evaluation loop, cut into batches that can be saved and continued.

    Each member attacks only the images that are still robust when it begins, in batches of `batch_size`, and
    seeds itself again for each batch, exactly as in `AutoAttack.run_standard_evaluation`. A member named "search M"
    is the same attack M on `quick_forward`: an example counts once `task.forward` is wrong about it, and images whose
    examples it denies are attacked again with M on `task.forward`. So a search only ever takes away images for
    which a verified example exists, and members after it, if any, attack what is left in float32.

    robust: bool [N], at first the images classified correctly without perturbation.
    done: by member, the accuracy it left, its largest perturbation, its seconds; `partial`: of the current member.
    """

    task: Task
    name: str
    members: tuple[str, ...]
    num_classes: int
    robust: Tensor
    package: ModuleType = field(default_factory=find_package)
    # Images the current member has still to attack; None before it begins.
    pending: list[int] | None = None
    done: dict[str, dict[str, float]] = field(default_factory=dict)
    partial: dict[str, float] = field(default_factory=dict)
    path: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)

    def play(self) -> None:
        """Run what is left to run."""
        left = [member for member in self.members if member not in self.done]
        # Survivors come in every batch size: cuDNN would time all its algorithms again for each of them.
        with switched(torch.backends.cudnn, benchmark=False), _heard(self.task.found), torch.no_grad():
            quick = quick_forward(self.task) if any(member.startswith(SEARCH) for member in left) else None
            for member in left:
                self._play_one(member, quick)

    def _play_one(self, member: str, quick: Callable[[Tensor], Tensor] | None) -> None:
        task, world = self.task, self.task.world
        if self.pending is None:
            self.pending = self.robust.nonzero().squeeze(1).tolist()
            self.partial = {"wall_s": 0.0, "max_perturbation": 0.0}
        title = member if len(self.members) == 1 else f"{self.name} {member}"
        # Forwards one batch takes where no image falls: with most of them gone the last ones come quickly.
        calls = _calls(build_ensemble(self.package, task, self.num_classes), member.removeprefix(SEARCH))
        with task.bar(title, len(self.pending), each=calls, unit="forward") as bar:
            bar.set_postfix_str(f"robust {share(self.robust):.2%}", refresh=False)
            finished, batches = 0, tuple[Tensor, ...]()

            def counted(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
                def call(images: Tensor) -> Tensor:
                    if bar.n < finished + calls * len(batches):
                        bar.update(len(batches))
                    return forward(images)

                return call

            exact = build_ensemble(self.package, task, self.num_classes, counted(task.forward))
            fast = quick and build_ensemble(self.package, task, self.num_classes, counted(quick))

            def attack() -> tuple[Tensor, float] | None:
                if world.rank >= len(batches):
                    return None
                rows = batches[world.rank]
                x, y = task.images[rows].to(task.device), task.labels[rows].to(task.device)
                # Copies: the distance below must be from images that no attack has had in its hands.
                if quick is not None and member.startswith(SEARCH):
                    points = _search(task, fast, exact, quick, member.removeprefix(SEARCH), x, y)
                else:
                    points = _perturb(exact, member, x.clone(), y.clone())
                distance = furthest(points, x, task.budget)
                return (task.forward(points).argmax(1) == y).cpu(), distance

            while self.pending:
                began = time.perf_counter()
                # A round: a batch for each rank, as many as there are. All learn what each found before the next.
                batches = torch.tensor(self.pending).split(task.batch_size)[: world.size]
                self._take(batches, together(world, attack), time.perf_counter() - began)
                finished += calls * len(batches)
                bar.set_postfix_str(f"robust {share(self.robust):.2%}", refresh=False)
                bar.update(finished - bar.n)
        self.done[member] = {"accuracy": share(self.robust), **self.partial}
        self.pending = None
        self._save()

    def _take(self, batches: Sequence[Tensor], found: list[tuple[Tensor, float] | None], seconds: float) -> None:
        """Note what a round found of its batches, and save."""
        for rows, (robust, distance) in zip(batches, filter(None, found), strict=True):
            self.robust[rows] = robust
            self.partial["max_perturbation"] = max(self.partial["max_perturbation"], distance)
        self.pending = known(self.pending)[sum(map(len, batches)) :]
        self.partial["wall_s"] += seconds
        self._save()

    def remember(self, folder: Path) -> None:
        """Keep the state in `folder`; continue the one there of the same weights, data and settings."""
        task = self.task
        # Everything the numbers of this run depend on.
        self.fingerprint = {
            "weights": tensors_hash(task.model.state_dict()),
            "data": tensors_hash({"images": task.images, "labels": task.labels}),
            "members": list(self.members),
            "epsilon": task.budget.epsilon,
            "norm": task.budget.norm,
            "seed": task.seed,
            # Each batch seeds the attacks again, so another batch size is another random start for most images.
            "batch_size": task.batch_size,
            "branch": task.branch,
            "tf32": task.tf32,
            "package": named_version(self.package),
        }
        digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.path = folder / f"{self.name}-{digest}.json"
        # Rank 0 alone reads and writes. How many processes there are makes no difference to what is in it.
        state = task.world.first(self._saved)
        if state is not None:
            self.robust = torch.tensor([flag == "1" for flag in state["robust"]])
            self.pending, self.done, self.partial = state["pending"], state["done"], state["partial"]

    def _saved(self) -> dict[str, Any] | None:
        """Return the state of this very run, if there is one; note what is passed over."""
        path, found = known(self.path), self.task.found
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in sorted(path.parent.glob(f"{self.name}-{'[0-9a-f]' * 12}.json")):
            if other != path:
                found.extend(_passed_over(other, self.fingerprint))
        if not path.exists():
            return None
        state = _read_state(path)
        if not isinstance(state, str):
            if state["fingerprint"] == self.fingerprint and len(state["robust"]) == len(self.robust):
                return state
            state = "of another evaluation"
        found.append(f"the AutoAttack state {path} is {state}: not used, attacked anew from the start")
        return None

    def _save(self) -> None:
        if self.path is not None:
            self.task.world.first(self._write)

    def _write(self) -> None:
        # A digit per image: this file is written anew after every batch, and a JSON list of booleans is seven times
        # as long.
        state = {key: getattr(self, key) for key in _STATE} | {"robust": "".join("01"[f] for f in self.robust.tolist())}
        write_text(known(self.path), json.dumps(state | {"sha256": seal(state)}))


def plan(entry: Entry, num_classes: int, found: list[str]) -> tuple[str, ...]:
    """Return the members that exist for this number of classes; the targeted DLR loss needs four logits."""
    if "apgd-t" not in entry.members or num_classes >= 4:
        return entry.members
    if entry.name == "apgd-t":
        raise UserError(f"apgd-t needs at least 4 classes, the model has {num_classes}: use apgd-ce, fab-t and square")
    if num_classes == 3:
        found.append(
            "AutoAttack on 3 classes: the targeted DLR loss needs 4, so apgd-t was replaced by apgd-dlr "
            "(untargeted); this is not the standard version"
        )
        return tuple("apgd-dlr" if m == "apgd-t" else m for m in entry.members)
    found.append(
        f"AutoAttack on {num_classes} classes: the DLR loss needs 3, so apgd-t was left out; this is not the "
        "standard version"
    )
    return tuple(m for m in entry.members if m != "apgd-t")


def build_ensemble(
    package: ModuleType, task: Task, num_classes: int, forward: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """Return the official standard ensemble with everything its defaults would guess stated.

    forward: what it attacks, in place of `task.forward`.
    """
    # The original prints at every batch unless told; its successor has no such argument and logs instead.
    silent = {"verbose": False} if package.__name__ == "autoattack" else {}
    ensemble = package.AutoAttack(
        task.forward if forward is None else forward,
        norm={"linf": "Linf", "l2": "L2"}[task.budget.norm],
        eps=task.budget.epsilon,
        seed=task.seed,
        version="standard",
        device=str(task.device),
        **silent,
    )
    # Nine is right for ten classes and more: with fewer it would ask for the logit of a class that is not there.
    ensemble.apgd_targeted.n_target_classes = ensemble.fab.n_target_classes = min(9, num_classes - 1)
    return ensemble


def _perturb(ensemble: Any, member: str, x: Tensor, y: Tensor) -> Tensor:
    """Attack with one member of the ensemble, set as the official loop does; each call seeds itself."""
    if member in ("apgd-ce", "apgd-dlr"):
        attack = ensemble.apgd
        attack.loss = member.removeprefix("apgd-")
    elif member == "apgd-t":
        attack = ensemble.apgd_targeted
    elif member == "fab-t":
        attack = ensemble.fab
        attack.targeted, attack.n_restarts = True, 1
    else:
        attack = ensemble.square
    return attack.perturb(x, y).detach()


def _search(
    task: Task, fast: Any, exact: Any, quick: Callable[[Tensor], Tensor], member: str, x: Tensor, y: Tensor
) -> Tensor:
    """Return what `member` finds on the quick network, or on the exact one where that denies what was found."""
    points = _perturb(fast, member, x.clone(), y.clone())
    # Among them images that the quick network gets wrong as they are, which the authors' code would not attack.
    denied = (quick(points).argmax(1) != y) & (task.forward(points).argmax(1) == y)
    if bool(denied.any()):
        points = points.clone()
        points[denied] = _perturb(exact, member, x[denied].clone(), y[denied].clone())
    return points


def _calls(ensemble: Any, member: str) -> int:
    """Return how many forwards a member makes of a batch, at most."""
    if member in ("apgd-ce", "apgd-dlr"):
        return ensemble.apgd.n_iter + 2
    if member == "apgd-t":
        return 1 + ensemble.apgd_targeted.n_target_classes * (ensemble.apgd_targeted.n_iter + 2)
    if member == "fab-t":
        return 1 + ensemble.fab.n_target_classes * (2 * ensemble.fab.n_iter + 3)
    return ensemble.square.n_queries + 3


@contextmanager
def _heard(found: list[str]) -> Iterator[None]:
    """Collect what AutoAttack's own checks log, each sentence once, instead of printing it per batch."""
    zero_gradients = "AutoAttack met points with a zero gradient: its gradient attacks stand still there"

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            found.append(zero_gradients if "zero gradient" in text else f"AutoAttack: {text}")

    logger, handler = logging.getLogger("auto-attack"), Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        with switched(logger, propagate=False):
            yield
    finally:
        logger.removeHandler(handler)


def _read_state(path: Path) -> dict[str, Any] | str:
    """Return a state as it was written, or in words why it cannot be used."""
    try:
        state = parse_json(path.read_bytes())
        if not isinstance(state, dict) or not {*_STATE} <= state.keys():
            return "damaged"
        if "sha256" not in state:
            return "without a checksum (of an earlier version)"
        if state["sha256"] != seal(state):
            return "damaged or edited (its checksum differs)"
        # A seal proves nothing of who set it, and all this is worked with.
        return state if _is_whole(state) else "damaged"
    except (ValueError, OSError):
        return "damaged"


def _is_whole(state: dict[str, Any]) -> bool:
    fingerprint, robust, pending, done, partial = (state[key] for key in _STATE)
    if not (isinstance(fingerprint, dict) and isinstance(robust, str) and isinstance(done, dict)):
        return False
    names = fingerprint.get("members")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not {*done} <= {*names}:
        return False
    rows = [] if pending is None else pending
    if not isinstance(rows, list) or not all(type(row) is int and 0 <= row < len(robust) for row in rows):
        return False
    timed = {"wall_s", "max_perturbation"}
    if not (isinstance(partial, dict) and (pending is None or timed <= partial.keys())):
        return False
    members = [(numbers, timed | {"accuracy"}) for numbers in done.values()] + [(partial, set())]
    return all(
        isinstance(numbers, dict)
        and keys <= numbers.keys()
        and all(type(number) in (int, float) and 0 <= number < 1e18 for number in numbers.values())
        for numbers, keys in members
    )


def _passed_over(path: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Say that an unfinished state of other weights, data or settings is not continued."""
    state = _read_state(path)
    if isinstance(state, str):
        return []
    theirs = state["fingerprint"]
    if {*theirs["members"]} <= {*state["done"]}:
        return []
    other = ", ".join(key for key in fingerprint if theirs.get(key) != fingerprint[key])
    return [f"{path.name} holds an unfinished AutoAttack run with other {other}: it was not continued"]
