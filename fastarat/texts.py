"""Text that somebody else wrote (names, classes, notes), made safe for where it is printed."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator

GIVEN = "python:"
"""What `Config.dataset` and `Config.model` begin with where a person's own object was given, in Python."""
# Control characters, marks that turn the writing direction, and halves of surrogate pairs: a terminal obeys the first,
# a reader is deceived by the second, and no encoder takes the third.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LATEX = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "\\": "\\textbackslash{}",
}


def printable(text: str, keep: str = "") -> str:
    """Write what a terminal would obey, or nobody would see, as an escape (`\\x1b`), newlines included.

    keep: characters to leave, such as newline in a text of several lines.
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else match[0].encode("unicode_escape").decode("ascii")

    return _UNSEEN.sub(escaped, text)


def latex(text: str) -> str:
    """Write text so that LaTeX prints it and runs none of it."""
    return "".join(_LATEX.get(c, c) for c in printable(text))


def markdown(text: str) -> str:
    """Write text on one line of Markdown, in a table's cell too: no markup of its own, no HTML, no link or picture."""
    return re.sub(r"([\\`|*\[\]])", r"\\\1", printable(text)).replace("&", "&amp;").replace("<", "&lt;")


def markdown_code(text: str) -> str:
    """Write text between backticks, which it cannot end."""
    return "`" + printable(text).replace("`", "'").replace("|", "/") + "`"


def cell(value: object) -> object:
    """Write a value into CSV so that a spreadsheet takes it for text where it is text, never for a formula."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


@contextlib.contextmanager
def any_encoding() -> Iterator[None]:
    """Let no character end a command: what the terminal's encoding lacks is printed as an escape, until the end."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [s.errors for s in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile: its reader has gone
                stream.reconfigure(errors=errors)
