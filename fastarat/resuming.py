"""What a run that goes on is trained with: the config inside its checkpoint, and the few settings that may differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastarat.config import Config, from_dict, to_dict
from fastarat.defenses.naming import Foreign
from fastarat.errors import UserError
from fastarat.runs import MAY_DIFFER, Run, differences
from fastarat.specs import known


def config_to_resume(run: Run, overrides: dict[str, Any], defense: Any = None) -> Config:
    """Return the config the run was trained with, by its checkpoint, with `overrides`.

    defense: the run's own, a Defense or its class; needed where it is none of fastarat's, as is its name among
    `overrides` from a command line.
    Raises: UserError for a setting that may not differ, or a config.yaml that was changed since.
    """
    run.must_exist()
    saved = _trained_with(run)
    if isinstance(saved.defense, Foreign) and defense is None:
        named = overrides.get("defense")
        if isinstance(named, dict) and named.keys() == {"name"}:
            overrides = {key: value for key, value in overrides.items() if key != "defense"}
            defense = named["name"]
    for key in overrides:
        if key not in MAY_DIFFER:
            raise UserError(
                f"--resume continues {run.path} as it was started: {key} cannot change (only "
                f"{', '.join(MAY_DIFFER[:-1])} may); start another run for that"
            )
    if isinstance(saved.defense, Foreign):
        saved = replace(saved, defense=saved.defense.trusted(defense, run.path))
    elif defense is not None:
        saved = replace(saved, defense=defense)
    values = {**to_dict(saved), "defense": saved.defense, **overrides, "out": str(run.path)}
    return from_dict(values, source=str(run.config_file))


def _trained_with(run: Run) -> Config:
    """The config inside the checkpoint; config.yaml's where there is none yet. Raises: UserError if they differ."""
    state = run.load() if run.resumable() else {}
    if not isinstance(state.get("config"), dict):
        return known(run.read_config())
    truth = from_dict(state["config"], source=str(run.checkpoint()), code=False)
    if not run.config_file.is_file():
        return truth
    text = f"the checkpoint was trained with another: put it back, or delete {run.config_file} to go by the other"
    try:
        differing = list(differences(to_dict(truth), to_dict(known(run.read_config()))))
    except UserError as error:
        raise UserError(f"{error}. Delete {run.config_file}: the checkpoint holds the config, too") from error
    if differing:
        trained = dict(_flat(to_dict(truth)))
        said = "; ".join(f"{key}: {value!r}, trained with {trained.get(key)!r}" for key, value in differing[:5])
        raise UserError(f"{run.config_file} was changed since ({said}). {text[0].upper()}{text[1:]}")
    return truth


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
