"""Configuration values as TOML text: for printing a whole configuration, and for quoting one value in an error."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def toml_table(path: tuple[str, ...], table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: its own values first, then the tables in it, as TOML demands."""
    for key, value in table.items():
        if not _holds_tables(value):
            yield f"{toml_key(key)} = {toml_value(value)}"
    for key, value in table.items():
        here = (*path, toml_key(key))
        if isinstance(value, Mapping):
            if not all(_holds_tables(inner) for inner in value.values()):
                yield from ("", f"[{'.'.join(here)}]")
            yield from toml_table(here, value)
        elif _holds_tables(value):
            for element in value:
                yield from ("", f"[[{'.'.join(here)}]]", *toml_table(here, element))


def _holds_tables(value: object) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, tuple) and any(isinstance(e, Mapping) for e in value))


def toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key, re.ASCII) else toml_value(key)


def toml_value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case enum.Enum():
            return toml_value(value.name)
        case int() | float():
            return repr(value)
        case str() | Path():
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple():
            return f"[{', '.join(toml_value(element) for element in value)}]"
        case _:
            raise TypeError(f"no TOML for {type(value).__name__}")


def shown(value: object) -> str:
    """Return a value as the file would have it, short enough for a line."""
    match value:
        case None:
            return "nothing"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case Mapping():
            return "a table"
        case bool() | enum.Enum():
            return toml_value(value)
        case int() | float():
            text = repr(value)
        case str() | Path():
            text = toml_value(value)
        case _:
            text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
