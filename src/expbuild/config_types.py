"""The vocabulary of configuration fields: types that check one value, and say in words what they accept."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from expbuild.config_problems import Expect, one_of
from expbuild.config_text import shown
from expbuild.digest import DigestFunction

_T = TypeVar("_T")
_YEAR_S = 31_536_000


class Table(BaseModel):
    """A table of the file: unknown keys refused, no value converted, immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def require(is_valid: Callable[[_T], object]) -> AfterValidator:
    """Refuse values for which `is_valid` is false; the field's `Expect` is the message."""

    def check(value: _T) -> _T:
        if not is_valid(value):
            raise ValueError
        return value

    return AfterValidator(check)


def pattern(regex: str) -> AfterValidator:
    return require(re.compile(regex, re.ASCII).fullmatch)


def rule(text: str) -> PydanticCustomError:
    """Return the error of a rule about several values; `text` is the whole message."""
    return PydanticCustomError("rule", "{text}", {"text": text})


def each_once(values: tuple[_T, ...]) -> tuple[_T, ...]:
    for value in values:
        if values.count(value) > 1:
            raise rule(f"expected each value once, got {shown(value)} {values.count(value)} times")
    return values


def is_address(text: str) -> bool:
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[3]) > 65535:
        return False
    if match[1] is None and re.fullmatch(r"(?!-)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?", match[2], re.ASCII) is None:
        return False
    try:
        if match[1] is not None:
            ipaddress.IPv6Address(match[1])
        elif re.fullmatch(r"[0-9.]+", match[2], re.ASCII):
            ipaddress.IPv4Address(match[2])
    except ValueError:
        return False
    return True


def _as_digest_function(value: object) -> object:
    return DigestFunction.__members__.get(value, value) if isinstance(value, str) else value


NAME_OR_ID = r"([A-Za-z_][A-Za-z0-9_.-]*\$?|[0-9]{1,10})"
LIST = Field(strict=False)  # TOML has lists, the models hold tuples; the elements stay strict

Count = Annotated[int, Field(gt=0, le=1_000_000), Expect("a positive integer")]
Seconds = Annotated[float, Field(gt=0, le=_YEAR_S), Expect("a positive number of seconds")]
NonEmptyString = Annotated[str, require(len), Expect("a non-empty string")]
AbsolutePath = Annotated[
    Path,
    Field(strict=False),
    require(lambda path: path.is_absolute() and "\0" not in str(path)),
    AfterValidator(lambda path: Path(os.path.normpath(path))),
    Expect("an absolute path"),
]
UserOrId = Annotated[str, pattern(NAME_OR_ID), Expect("a name or a number in quotes")]
ImplementedFunction = Annotated[
    DigestFunction, BeforeValidator(_as_digest_function), Expect(one_of([f.name for f in DigestFunction]))
]
Platform = Annotated[
    Mapping[NonEmptyString, str],
    Expect("a table of strings"),
]
