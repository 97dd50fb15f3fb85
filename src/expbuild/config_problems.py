"""Saying what is wrong with a configuration: from pydantic's errors to one line each, in the file's own terms."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from expbuild.config_text import shown, toml_key


@dataclass(frozen=True, slots=True)
class Expect:
    """What a field accepts, in the words of an error line ("expected ..."). Annotates a type; checks nothing."""

    text: str


def one_of(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in the configuration: its key as people write it, and the type that is declared for it."""

    key: str
    kind: Any
    expected: str | None = None

    def child(self, part: str | int) -> _Place:
        """Return the place pydantic means by the next element of an error's location."""
        kind = self.kind
        if isinstance(part, int):
            return _place(f"{self.key}[{part}]", get_args(kind)[0])
        if get_origin(kind) in (Union, UnionType):  # the tag of a worker type: not a key of the file
            return _Place(self.key, next(m for m in get_args(kind) if m.model_fields["type"].default == part))
        key = f"{self.key}.{toml_key(part)}".lstrip(".")
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(part)
            return _Place(key, None) if field is None else _place(key, field.annotation, field.metadata)
        return self if part == "[key]" else _place(key, get_args(kind)[1])


def _place(key: str, declared: Any, notes: Sequence[object] = ()) -> _Place:
    """Return the place for a type as declared: annotated, optional, or both. The outermost `Expect` counts."""
    expected = next((note.text for note in reversed(notes) if isinstance(note, Expect)), None)
    while True:
        if get_origin(declared) is Annotated:
            declared, *inner = get_args(declared)
            expected = expected or next((note.text for note in reversed(inner) if isinstance(note, Expect)), None)
        elif type(None) in get_args(declared):
            declared = next(member for member in get_args(declared) if member is not type(None))
        else:
            return _Place(key, declared, expected)


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Return one line for one of pydantic's errors about a model of type `root`."""
    table = place = _Place("", root)
    for part in error["loc"]:
        table, place = place, place.child(part)
    match error["type"]:
        case "rule":
            return f"{place.key}: {error['msg']}"
        case "extra_forbidden":
            return f"{place.key}: unknown key; {_hint(str(error['loc'][-1]), list(table.kind.model_fields))}"
        case "missing":
            return f"{place.key}: expected {_expected(place)}, got nothing"
        case "less_than_equal" | "less_than":
            limit = error["ctx"].get("le", error["ctx"].get("lt"))
            return f"{place.key}: expected at most {limit:.0f}, got {shown(error['input'])}"
        case "union_tag_invalid" | "union_tag_not_found":
            tags = one_of([json.dumps(m.model_fields["type"].default) for m in get_args(place.kind)])
            return f"{place.key}.type: expected {tags}, got {shown(error['input'].get('type'))}"
    return f"{place.key}: expected {_expected(place)}, got {shown(error['input'])}"


def _hint(unknown: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    return f'did you mean "{nearest[0]}"?' if nearest else f"known here: {', '.join(known)}"


def _expected(place: _Place) -> str:
    if place.expected is not None:
        return place.expected
    if get_origin(place.kind) is Literal:
        return one_of([json.dumps(value) for value in get_args(place.kind)])
    words = {bool: "true or false", str: "a string", int: "an integer", float: "a number", tuple: "a list"}
    return words.get(get_origin(place.kind) or place.kind, "a table")
