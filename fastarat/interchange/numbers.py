"""Plain NumPy numbers in others' checkpoints, such as an accuracy, read without NumPy's unpickling."""

from __future__ import annotations

from typing import Any

import numpy as np


class _Dtype:
    """Stands in for `numpy.dtype` in a file, whose `__setstate__` follows what it is given into foreign memory."""

    def __init__(self, code: str, *flags: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _number(dtype: _Dtype, content: bytes) -> float:
    """Read a plain number, as `numpy._core.multiarray.scalar` would."""
    if dtype.code not in ("f2", "f4", "f8", "i4", "i8", "b1") or dtype.order not in ("<", ">", "|", "="):
        raise ValueError("a number of a kind that no accuracy has")
    (number,) = np.frombuffer(content, dtype.order + dtype.code)
    return number.item()


def numpy_numbers() -> list[Any]:
    """Names that plain NumPy numbers (an accuracy beside the weights) need, and what is called in their place."""
    return [
        (_number, "numpy._core.multiarray.scalar"),
        (_number, "numpy.core.multiarray.scalar"),
        (_Dtype, "numpy.dtype"),
    ]
