"""For the API page: a dataclass field's `help`, the text its flag has, is its docstring, and its default its value."""

import dataclasses
import importlib

import griffe


class Fields(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **_) -> None:
        if "dataclass" not in cls.labels:
            return
        kind = getattr(importlib.import_module(cls.module.path), cls.name, None)
        if not dataclasses.is_dataclass(kind):
            return
        for field in dataclasses.fields(kind):
            member = cls.members.get(field.name)
            if member is not None and "help" in field.metadata:
                member.docstring = griffe.Docstring(field.metadata["help"], parent=member)
                member.value = None if field.default is dataclasses.MISSING else repr(field.default)
