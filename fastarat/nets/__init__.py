"""Networks: split BatchNorm and its routes, the built-in architectures, and the network as an attack sees it."""

from fastarat.nets.attacker import Attacker
from fastarat.nets.batchnorm import SplitBatchNorm2d, branch, split_batchnorm
from fastarat.nets.models import build_model

__all__ = ["Attacker", "SplitBatchNorm2d", "branch", "build_model", "split_batchnorm"]
