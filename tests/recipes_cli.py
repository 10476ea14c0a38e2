"""The recipes' command lines inside the test process: importing torch anew for each would take most of the time."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from himap_train.command_line import run_command

RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_module(name: str) -> Any:
    """`recipes/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # jsonargparse looks type hints up there
    spec.loader.exec_module(module)
    return module


def run_recipe(name: str, *argv: object) -> int:
    """What `python recipes/<name>.py <argv>` runs; its exit status."""
    return run_command(recipe_module(name).main, [str(argument) for argument in argv])


def run_program(name: str, *argv: object, patch: pytest.MonkeyPatch) -> int:
    """`python recipes/<name>.py <argv>` as the main program of this process; its exit status."""
    patch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, argv)])
    try:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
