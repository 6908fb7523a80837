"""What a run that goes on is trained with: the config inside its checkpoint, and the few settings that may differ."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from fastarat.config import Config, from_dict, to_dict
from fastarat.defenses.naming import Foreign
from fastarat.errors import UserError
from fastarat.files import load_checkpoint
from fastarat.runs import MAY_DIFFER, Run, differences
from fastarat.schedules import counted
from fastarat.specs import known
from fastarat.stopping import over_early
from fastarat.values import coerce, flat


def newest(run: Run, map_location: Any = "cpu") -> dict[str, Any] | None:
    """Read the checkpoint that is furthest, unfinished.pt or what `Run.load` gives; None where there is none.

    Of damaged ones the one before, which a warning says. Raises: UserError if all are damaged.
    """
    file = run.checkpoint("unfinished")
    within, error = None, None
    if file.is_file():
        try:
            within = load_checkpoint(file, map_location)
        except UserError as found:
            error = found
    state = None
    if run.checkpoint().is_file() or run.checkpoint("previous").is_file():
        try:
            state = run.load(map_location=map_location)
        except UserError:
            if within is None:
                raise
    if error is not None:
        begin = f"after epoch {state['epoch']}" if state else "from the start"
        warnings.warn(f"{error}. Going on {begin} instead", stacklevel=2)
    # One that is behind was left by a kill between the end of its epoch and its removal.
    behind = within is None or (state is not None and state["epoch"] > within["epoch"])
    return state if behind else within


def finished(run: Run) -> bool:
    """Whether all epochs, and the averaging after them, are done; opens the last checkpoint."""
    config = run.read_config()
    # By the checkpoint and not by metrics.jsonl, which may be a line ahead of what can be resumed.
    state = None if config is None else newest(run)
    if config is None or state is None or (state["epoch"] < (config.epochs or 0) and not _over_early(config, state)):
        return False
    return not config.swa or run.averaged_at() == state["epoch"]


def _over_early(config: Config, state: dict[str, Any]) -> bool:
    count = (state.get("average") or {"count": 0})["count"] if config.swa else None
    return over_early(config, state["epoch"], (state.get("best") or {"epoch": 0})["epoch"], count)


def config_to_resume(run: Run, overrides: dict[str, Any], defense: Any = None) -> Config:
    """Return the config the run was trained with, by its checkpoint, with `overrides`.

    defense: the run's own, a Defense or its class; needed where it is none of fastarat's, as is its name among
    `overrides` from a command line.
    More `epochs` than it has extend the run: those it had keep their schedule, to the last, and the others follow that
    of the longer run (`Config.extended`, `schedules.total_at`). Another `early_stop` may end it sooner, or later.
    Raises: UserError for a setting that may not differ, or a config.yaml that was changed since.
    """
    run.must_exist()
    saved = _trained_with(run)
    if "epochs" in overrides:
        saved = _extended(run, saved, coerce(overrides["epochs"], int, "epochs"))
        overrides = {key: value for key, value in overrides.items() if key != "epochs"}
    if "early_stop" in overrides:  # what was trained so far is the same with another: it says only where that ends
        saved = replace(saved, early_stop=coerce(overrides["early_stop"], int | None, "early_stop"))
        overrides = {key: value for key, value in overrides.items() if key != "early_stop"}
    if isinstance(saved.defense, Foreign) and defense is None:
        named = overrides.get("defense")
        if isinstance(named, dict) and named.keys() == {"name"}:
            overrides = {key: value for key, value in overrides.items() if key != "defense"}
            defense = named["name"]
    for key in overrides:
        if key not in MAY_DIFFER:
            raise UserError(
                f"--resume continues {run.path} as it was started: {key} cannot change (only "
                f"{', '.join(MAY_DIFFER[:-1])}, early_stop may, and epochs grow); start another run for that"
            )
    if isinstance(saved.defense, Foreign):
        saved = replace(saved, defense=saved.defense.trusted(defense, run.path))
    elif defense is not None:
        saved = replace(saved, defense=defense)
    values = {**to_dict(saved), "defense": saved.defense, **overrides, "out": str(run.path)}
    return from_dict(values, source=str(run.config_file))


def _trained_with(run: Run) -> Config:
    """The config inside the checkpoint; config.yaml's where there is none yet. Raises: UserError if they differ."""
    state = newest(run)
    if state is None or not isinstance(state.get("config"), dict):
        return known(run.read_config())
    truth = from_dict(state["config"], source=str(run.checkpoint()), code=False)
    if not run.config_file.is_file():
        return truth
    text = f"the checkpoint was trained with another: put it back, or delete {run.config_file} to go by the other"
    try:
        written = known(run.read_config())
        truth = replace(truth, early_stop=written.early_stop)  # another was asked for, and nothing trained with it yet
        differing = list(differences(to_dict(truth), to_dict(written)))
    except UserError as error:
        raise UserError(f"{error}. Delete {run.config_file}: the checkpoint holds the config, too") from error
    if {key for key, _ in differing} == {"epochs", "extended"} and (longer := _longer(truth, written)):
        return longer
    if differing:
        trained = dict(flat(to_dict(truth)))
        said = "; ".join(f"{key}: {value!r}, trained with {trained.get(key)!r}" for key, value in differing[:5])
        raise UserError(f"{run.config_file} was changed since ({said}). {text[0].upper()}{text[1:]}")
    return truth


def _extended(run: Run, saved: Config, epochs: int) -> Config:
    before = known(saved.epochs)
    if epochs < before:
        raise UserError(
            f"--epochs {epochs}: {run.path} is a run of {counted(before, 'epoch')}, which can be extended but not "
            "shortened; start another run for that"
        )
    return saved if epochs == before else replace(saved, epochs=epochs, extended=(*(saved.extended or ()), before))


def _longer(one: Config, other: Config) -> Config | None:
    """Whichever of two configs is the other's extension: config.yaml is written before the first new checkpoint."""
    for config, base in ((one, other), (other, one)):
        totals = (*(base.extended or ()), base.epochs)
        if (config.extended or ())[: len(totals)] == totals:
            return config
    return None
