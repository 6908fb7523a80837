"""The defenses by name. To add one: a file beside these, and one line in DEFENSES."""

from __future__ import annotations

from fastarat.defenses.ar_at import ARAT
from fastarat.defenses.arrest import ARREST
from fastarat.defenses.at import AT
from fastarat.defenses.base import Defense, Forward, Passes, Views
from fastarat.defenses.ca_at import CAAT
from fastarat.defenses.cure import CURE
from fastarat.defenses.fat import FAT, GAIRFAT
from fastarat.defenses.gairat import GAIRAT
from fastarat.defenses.lbgat import LBGAT
from fastarat.defenses.mart import MART
from fastarat.defenses.reweight import DONE, VIR
from fastarat.defenses.standard import Standard
from fastarat.defenses.trades import TRADES

_ALL = (Standard, AT, TRADES, MART, LBGAT, ARREST, ARAT, GAIRAT, FAT, GAIRFAT, CURE, VIR, DONE, CAAT)
DEFENSES: dict[str, type[Defense]] = {d.name: d for d in _ALL}

__all__ = [
    "ARAT",
    "ARREST",
    "AT",
    "CAAT",
    "CURE",
    "DEFENSES",
    "DONE",
    "FAT",
    "GAIRAT",
    "GAIRFAT",
    "LBGAT",
    "MART",
    "TRADES",
    "VIR",
    "Defense",
    "Forward",
    "Passes",
    "Standard",
    "Views",
]
