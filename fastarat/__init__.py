"""fastarat: fast, faithful adversarial training for image classifiers."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastarat import attacks, losses
from fastarat.config import Config
from fastarat.defenses import (
    ARAT,
    ARREST,
    AT,
    CAAT,
    CURE,
    DEFENSES,
    DONE,
    FAT,
    GAIRAT,
    GAIRFAT,
    LBGAT,
    MART,
    TRADES,
    VIR,
    Defense,
    Standard,
    Views,
)
from fastarat.engine.graphs import capture
from fastarat.engine.step import TrainStep
from fastarat.errors import UserError
from fastarat.evaluation import Evaluation, evaluate
from fastarat.nets.batchnorm import SplitBatchNorm2d, branch, split_batchnorm
from fastarat.nets.models import build_model
from fastarat.specs import Attack, Fast
from fastarat.training import Result, train

try:
    __version__ = version("fastarat")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

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
    "Attack",
    "Config",
    "Defense",
    "Evaluation",
    "Fast",
    "Result",
    "SplitBatchNorm2d",
    "Standard",
    "TrainStep",
    "UserError",
    "Views",
    "attacks",
    "branch",
    "build_model",
    "capture",
    "evaluate",
    "losses",
    "split_batchnorm",
    "train",
]
