"""The fused operations of fastarat, each with a plain PyTorch twin. Importing this imports no Triton."""

from .backend import interpreting, why_not_triton
from .pgd_update import pgd_update
from .split_bn import SplitBN, split_bn

__all__ = ["SplitBN", "interpreting", "pgd_update", "split_bn", "why_not_triton"]
