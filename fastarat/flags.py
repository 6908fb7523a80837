"""Flags of the command line, made of the fields of the configs they set."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any, Literal, NoReturn

from fastarat.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest known flag, and that makes flags of a dataclass's fields."""

    def __init__(self, **kwargs: Any) -> None:
        # No abbreviations: --epo would change its meaning on the day that a second flag begins with it.
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        namespace, rest = self.parse_known_args(argv)
        flags = {flag: action.dest for action in self._actions for flag in action.option_strings}
        for flag in rest:
            if flag.startswith("-"):
                self.error(f"unknown flag {flag}{nearest(flag.split('=')[0], flags)}")
        for name, value in vars(namespace).items():
            for one in value if isinstance(value, list) else (value,):
                if isinstance(one, str) and not one.strip():
                    flag = next((flag for flag, dest in flags.items() if dest == name), name)
                    self.error(f"{flag} {one!r}: expected a value, got an empty one")
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return namespace

    def add_fields(self, cls: type, prefix: str = "") -> None:
        """Add one flag per field of `cls`: --batch-size, --attack.epsilon, --amp / --no-amp.

        A flag that is not given has no value at all: a YAML file's or a saved run's then stands.
        """
        from fastarat.defenses import ARAT, Defense
        from fastarat.specs import fields_of
        from fastarat.values import hints_of

        title = (cls.__doc__ or "").strip().split("\n")[0].rstrip(".")
        if issubclass(cls, Defense) and cls.name:
            title = f"{cls.name}: {title}"
        group = self.add_argument_group(title) if prefix else self
        for f in fields_of(cls):
            hint, name, text = hints_of(cls)[f.name], prefix + f.name, f.metadata.get("help", "")
            kind: dict[str, Any] = {"dest": name, "metavar": _metavar(f.name, hint)}
            default = f.default
            if hint is Defense:
                kind, default = {"dest": f"{name}.name", "metavar": "NAME"}, ARAT.name
            elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
                self.add_fields(hint, name + ".")
                continue
            elif hint in (bool, bool | None):
                kind = {"dest": name, "action": argparse.BooleanOptionalAction}
            if default is not None and default is not False and default is not dataclasses.MISSING:
                text += f" (default: {default:.6g})" if isinstance(default, float) else f" (default: {default})"
            flag = "--" + name.replace("_", "-")
            # % begins a substitution in argparse's help texts.
            group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind)

    def parse_fields(
        self, argv: list[str], tree: type, defense: type | None = None
    ) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Return the command's own arguments, and by dotted name, what was given of the fields."""
        own = {action.dest for action in self._actions}
        self.add_fields(tree)
        if defense is not None:
            self.add_fields(defense, "defense.")
        flags = vars(self.parse(argv))
        given = {name: flags.pop(name) for name in list(flags) if name not in own}
        return argparse.Namespace(**flags), given


def _metavar(name: str, hint: Any) -> str:
    options = (hint, *typing.get_args(hint))
    choices = [str(a) for o in options if typing.get_origin(o) is Literal for a in typing.get_args(o)]
    if any("," in choice for choice in choices):
        choices = [repr(choice) for choice in choices]  # one could be taken for two
    elif bool in options:
        choices = ["true", "false"]
    return "{" + ",".join(choices) + "}" if choices else name.upper()


def early(argv: list[str], flag: str) -> str | None:
    """Return the value of a flag that decides which other flags there are; None where it has none, or is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", nargs="?")
    return parser.parse_known_args(argv)[0].value
