"""Robust accuracy that can be printed: clean, PGD and the official AutoAttack, with the checks it needs.

Every number is measured in eval mode and float32 with frozen parameters, around the unmodified clean images.
"""

from fastarat.evaluation.checks import NonFinite
from fastarat.evaluation.evaluate import adversarial_examples, data_hash, evaluate
from fastarat.evaluation.result import (
    Evaluation,
    check_record,
    check_replaceable,
    check_writable,
    keep_previous,
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
    "check_replaceable",
    "check_writable",
    "collect",
    "data_hash",
    "evaluate",
    "in_pixels",
    "keep_previous",
    "parse_attacks",
    "saved_evaluation",
    "wilson",
]
