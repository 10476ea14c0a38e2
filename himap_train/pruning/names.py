"""Messages about names and keys that a user wrote: the nearest valid one is named."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any


def nearest(name: str, valid: Sequence[str]) -> str:
    """The tail of an error message: the nearest valid name, and all of them."""
    close = difflib.get_close_matches(str(name), valid, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" valid: {', '.join(valid)}"


def check_keys(where: str, given: Mapping[str, Any], valid: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Refuse keys that are not `valid` (the nearest is named), and missing ones that are `needed`.

    Raises:
        ValueError: Naming the key and `where` it is.
    """
    for key in given:
        if key not in valid:
            raise ValueError(f"{where} has the unknown key {key!r}{nearest(str(key), valid)}")
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} has no {key!r}; found {sorted(map(str, given))}")


def field_names(of: type[Any]) -> tuple[str, ...]:
    """The fields of a dataclass."""
    return tuple(field.name for field in fields(of))


def require_number(where: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} is {value!r}; expected a number")
