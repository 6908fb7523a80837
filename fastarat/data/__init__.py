"""Data sets, the validation split, both loaders and the augmentation they share.

A data set is uint8 pixels and int64 labels, wherever it comes from. To add one with a name, add an entry to
`sets.SETS`. The order of an epoch and its augmentation come from our own generators.
"""

from fastarat.data.augmenting import Augment, augment, check_transforms, default_augment
from fastarat.data.extra import mixed_loader, open_extra
from fastarat.data.loaders import Loader, LoaderKind, make_loader, mean_std
from fastarat.data.mixing import CutMix
from fastarat.data.own import Data, as_dataset, as_split
from fastarat.data.randaugment import RandAugment
from fastarat.data.sets import SETS, info, limited, load_dataset, prepare
from fastarat.data.splits import Batch, Dataset, Split, Stored, derive_seed, stratified_indices

__all__ = [
    "SETS",
    "Augment",
    "Batch",
    "CutMix",
    "Data",
    "Dataset",
    "Loader",
    "LoaderKind",
    "RandAugment",
    "Split",
    "Stored",
    "as_dataset",
    "as_split",
    "augment",
    "check_transforms",
    "default_augment",
    "derive_seed",
    "info",
    "limited",
    "load_dataset",
    "make_loader",
    "mean_std",
    "mixed_loader",
    "open_extra",
    "prepare",
    "stratified_indices",
]
