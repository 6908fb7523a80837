"""Robust accuracy that can be printed: clean, PGD and the official AutoAttack, with the checks it needs.

Every number is measured in eval mode and float32 with frozen parameters, around the unmodified clean images.
"""

from fastarat.evaluation.checks import NonFinite
from fastarat.evaluation.evaluate import (
    Evaluation,
    adversarial_examples,
    check_record,
    check_writable,
    data_hash,
    evaluate,
    saved_evaluation,
    wilson,
)
from fastarat.evaluation.task import attack_title, collect, in_pixels, parse_attacks

__all__ = [
    "Evaluation",
    "NonFinite",
    "adversarial_examples",
    "attack_title",
    "check_record",
    "check_writable",
    "collect",
    "data_hash",
    "evaluate",
    "in_pixels",
    "parse_attacks",
    "saved_evaluation",
    "wilson",
]
