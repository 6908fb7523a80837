"""Curves, example images and tables of finished or running runs, as PNG and one self-contained HTML file."""

from fastarat.report.figures import curves_figure, examples_figure
from fastarat.report.page import report
from fastarat.report.subjects import Examples, first_per_class, predicted

__all__ = ["Examples", "curves_figure", "examples_figure", "first_per_class", "predicted", "report"]
