"""What is attacked, and how fast: two frozen specs, validated where they are made.

`Config` holds them; `TrainStep`, `attacks.PGD` and the bench take them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from fastarat.errors import UserError, nearest
from fastarat.kernels import interpreting, why_not_triton
from fastarat.values import EPSILON, Norm, Precision, checked_budget, named, settle

Start = Literal["none", "uniform", "uniform-unclamped", "gaussian", "l2"]
Objective = Literal["ce", "kl", "cw"]
BatchNormMode = Literal["eval", "train", "train-frozen"]
Backend = Literal["auto", "triton", "plain", "cooperative"]
Capture = Literal["auto", "on", "off", "fake"]
_T = TypeVar("_T")


def known(value: _T | None) -> _T:
    """Return `value`, which by now is not None: `resolve` has filled the setting in, say, or backward the gradient."""
    assert value is not None, "still unset: a config has to be resolved, an attack completed, before it is used"
    return value


def setting(default: Any, text: str, within: str = "") -> Any:
    """A dataclass field with its help and, for numbers, the interval they lie in (as `checks.within` writes it)."""
    return field(default=default, metadata={"help": text, **({"range": within} if within else {})})


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The training attack. Unset fields follow the defense.

    epsilon, step_size: float, or a 0-d float32 tensor on the device, which a captured step sees move.
    objective: a name, or a function (logits [B, K], target) -> float [B], maximised.
    Raises: UserError for a budget out of range, an unknown name, a count below 1.
    """

    epsilon: float = setting(EPSILON, "budget in pixel units, 1.0 the full range; fractions such as 8/255 are read")
    step_size: float | None = setting(None, "pixel units (default: epsilon / 4)")
    num_steps: int = setting(10, "gradient steps", "[1, inf)")
    num_restarts: int = setting(1, "keep the strongest of this many starts", "[1, inf)")
    norm: Norm = setting("linf", "ball")
    bn: BatchNormMode | None = setting(
        None,
        "BatchNorm during the attack (default: the defense's): running statistics; batch statistics that move "
        "the running ones; batch statistics that do not",
    )
    start: Start | None = setting(None, "random start (default: the defense's)")
    objective: Objective | None = setting(None, "what is maximised (default: the defense's)")

    def __post_init__(self) -> None:
        settle(self, "attack.", skip=("epsilon", "step_size", *(("objective",) if callable(self.objective) else ())))
        budget = checked_budget(self.epsilon, self.step_size, self.norm, where="attack.")
        object.__setattr__(self, "epsilon", budget.epsilon)
        if self.step_size is not None:
            object.__setattr__(self, "step_size", budget.step_size)

    def stepping(self) -> Attack:
        """Return this attack with its step size filled in."""
        step_size = checked_budget(self.epsilon, self.step_size, self.norm, where="attack.").step_size
        return dataclasses.replace(self, step_size=step_size)


@dataclass(frozen=True, kw_only=True)
class Fast:
    """How fast: every path has a flag that turns it off, and a plain twin that a test compares it with."""

    precision: Precision = setting("fp32", "of convolutions; statistics and losses are float32")
    channels_last: bool = setting(True, "memory format of images and weights")
    kernels: Backend = setting("auto", "fused Triton kernels or their plain twins")
    capture: Capture = setting(
        "auto", "replay the whole step as one CUDA graph; fake: its buffers and checks, without a graph"
    )
    compile_loss: bool = setting(False, "torch.compile the loss")
    fold_bn: bool = setting(True, "in eval-mode attacks, fold BatchNorm into the convolutions once per step")
    cudnn_plans: int = setting(
        10,
        "plans cuDNN's autotuning times per convolution, in train and bench on a GPU; 0: all, which takes longer",
        "[0, inf)",
    )

    def __post_init__(self) -> None:
        settle(self)


def fields_of(config: Any) -> list[dataclasses.Field[Any]]:
    """Fields of a dataclass, or an instance, as people read them: what is run first, how fast after it."""
    cls = config if isinstance(config, type) else type(config)
    inherited = {f.name for f in dataclasses.fields(Fast)} if issubclass(cls, Fast) and cls is not Fast else set()
    return sorted(dataclasses.fields(cls), key=lambda f: f.name in inherited)


_Spec = TypeVar("_Spec", Attack, Fast)


def spec_of(cls: type[_Spec], given: _Spec | None, options: dict[str, Any]) -> _Spec:
    """Return `given`, or the defaults, with the fields of `cls` that `options` names; they are taken out of it.

    Raises: UserError when `given` is something else.
    """
    if given is not None and not isinstance(given, cls):
        raise UserError(f"{cls.__name__.lower()}={given!r:.80}: expected a fastarat.{cls.__name__}")
    # Taken out, so that what is left over in the end belongs to nobody and is a mistake.
    if given is not None and type(given) is not cls:  # a Config is a Fast and more: its own fields are not the step's
        values = {f.name: getattr(given, f.name) for f in dataclasses.fields(cls)}
        given = cls(**{name: value for name, value in values.items() if value is not None})
    own = {f.name: options.pop(f.name) for f in dataclasses.fields(cls) if f.name in options}
    return dataclasses.replace(given, **own) if given is not None else cls(**own)


def none_left(options: dict[str, Any], who: str, *specs: type) -> None:
    """Raise UserError for the first of `options`, which none of `specs` took."""
    for name in options:
        known = [f.name for cls in specs for f in dataclasses.fields(cls)]
        raise UserError(f"{who} takes no {name!r}{nearest(name, known) or '.'} Known: {', '.join(known)}.")


def checked_backend(key: str, backend: str, device: torch.device) -> str:
    """Return a kernel backend's canonical name. Raises: UserError for an unknown one, or Triton where it is not."""
    backend = named(key, backend, Backend.__args__)
    if backend in ("triton", "cooperative") and not interpreting() and (reason := why_not_triton(device)) is not None:
        raise UserError(f"{key}={backend} cannot be had here: {reason}; write {key}=auto")
    return backend
