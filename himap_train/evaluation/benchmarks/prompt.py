"""What is asked: a template with columns of a row in braces."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any


def column_in(columns: Mapping[str, Any] | list[str], names: str) -> str:
    """The first of "name|name|..." that there is, "" for none; "a.b" is `b` within column `a`."""
    return next((name for name in names.split("|") if name in columns or name.split(".")[0] in columns), "")


def value_in(row: Mapping[str, Any], names: str) -> Any:
    """What a row has there; None where it has nothing (an empty cell, or "nan" as pandas writes one)."""
    value: Any = row
    name = column_in(row, names)
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value in ("", "nan") else value


class Prompt(string.Formatter):
    r"""`{column}`, lists with commas; `{column:N/A}` with what stands for an empty one. A line of empty columns goes.

    Args:
        template: For `str.format`; `\n` written out is a new line too, as shells pass it.

    Raises:
        ValueError: The braces do not match, or have no name within.
    """

    def __init__(self, template: str) -> None:
        self.template = template.replace("\\n", "\n")
        try:
            self.names = [name for _, name, *_ in self.parse(self.template) if name is not None]
        except ValueError as error:
            raise ValueError(f"prompt {template!r}: {error}; write a brace that is no column's twice") from error
        if not all(self.names):
            raise ValueError(f"prompt {template!r}: braces without a column; name one, as in {{question}}")

    def fill(self, values: Mapping[str, Any]) -> str:
        """The template with the values of a row."""
        lines = []
        for line in self.template.split("\n"):
            text = self.vformat(line, (), values)
            if text.strip() or not any(name for _, name, *_ in self.parse(line)):
                lines.append(text)
        return "\n".join(lines)

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Columns by name; never an attribute."""
        return value_in(kwargs, field_name), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        """The text of a value, or what stands for an empty one."""
        listed = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        return format_spec if listed is None or listed == "" else str(listed)
