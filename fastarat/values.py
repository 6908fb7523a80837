"""What a person may give as a setting: names, numbers, budgets. One place, the same words from Python and flags."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastarat.device import readable
from fastarat.errors import UserError, nearest

Norm = Literal["linf", "l2"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
EPSILON = 8 / 255
"""The field's budget under L-infinity, in pixel units: the default everywhere. Its step is `checked_budget`'s."""


# Other spellings in use (RobustBench, torchattacks, NumPy, PyTorch, YAML), case and separators aside.
_ALIASES = {
    "linf": ("inf", "infty", "infinity", "linfinity", "l∞", "∞"),
    "l2": ("2",),
    "fp32": ("float32", "float"),
    "tf32": ("tensorfloat32",),
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half"),
    "ce": ("crossentropy",),
    "kl": ("kldiv",),
    "on": ("true",),
    "off": ("false",),
    "torch": ("fastarat",),  # an optimiser that was ours; saved configs name it
}


def _folded(name: Any) -> str:
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    # Separators between letters only: "-inf" is no spelling of "inf", and an arrow is no separator.
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", str(name).strip().lower().removeprefix("torch."))


def named(key: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return the one of `choices` that `value` names, whatever its case, separators or usual other spelling.

    "Linf", "L_inf" and float("inf") are "linf", torch.bfloat16 is "bf16". Raises: UserError with the nearest choice.
    """
    if isinstance(value, str) and value in choices:
        return value
    if isinstance(value, (str, numbers.Number, torch.dtype)):
        given = _folded(value)
        for choice in choices:
            if given == _folded(choice) or given in _ALIASES.get(choice, ()):
                return choice
    near = nearest(str(value), map(str, choices)) or "."
    raise UserError(f"{key}={shown(value)}{near} Expected one of: {', '.join(map(str, choices))}.")


def shown(value: Any) -> str:
    """Return `value` as an error names it, short whatever it is."""
    if isinstance(value, Tensor) and value.dim():
        return f"{_a(str(value.dtype).removeprefix('torch.'))} tensor {list(value.shape)}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits, say
        return _a(type(value).__name__)
    return text if len(text) <= 80 and "\n" not in text else _a(type(value).__name__)


def _a(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def coerce(value: Any, hint: Any, key: str, source: str = "", about: str = "") -> Any:
    """Turn a value from YAML, the command line or Python into the field's type; 8/255 is a number, Linf a norm.

    hint: the type; what is not known here (a class of the person's own) is taken as it is.
    about: what the field means, for the error. Raises: UserError naming `source` and `key`, and what was expected.
    """
    where = f"{source}: " if source else ""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    # A Literal may itself offer "none" (no random start), which is then not the missing value.
    offered = {choice for o in options if typing.get_origin(o) is Literal for choice in typing.get_args(o)}
    unset = value is None or (isinstance(value, str) and value.lower() in ("none", "null", "auto"))
    if type(None) in options and unset and (value is None or value.lower() not in offered):
        return None
    options = [o for o in options if o is not type(None)]
    if len(options) > 1:
        if type(value) in _READERS and type(value) in options:
            return value
        for option in options[:-1]:
            with suppress(UserError):
                return coerce(value, option, key, source, about)
    hint = options[-1]
    origin = typing.get_origin(hint)
    if origin is Literal:
        return named(f"{where}{key}", value, typing.get_args(hint))
    try:
        if hint in _READERS:
            return _READERS[hint][0](value)
        if origin is tuple:
            return _tuple(value, typing.get_args(hint), key, source)
        if not isinstance(hint, type) or hint is Any or _is(value, hint):
            return value
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError):  # the last: a tensor of several values
        pass
    wanted = "values with commas between them" if origin is tuple else _a(hint.__name__)
    if hint in _READERS:
        wanted = _READERS[hint][1] + (f": {about}" if hint is str and about else "")
    raise UserError(f"{where}{key}={shown(value)}: expected {wanted}")


def _is(value: Any, kind: type) -> bool:
    with suppress(TypeError):
        return isinstance(value, kind)
    return True  # a Protocol, say: not to be judged


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _bool(value: Any) -> bool:
    return bool(value) if _is_bool(value) else _WORDS[str(value).lower()]


def _int(value: Any) -> int:
    if _is_bool(value):
        raise ValueError
    result = int(value)
    if not isinstance(value, str) and value != result:
        raise ValueError
    if result.bit_length() > 100:  # no count is; and further on it would overflow, or take ages to print
        raise OverflowError
    return result


def _float(value: Any) -> float:
    if _is_bool(value):
        raise ValueError
    if isinstance(value, str) and "/" in value:
        top, bottom = value.split("/")
        return float(top) / float(bottom)
    result = float(value)
    if result != result:
        raise ValueError
    return result


def _str(value: Any) -> str:
    if not isinstance(value, (str, int, float, os.PathLike)) or isinstance(value, bool):
        raise ValueError
    return str(value)


_READERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a number (fractions such as 8/255 are read)"),
    str: (_str, "text"),
}


def _tuple(value: Any, hints: tuple, key: str, source: str) -> tuple:
    items = value.split(",") if isinstance(value, str) else list(value)
    items = [v.strip() if isinstance(v, str) else v for v in items]
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = hints[:1] * len(items)
    return tuple(coerce(v, hint, key, source) for v, hint in zip(items, hints, strict=True))


@functools.cache
def _interval(text: str) -> tuple[Callable[[float], bool], float, float]:
    ends = (end.partition("^") for end in text[1:-1].split(", "))
    low, high = (float(base) ** float(power or 1) for base, _, power in ends)

    def holds(value: float) -> bool:
        above = value >= low if text[0] == "[" else value > low
        return above and (value <= high if text[-1] == "]" else value < high)

    return holds, low, high


def within(key: str, value: Any, interval: str, about: str = "") -> Any:
    """Return `value`, a number or several, if it lies in `interval`, written "[0, 1)", "(-inf, inf]" or "[0, 2^63)".

    Raises: UserError with the interval and `about`, what the number means.
    """
    holds, low, high = _interval(interval)
    for v in value if isinstance(value, tuple) else (value,):
        if holds(v):
            continue
        if isinstance(v, int) and high == math.inf:
            raise UserError(f"{key}={v}: expected {low:g} or more")
        given = v if isinstance(v, int) else f"{v:g}"
        raise UserError(f"{key}={given} is outside {interval}" + (about and f": {about}"))
    return value


def whole(key: str, value: Any, least: int = 1, below: str = "inf") -> int:
    """Return `value` as an int of at least `least`, below `below` (as `within` writes it). Raises: UserError."""
    return within(key, coerce(value, int, key), f"[{least}, {below})")


def checked_seed(seed: Any) -> int:
    """Return `seed` as an int that every generator takes, of the interval a config allows. Raises: UserError."""
    return whole("seed", seed, 0, "2^63")


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name; Any where an annotation cannot be looked up from here."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {f.name: Any for f in dataclasses.fields(cls)}


def settle(config: Any, where: str = "", skip: Sequence[str] = ()) -> None:
    """Give each field of a frozen dataclass its declared type, in place; for its `__post_init__`.

    A field's metadata may hold its `range` (see `within`) and its `help`. Defaults are taken as they are.
    where: put before the names, "attack.". skip: fields to leave alone.
    Raises: UserError naming the field, its value and what was expected.
    """
    hints = hints_of(type(config))
    for f in dataclasses.fields(config):
        value, key, about = getattr(config, f.name), where + f.name, f.metadata.get("help", "")
        if value is f.default or f.name in skip:
            continue
        value = coerce(value, hints[f.name], key, about=about)
        if value is not None and "range" in f.metadata:
            within(key, value, f.metadata["range"], about)
        object.__setattr__(config, f.name, value)


class Budget(NamedTuple):
    """What an attack may do: radius and PGD step in pixel units, in which norm."""

    epsilon: float
    step_size: float
    norm: Norm


def checked_length(key: str, value: Any, norm: Norm, *, shape: Sequence[int] | None = None, read: bool = False) -> Any:
    """Return a radius or step in pixel units, checked: a float, or a 0-d tensor as it is.

    shape: [..., C, H, W] of the images, whose diagonal bounds an L2 length. read: look into a tensor too.
    Raises: UserError for what is no length, or given in other units.
    """
    if isinstance(value, Tensor):
        if value.dim() or value.dtype != torch.float32:
            mend = f"; write {key.rpartition('.')[2]}.float()" if value.is_floating_point() and not value.dim() else ""
            raise UserError(f"{key}={shown(value)}: expected a number or a 0-d float32 tensor{mend}")
        if not (read and readable(value)):
            return value
        number = value.item()
    else:
        number = value = coerce(value, float, key)
    size = () if norm == "linf" or shape is None else shape[-3:]
    diagonal = math.sqrt(math.prod(size)) if size else None
    highest = 1.0 if norm == "linf" else diagonal or math.inf
    if math.isfinite(number) and 0 < number <= highest:
        return value
    units = "pixel units" if norm == "linf" else "a length in pixel units"
    apart = f", and no two images of {' x '.join(map(str, size))} lie further apart"
    units += apart if diagonal else " where 1.0 is the full range"
    # Nobody means -0.1/255 or inf/255; between 1 and 255 a budget is nearly always one in 1/255.
    usual = (8 if norm == "linf" else 128) // (4 if "step" in key else 1)
    mend = f"; write {number:g}/255" if 1 < number <= 255 else f", such as {usual}/255"
    upper = "inf)" if highest == math.inf else f"{highest:.4g}]"
    raise UserError(f"{key}={number:g} is outside (0, {upper}: {units}{mend}")


def checked_budget(
    epsilon: Any,
    step_size: Any = None,
    norm: Any = "linf",
    *,
    shape: Sequence[int] | None = None,
    read: bool = True,
    where: str = "",
) -> Budget:
    """Return the threat model, checked and in canonical names; the default step is epsilon / 4.

    shape, read: as in `checked_length`. where: put before the names: "attack.", or "--" of flags.
    """
    norm = named(f"{where}norm", norm, Norm.__args__)
    epsilon = checked_length(f"{where}epsilon", epsilon, norm, shape=shape, read=read)
    if step_size is None:
        return Budget(epsilon, epsilon / 4, norm)
    step = "step-size" if where.startswith("--") else "step_size"
    return Budget(epsilon, checked_length(f"{where}{step}", step_size, norm, shape=shape, read=read), norm)


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield {"attack": {"epsilon": v}} as ("attack.epsilon", v)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
