"""One training step, and how it is captured."""

from fastarat.engine.graphs import capture
from fastarat.engine.step import TrainStep

__all__ = ["TrainStep", "capture"]
