"""The three descriptions of an environment agree: pyproject.toml, constraints.txt, environment.yml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, Version]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    assert all(len(r.specifier) == 1 and str(r.specifier).startswith("==") for r in requirements)
    return {r.name.lower().replace("_", "-"): Version(str(r.specifier)[2:]) for r in requirements}


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    wanted = [Requirement(line) for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]]
    assert len(wanted) >= 20
    for requirement in wanted:
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pinned[name]), f"{name} {pinned[name]} is outside {requirement.specifier}"


def test_conda_installs_the_same_project_under_the_same_constraints() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(str(d).removeprefix("python=") for d in dependencies if str(d).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    pip = next(d["pip"] for d in dependencies if isinstance(d, dict))
    assert "-c constraints.txt" in pip
    project = Requirement(next(line for line in pip if line.startswith("-e")).removeprefix("-e ").replace(".", "p", 1))
    assert project.extras == {"dev", "deepspeed"} <= set(EXTRAS)


def test_make_installs_under_the_same_constraints() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert len(installs) == 6
    assert all("-c constraints.txt" in line or "-c $(OLDEST)/constraints.txt" in line for line in installs)


def test_core_tests_run_on_both_ends_of_the_range_of_transformers() -> None:
    supported = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "transformers").specifier
    lowest = next(Version(one.version) for one in supported if one.operator == ">=")
    beyond = next(Version(one.version) for one in supported if one.operator == "<")
    oldest = re.search(r"^OLDEST_TRANSFORMERS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert oldest is not None and Version(oldest[1]).release[:2] == lowest.release[:2]
    newest = pins()["transformers"].release
    assert (newest[0], newest[1] + 1) == beyond.release[:2]
    assert {"make test", "make test-oldest"} <= set((ROOT / ".ci/run").read_text().splitlines())
