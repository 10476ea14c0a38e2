"""`--help` of a recipe in a tenth of a second: its options as the source states them, with nothing imported.

Reading signatures needs no torch; the parser's own help does, and takes seconds. It is `--help all`, and lists what
Lightning's Trainer takes as well.
"""

from __future__ import annotations

import ast
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MORE = "Values are defaults; CAPITALS stand where there is none. --help all: all that the parser takes (some seconds)."


@dataclass(frozen=True)
class Option:
    """One option: its name without dashes, its default or, in capitals, its type, and what it does."""

    name: str
    value: str
    text: str


def answer_help(recipe: str) -> None:
    """Print the help and end, where this process was asked for it; call it before anything heavy is imported.

    Args:
        recipe: The recipe's `__file__`.

    Raises:
        SystemExit: With status 0, after the help.
    """
    given = sys.argv[1:]
    if Path(sys.argv[0]).resolve() != Path(recipe).resolve() or not {"--help", "-h"} & set(given):
        return
    if given == ["--help", "all"] and options_of(Path(recipe)):
        sys.argv.pop()
        return
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends it, as with other programs
    print(help_text(Path(recipe), max(shutil.get_terminal_size().columns, 40)))
    raise SystemExit(0)


def help_text(recipe: Path, columns: int = 80) -> str:
    """What a recipe is for, and its options, no wider than `columns` characters."""
    source, options = _Source(recipe), options_of(recipe)
    lines = [source.doc(), *(["", "options:"] if options else [])]
    for option in options:
        lines.append(f"  --{option.name} {option.value}".rstrip())
        lines += textwrap.wrap(option.text, columns - 6, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if _command_line(source):
        lines.append("  --trainer.max_steps ... and all that Lightning's Trainer takes")
        lines.append("  --config FILE, --print_config, --seed_everything 0")
    return "\n".join([*lines, *(["", *textwrap.wrap(MORE, columns)] if options else [])])


def options_of(recipe: Path) -> list[Option]:
    """The options of a recipe, without those of Lightning itself."""
    source = _Source(recipe)
    if found := _command_line(source):
        return list(_of_command_line(*found))
    main = source.named("main")
    if isinstance(main, ast.FunctionDef) and not main.args.args:
        return list(_added(source, main))
    found_first = reversed(list(_of_function(source, main)) if isinstance(main, ast.FunctionDef) else [])
    return list({option.name: option for option in found_first}.values())[::-1]


class _Source:
    """One file as a syntax tree."""

    def __init__(self, file: Path) -> None:
        self.tree = ast.parse(file.read_text("utf-8"))
        """The whole of it."""

    def doc(self) -> str:
        return ast.get_docstring(self.tree) or ""

    def named(self, name: str) -> ast.stmt | None:
        """The function, class or value of a name, if it is defined here."""
        for node in self.tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if (isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name) or (
                isinstance(target, ast.Name) and target.id == name
            ):
                return node
        return None

    def find(self, name: str) -> tuple[_Source, ast.stmt] | None:
        """Where something of this package, defined here or imported from another file of it, is written."""
        if node := self.named(name):
            return self, node
        for line in self.tree.body:
            if isinstance(line, ast.ImportFrom) and any(alias.name == name for alias in line.names):
                file = ROOT / ((line.module or "").replace(".", "/") + ".py")
                return _Source(file).find(name) if file.is_file() else None
        return None


def _command_line(recipe: _Source) -> tuple[_Source, ast.ClassDef] | None:
    """The subclass of Lightning's command line that a recipe imports, if there is one."""
    names = [alias.name for line in recipe.tree.body if isinstance(line, ast.ImportFrom) for alias in line.names]
    found = next((recipe.find(name) for name in names if name.endswith("CLI")), None)
    return (found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) else None


def _of_command_line(source: _Source, cls: ast.ClassDef) -> Iterator[Option]:
    calls = [node for node in ast.walk(cls) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    of = {name: [call.args for call in calls if _attribute(call) == name] for name in ("link_arguments", "__init__")}
    linked = {_literal(args[1]) for args in of["link_arguments"]}
    groups = [(node, name) for args in of["__init__"] for node, name in zip(args, ("model", "data"), strict=False)]
    groups += [(call.args[0], _literal(call.args[1])) for call in calls if _attribute(call) == "add_class_arguments"]
    for base in cls.bases:
        if isinstance(base, ast.Name) and (found := source.find(base.id)) and isinstance(found[1], ast.ClassDef):
            yield from _of_command_line(found[0], found[1])
    yield from _added(source, cls)
    for node, prefix in groups:
        if isinstance(node, ast.Name) and (found := source.find(node.id)) and isinstance(found[1], ast.ClassDef):
            yield from (option for option in _of_class(*found, f"{prefix}.") if option.name not in linked)


def _added(source: _Source, node: ast.AST) -> Iterator[Option]:
    """What is added to a parser option by option."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and _attribute(call) == "add_argument":
            given = {word.arg: word.value for word in call.keywords}
            kind = given.get("type") or given.get("action")
            text = _literal(given["help"]) if "help" in given else ""
            yield Option(_literal(call.args[0]).lstrip("-"), _value(source, given.get("default"), kind), text)


def _of_class(source: _Source, cls: ast.stmt, prefix: str) -> Iterator[Option]:
    assert isinstance(cls, ast.ClassDef)
    made = next((node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    texts = _texts(cls)
    if made is not None:
        yield from (Option(prefix + name, value, texts.get(name, "")) for name, value in _arguments(source, made))
        return
    for field in cls.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            yield Option(prefix + name, _value(source, field.value, field.annotation), texts.get(name, ""))
            types = [node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)]
            for found in filter(None, map(source.find, types)):
                if isinstance(found[1], ast.ClassDef):
                    yield from _of_class(*found, f"{prefix}{name}.")


def _of_function(source: _Source, function: ast.FunctionDef, given: frozenset[str] = frozenset()) -> Iterator[Option]:
    """The arguments of a function but those that are `given`, and those of the function that takes its `**more`."""
    texts, more = _texts(function), function.args.kwarg
    yield from (
        Option(name, value, texts.get(name, "")) for name, value in _arguments(source, function) if name not in given
    )
    for call in ast.walk(function):
        if more is None or not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        spread = [word.value.id for word in call.keywords if word.arg is None and isinstance(word.value, ast.Name)]
        found = source.find(call.func.id)
        if more.arg in spread and found and isinstance(found[1], ast.FunctionDef):
            names = [name for name, _ in _arguments(found[0], found[1])]
            passed = {*names[: len(call.args)], *(word.arg for word in call.keywords if word.arg)}
            yield from _of_function(found[0], found[1], given | passed)


def _arguments(source: _Source, function: ast.FunctionDef) -> list[tuple[str, str]]:
    """Names and values of arguments that can be given by name."""
    given = function.args
    usual = [*given.posonlyargs, *given.args]
    defaults = [*[None] * (len(usual) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    both = zip([*usual, *given.kwonlyargs], defaults, strict=True)
    return [(arg.arg, _value(source, default, arg.annotation)) for arg, default in both if arg.arg != "self"]


def _texts(node: ast.FunctionDef | ast.ClassDef) -> dict[str, str]:
    """What the `Args:` of a docstring say of each."""
    doc = ast.get_docstring(node) or ""
    _, _, after = doc.partition("Args:\n")
    section = re.split(r"\n(?=\S)", after, maxsplit=1)[0]
    entries = re.findall(r"^    (\**\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name.lstrip("*"): " ".join(text.split()) for name, text in entries}


def _attribute(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def _literal(node: ast.expr) -> str:
    return str(ast.literal_eval(node))


def _value(source: _Source, default: ast.expr | None, annotation: ast.expr | None) -> str:
    """A default as YAML has it, or the type in capitals where none is written there; and all choices, where few are."""
    try:
        value = None if default is None else ast.literal_eval(default)
    except ValueError:  # a name or a call
        value = None
    kind, choices = "" if annotation is None else ast.unparse(annotation).replace(" | None", ""), list[str]()
    if found := source.find(kind):
        kind = ast.unparse(found[1].value) if isinstance(found[1], ast.Assign) else kind
    if kind.startswith("Literal"):
        choices = re.findall(r"'([^']+)'", kind)
    if value is None and not choices:
        return kind.upper()
    written = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"{written} ({'|'.join(choices)})" if choices else written
