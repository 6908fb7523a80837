"""Data and network that a person gave in Python beside a config: how the config names them, and what is missing."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import nn

from fastarat.config import Config
from fastarat.data import Dataset, as_dataset
from fastarat.errors import UserError
from fastarat.nets import own
from fastarat.runs import dataset_of
from fastarat.texts import GIVEN


class Given(NamedTuple):
    """dataset: of the person's data, None for the config's. model: an nn.Module, or a function that makes one."""

    dataset: Dataset | None = None
    model: own.Given | None = None

    def dataset_of(self, config: Config) -> Dataset:
        """Return the data set of a run: the one given, or the one its config names."""
        return dataset_of(config) if self.dataset is None else self.dataset


def with_given(config: Config, data: Any, model: Any, *, resumes: bool) -> tuple[Config, Given]:
    """Return the config that names what was given, and that itself.

    resumes: whether the config is of a run that goes on, which is then asked for the same things.
    Raises: UserError for what is missing, other than before, named as well, or wrong in itself.
    """
    dataset = None
    if data is not None or config.dataset.startswith(GIVEN):
        dataset = _dataset(config, data, resumes)
    if model is not None or (config.model or "").startswith(GIVEN):
        config = _named_model(config, model, resumes)
    if dataset is not None:
        changes: dict[str, Any] = {"dataset": dataset.given}
        source = dataset.train.source
        if source is not None and source.in_order:
            changes["batch_size"] = source.batch_size
        config = dataclasses.replace(config, **changes)
    return config, Given(dataset, model)


def _dataset(config: Config, data: Any, resumes: bool) -> Dataset:
    named, default = config.dataset, next(f.default for f in dataclasses.fields(Config) if f.name == "dataset")
    before = named if resumes and named.startswith(GIVEN) else None
    if data is None:
        raise UserError(
            f"dataset={named}: that was given in Python, and is asked for again: fastarat.train(resume=..., data=...)"
            if before
            else f"dataset={named}: such a name stands for data given in Python; write fastarat.train(config, data=...)"
        )
    if before is None and (resumes or named not in (default, "")) and not named.startswith(GIVEN):
        which = "the run was trained on" if resumes else "the config names"
        raise UserError(f"data was given, but {which} dataset={named}: give one of the two")
    if config.image_size is not None:
        raise UserError(f"image_size={config.image_size} is for image folders; resize in the data set's transform")
    dataset = as_dataset(data, val_images=config.eval.val_images, hold=True if config.loader == "resident" else None)
    if config.loader == "ffcv":
        raise UserError("loader=ffcv reads .beton files, not data given in Python: leave it out")
    if config.limit_train is not None and dataset.train.source is not None and dataset.train.source.in_order:
        raise UserError(
            f"limit_train={config.limit_train}: a DataLoader chooses its images itself; give it a "
            "torch.utils.data.Subset"
        )
    found = str(dataset.given)
    if before is not None and before.partition("@")[2] != found.partition("@")[2]:
        raise UserError(
            f"the data given is not what the run was trained on: it was {before.removeprefix(GIVEN)}, and is "
            f"{found.removeprefix(GIVEN)} (name@content); give the same images, labels and validation "
            "images, read as before (hold=)"
        )
    # The name it had: another one for the same content makes no other run.
    return dataset if before is None else dataclasses.replace(dataset, given=before)


def _named_model(config: Config, model: Any, resumes: bool) -> Config:
    named = config.model
    given_before = named is not None and named.startswith(GIVEN)
    if model is None:
        raise UserError(
            f"model={named}: that network was given in Python, and is asked for again: fastarat.train(resume=..., "
            "model=...)"
            if resumes
            else f"model={named}: such a name stands for a network given in Python; write fastarat.train(config, "
            "model=...)"
        )
    if named is not None and not given_before:
        which = "the run was trained with" if resumes else "the config names"
        raise UserError(f"a model was given, but {which} model={named}: give one of the two")
    own.check_given(model)
    if resumes and given_before:
        return config
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", type(model).__name__)
    return dataclasses.replace(config, model=f"{GIVEN}{name[:60]}")
