"""The package's shape: imports point one way, without circles between files or folders."""

from __future__ import annotations

import ast
from pathlib import Path

import himap_train

PACKAGE = Path(himap_train.__file__).parent
ORDER = (
    ("pruning",),
    ("embedded",),
    ("models",),
    ("data",),
    ("checkpoints",),
    ("evaluation",),
    ("training", "analysis", "search"),
    ("planning", "benchmark", "serving"),
)
"""Folders from below; each imports from those before it, and from files of the package itself."""


def modules() -> dict[str, Path]:
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = file
    return names


def imports(names: dict[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the package, inside functions too, but not for type checking alone."""
    found: dict[str, set[str]] = {}
    for name, file in names.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        typing = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]
        skipped = {id(node) for block in typing for node in ast.walk(block)}
        found[name] = set()
        for node in ast.walk(tree):
            if id(node) in skipped or not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = whole if whole in names else node.module
                if target in names and target not in (name, "himap_train"):
                    found[name].add(target)
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of which each member reaches all others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges.get(start, ()))
        while todo:
            here = todo.pop()
            if here not in seen:
                seen.add(here)
                todo += edges.get(here, ())
        return seen

    reach = {name: reached(name) for name in edges}
    return [
        sorted(name for name in reach[start] if start in reach.get(name, ()))
        for start in edges
        if start in reach[start]
    ]


def folder(name: str) -> str:
    return (name.split(".") + [""])[1]


def test_no_circles_between_files() -> None:
    assert circles(imports(modules())) == []


def test_folders_import_from_those_below_them() -> None:
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    found = imports(modules())
    folders = {folder(name) for name, file in modules().items() if file.parent != PACKAGE or file.name == "__init__.py"}
    assert folders - {""} == set(level), "a new folder has no place in the order yet"
    wrong = [
        f"{name} imports {target}"
        for name, targets in found.items()
        for target in targets
        if folder(name) in level and folder(target) in level and folder(name) != folder(target)
        if level[folder(target)] > level[folder(name)]
    ]
    assert wrong == []
    between: dict[str, set[str]] = {}
    for name, targets in found.items():
        between.setdefault(folder(name), set()).update(
            folder(target) for target in targets if folder(target) != folder(name)
        )
    assert circles(between) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})[0] == ["a", "b", "c"]


def test_files_fit_on_a_few_screens() -> None:
    long = {name: lines for name, file in modules().items() if (lines := len(file.read_text().splitlines())) > 250}
    assert long == {}
