"""The defenses by name. To add one: a file beside these, and one line in DEFENSES."""

from __future__ import annotations

from fastarat.defenses.ar_at import ARAT
from fastarat.defenses.at import AT
from fastarat.defenses.base import Defense, Run, Views
from fastarat.defenses.standard import Standard

DEFENSES: dict[str, type[Defense]] = {d.name: d for d in (Standard, AT, ARAT)}

__all__ = ["ARAT", "AT", "DEFENSES", "Defense", "Run", "Standard", "Views"]
