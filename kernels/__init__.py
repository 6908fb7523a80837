"""The fused operations of fastarat, each with a plain PyTorch twin. Importing this imports no Triton."""

from .backend import interpreting, own_arrivals, why_not_triton
from .conv import (
    Norm,
    conv_bias_relu,
    conv_kinds,
    fold_batchnorm,
    kind_of,
    why_not_conv_bias_relu,
    why_not_fold,
)
from .fork import fork, pick_pointwise
from .pgd_update import pgd_update
from .split_bn import SplitBN, split_bn
from .split_bn_join import joins, split_bn_join
from .stem import stem_applies, stem_conv, stem_input_grad

__all__ = [
    "Norm",
    "SplitBN",
    "conv_bias_relu",
    "conv_kinds",
    "fold_batchnorm",
    "fork",
    "interpreting",
    "joins",
    "kind_of",
    "own_arrivals",
    "pgd_update",
    "pick_pointwise",
    "split_bn",
    "split_bn_join",
    "stem_applies",
    "stem_conv",
    "stem_input_grad",
    "why_not_conv_bias_relu",
    "why_not_fold",
    "why_not_triton",
]
