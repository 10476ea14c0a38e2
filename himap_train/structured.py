"""Files that somebody else wrote: JSON and YAML read as plain data, within bounds, and held to a declared shape.

A shape is a type (`str | None`; True is no number), a `Rule`, `[shape]` for a list, `{str: shape}` for a mapping with
names of any kind, or `{"r": shape, "bias?": shape}` for a mapping that has these keys (`?`: where they are there and
not null) and may have others.
"""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

import yaml

from himap_train.limits import bounded

_JSON_BYTES, _YAML_BYTES = 2**26, 2**18
"""Tokenizers and indices of weights take megabytes, what people write some kilobytes."""
_YAML_NODES = 100_000
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
_NAMES |= {dict: "a mapping", Mapping: "a mapping", list: "a list"}


@dataclass(frozen=True)
class Rule:
    """A shape of values that are of a type and pass a test; `expected` says in words which."""

    expected: str
    type: Any
    test: Callable[[Any], bool]


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands in it twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return found


def check_shape(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise ValueError unless a value has a shape.

    Args:
        value: What was read.
        shape: As the module says.
        where: The file, for the message.
        key: The path of keys to `value` in it.
    """
    expected = _misfit(value, shape)
    if expected:
        what = f"{where}: `{key}`" if key else where
        found = "empty" if value is None else f"{type(value).__name__} {value!r:.60}"
        raise ValueError(f"{what} is {found}; expected {expected}")
    dot = f"{key}." if key else ""
    if isinstance(shape, list):
        for number, item in enumerate(value):
            check_shape(item, shape[0], where, f"{key}[{number}]")
    elif isinstance(shape, dict) and str in shape:
        for name, item in value.items():
            check_shape(name, str, where, f"{dot}{name!r:.60}")
            check_shape(item, shape[str], where, f"{dot}{name:.60}")
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if value.get(plain := name.removesuffix("?")) is not None or (plain == name and plain in value):
                check_shape(value[plain], inner, where, dot + plain)
            elif plain == name:
                found = ", ".join(sorted(map(str, value))[:8]) or "nothing"
                raise ValueError(f"{where}: {f'`{key}` has ' if key else ''}no key `{name}`; found {found:.200}")


def _misfit(value: Any, shape: Any) -> str:
    """What was expected; empty where the outermost of a value fits."""
    if isinstance(shape, Rule):
        return "" if not _misfit(value, shape.type) and shape.test(value) else shape.expected
    if isinstance(shape, list | dict):
        of = Mapping if isinstance(shape, dict) else list
        return "" if isinstance(value, of) else _NAMES[of]
    kinds = get_args(shape) if isinstance(shape, UnionType) else (shape,)
    fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if fits and (not isinstance(value, bool) or bool in kinds):
        return ""
    return " or ".join(_NAMES.get(kind, kind.__name__) for kind in kinds)


def read_json(file: Path, shape: Any = dict) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no regular file, too large, no UTF-8 or no JSON, has a key twice, or not the shape.
    """
    text = read_text(file, _JSON_BYTES)
    with named(file, "is not JSON"):
        found = json.loads(text, object_pairs_hook=each_key_once)
    check_shape(found, shape, str(file))
    return found


def read_yaml(file: Path, shape: Any = dict) -> Any:
    """The content of a YAML file: plain values alone; numbers such as 1e-3 are numbers; null stands for no file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: As in `read_json`; or tags that ask for objects, or aliases that stand for too much.
    """
    text = read_text(file, _YAML_BYTES)
    with named(file, "is not YAML of plain values"):
        found = plain_yaml(text)
    check_shape(found, shape, str(file))
    return found


def plain_yaml(text: str) -> Any:
    """What a text in YAML says.

    Raises:
        yaml.YAMLError: It is none, asks for objects, has a key twice, or its aliases stand for too much.
    """
    loader = _Loader(text)
    try:
        with bounded("reading it"):
            node = loader.get_single_node()
        if node is not None and _size(node, {}) > _YAML_NODES:
            raise ValueError(f"more than {_YAML_NODES} values, those that its aliases (*) stand for included")
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        raise yaml.YAMLError(f"{error.problem}{at and f' at line {at.line + 1}, column {at.column + 1}'}") from error
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error


def read_text(file: Path, limit: int = _YAML_BYTES) -> str:
    """The text of a regular file, in UTF-8, of at most so many bytes.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is something else.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist (current folder: {Path.cwd()})")
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is a {'folder' if file.is_dir() else 'device or pipe'}; expected a file")
    if found.st_size > limit:
        raise ValueError(f"{file} has {found.st_size} bytes; at most {limit} are read of a file of its kind")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error})") from error


@contextmanager
def named(file: Path | str, fault: str = "cannot be read", way_out: str = "") -> Iterator[None]:
    """What a library raises over content that somebody else wrote, of whatever kind, as one line that names the file.

    Errors about a file that is not there or closed, and lack of memory on a device, stay as they are.

    Raises:
        ValueError: In place of anything else, unless it is a ValueError that names the file already.
    """
    try:
        yield
    except Exception as error:
        kept = isinstance(error, OSError) and type(error) is not OSError or type(error).__name__ == "OutOfMemoryError"
        if kept or (isinstance(error, ValueError) and str(file) in str(error)):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, ValueError | yaml.YAMLError) else f"{type(error).__name__}: "
        if isinstance(error, RecursionError):
            kind, reason = "", "it is nested too deeply"
        raise ValueError(f"{file} {fault} ({kind}{reason:.300}){way_out and f'; {way_out}'}") from error


class _Loader(yaml.SafeLoader):
    """Plain values."""


_Loader.add_implicit_resolver(  # YAML 1.1 takes 1e-3 and 1.5e3 for text
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values a node holds once its aliases are written out, infinite where it holds itself.

    Raises:
        ValueError: A mapping has a key twice.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")
        if isinstance(node, yaml.MappingNode):
            each_key_once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(node)]
