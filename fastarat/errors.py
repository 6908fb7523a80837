"""The one exception a person sees: what was wrong, what was expected, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MANY = 40  # names that a line still holds


class UserError(ValueError):
    """A mistake the person can mend. The command line prints its text alone and exits with `exit_code`."""

    exit_code = 2


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the choice most like `name`, or an empty string."""
    given = str(name).lower()
    likeness = {choice: difflib.SequenceMatcher(None, choice.lower(), given).ratio() for choice in choices}
    best = max(likeness, key=likeness.__getitem__, default="")  # of equals the first: to 32 fp32, not tf32
    return f"; did you mean {best!r}?" if likeness.get(best, 0) >= 0.5 else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UserError:
    """Build the error for a name that is not one of `choices`: it names all of them, or of many the nearest three."""
    choices = sorted(choices)
    known = f"Known: {', '.join(choices)}."
    if len(choices) > _MANY:
        close = difflib.get_close_matches(str(name), choices, n=3, cutoff=0)
        known = f"Nearest of {len(choices):,} known: {', '.join(close)}."
    return UserError(f"unknown {kind} {name!r}{nearest(name, choices) or '.'} {known}")
