"""Data sets, the validation split, both loaders and the augmentation they share.

A data set is uint8 pixels and int64 labels, wherever it comes from. To add one with a name, add an entry to
`sets.SETS`. The order of an epoch and its augmentation come from our own generators.
"""

from fastarat.data.loaders import Augment, Loader, LoaderKind, augment, default_augment, make_loader, mean_std
from fastarat.data.sets import SETS, info, limited, load_dataset, prepare
from fastarat.data.splits import Batch, Dataset, Split, Stored, derive_seed, stratified_indices

__all__ = [
    "SETS",
    "Augment",
    "Batch",
    "Dataset",
    "Loader",
    "LoaderKind",
    "Split",
    "Stored",
    "augment",
    "default_augment",
    "derive_seed",
    "info",
    "limited",
    "load_dataset",
    "make_loader",
    "mean_std",
    "prepare",
    "stratified_indices",
]
