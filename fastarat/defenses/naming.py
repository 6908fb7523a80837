"""Defenses by name: the built-in ones, a person's own FILE.py:CLASS, and those whose code nobody vouched for."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from torch import Tensor

from fastarat.defenses import DEFENSES
from fastarat.defenses.base import Defense, Views
from fastarat.errors import UserError, nearest, unknown


@dataclass(frozen=True, kw_only=True)
class Foreign(Defense):
    """A defense as a run folder names it, its code not imported: nobody said that the file may run.

    named: `FILE.py:CLASS`, as saved. settings: its hyper-parameters as plain values. It cannot be trained.
    """

    targets: ClassVar[Literal["hard", "smoothed", "mixed"]] = "mixed"  # what its code takes is not known here

    named: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def loss(self, views: Views) -> dict[str, Tensor]:
        self.refuse("it")

    def refuse(self, run: str | Path) -> NoReturn:
        """Raise the UserError that says how the person lets the code run. run: the folder that names it."""
        raise UserError(
            f"{run} was trained with code of its own, {self.named}, and a run folder's code is never run unasked: if "
            f"you trust that file, name it too: --resume {run} --defense {self.named} "
            "(from Python: train(resume=..., defense=CLASS))"
        )

    def trusted(self, given: Any, run: str | Path) -> Defense:
        """Return the defense of the run in folder `run`, once a person has named its code.

        given: `FILE.py:CLASS`, a Defense or its class; None: not named.
        Raises: UserError when it is not named, or another one is.
        """
        kind = type(given) if isinstance(given, Defense) else given
        if kind is None:
            self.refuse(run)
        if isinstance(kind, str):
            if not same_code(kind, self.named):
                raise UserError(
                    f"--defense {kind}: {run} was trained with {self.named}; --resume goes on with the same code"
                )
            kind = resolve_defense(kind)
        if not (isinstance(kind, type) and issubclass(kind, Defense)):
            raise UserError(f"defense={given!r:.80}: {run} was trained with {self.named}: expected that class alone")
        if kind.__qualname__ != self.named.rpartition(":")[2]:
            raise UserError(f"defense {kind.__qualname__}: {run} was trained with {self.named}; give the same class")
        strange = {str(key) for key in self.settings} - {f.name for f in dataclasses.fields(kind)}
        if strange:
            raise UserError(f"{run} has defense.{min(strange)}, which {kind.__qualname__} has not: its code differs")
        saved = kind(**self.settings)
        if isinstance(given, Defense) and given != saved:
            raise UserError(f"defense={given!r:.200}: {run} was trained with {saved!r:.200}; --resume cannot change it")
        return saved


def is_code(name: str) -> bool:
    """Whether a defense's name is `FILE.py:CLASS`, which `resolve_defense` runs."""
    return name.lower() not in DEFENSES and (":" in name or name.endswith(".py"))


def same_code(given: str, saved: str) -> bool:
    """Whether two names mean one class of one file; a file that is not here any more may have moved."""
    (path, _, cls), (old, _, old_cls) = given.rpartition(":"), saved.rpartition(":")
    moved = not Path(old).exists() and Path(path).name == Path(old).name
    return cls == old_cls and (Path(path).resolve() == Path(old).resolve() or moved)


def resolve_defense(name: str) -> type[Defense]:
    """Return a defense class by name, or from `FILE.py:CLASS`. Raises: UserError, before anything runs."""
    if name.lower() in DEFENSES:
        return DEFENSES[name.lower()]
    if is_code(name):
        return _defense_from_file(name)
    raise unknown("defense", name, DEFENSES)


def _defense_from_file(name: str) -> type[Defense]:
    path, _, cls = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"no such file: {path} (a defense of your own is named FILE.py:CLASS)")
    # Two files of one name are two modules: a run's config must name the file its defense came from.
    digest = hashlib.blake2b(str(Path(path).resolve()).encode(), digest_size=6).hexdigest()
    module_name = f"_fastarat_defense_{Path(path).stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: a defense of your own is named FILE.py:CLASS")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: dataclasses look their module up by name while the class is being made.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} does not import: {type(error).__name__}: {error}") from error
    # Only by name, not the file's only class: a file may import the defense that it derives from.
    found = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, Defense) and c is not Defense]
    if cls not in found:
        raise UserError(
            f"{path} defines no defense {cls!r}{nearest(cls, found) or '.'} Found: {', '.join(found) or 'none'}."
        )
    return getattr(module, cls)


def defense_key(defense: Defense) -> str:
    """Return the name that `resolve_defense` turns back into this defense's class."""
    if isinstance(defense, Foreign):
        return defense.named
    kind = type(defense)
    if DEFENSES.get(kind.name) is kind:
        return kind.name
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return f"{file}:{kind.__qualname__}" if file else kind.__qualname__
