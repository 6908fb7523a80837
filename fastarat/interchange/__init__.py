"""Weights in and out: released checkpoints into a run folder, a branch of a run out as an ordinary network."""

from fastarat.interchange.exporting import FORMATS, TOLERANCE, export
from fastarat.interchange.importing import import_checkpoint

__all__ = ["FORMATS", "TOLERANCE", "export", "import_checkpoint"]
