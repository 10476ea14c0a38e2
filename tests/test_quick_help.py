"""`--help` states what the parser takes, and imports nothing to know it."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys

import pytest
from recipes_cli import RECIPES, recipe_module, run_recipe

from himap_train.quick_help import help_text, options_of
from himap_train.training.schedules.settings import setting_names

WITH_MAIN = [
    file.stem
    for file in sorted(RECIPES.glob("*.py"))
    if file.stem not in ("finetune", "plan", "make_scene_assets", "train_embedded")
]


def _parsers_help(main, *argv: str) -> set[str]:
    """Names of the options in the help that the parser writes, without those of Lightning and of jsonargparse."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(*argv)
    found = re.findall(r"^  (?:-c CONFIG, )?--([\w.]+)", out.getvalue(), re.MULTILINE)
    theirs = ("help", "config", "print_config", "seed_everything")
    return {name for name in found if name not in theirs and not name.startswith("trainer") and ".help" not in name}


def _ours(name: str) -> list[str]:
    return [option.name for option in options_of(RECIPES / f"{name}.py")]


@pytest.mark.parametrize("name", WITH_MAIN)
def test_quick_help_names_the_options_of_the_parser(name):
    assert _parsers_help(run_recipe, name, "--help") == set(_ours(name))
    assert len(_ours(name)) == len(set(_ours(name))) > 0
    assert all(option.text for option in options_of(RECIPES / f"{name}.py"))


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
@pytest.mark.parametrize("name", ["finetune", "plan"])
def test_quick_help_names_the_keys_of_the_config_and_of_its_settings(name):
    main = recipe_module(name).main
    nested = {key for key in setting_names() if key.count(".") > 1}
    ours = set(_ours(name))
    assert ours == _parsers_help(main, ["--help"]) - {"model", "data", "pruning", "evaluation"} | nested
    assert nested
    assert all(option.text for option in options_of(RECIPES / f"{name}.py"))


def test_quick_help_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-X", "importtime", str(RECIPES / "finetune.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "himap_train.quick_help" in imported
    assert not {name.split(".")[0] for name in imported} & {
        "torch",
        "lightning",
        "transformers",
        "numpy",
        "jsonargparse",
    }
    assert "--model.lora_r 128\n      Rank of LoRA." in done.stdout
    assert "--rehearse null (embedded|mine)" in done.stdout
    assert "--keep last (last|best)" in done.stdout
    assert "--data.image_aspect_ratio null (as_processor|pad)" in done.stdout
    assert "--data.processor" not in done.stdout


def test_quick_help_fits_the_terminal():
    text = help_text(RECIPES / "evaluate.py", columns=60)
    listed = text[text.index("options:") :].splitlines()
    assert max(map(len, listed)) <= 60


def test_all_options_are_left_to_the_parser(monkeypatch, capsys):
    from himap_train.quick_help import answer_help

    recipe = str(RECIPES / "evaluate.py")
    monkeypatch.setattr(sys, "argv", [recipe, "--help", "all"])
    answer_help(recipe)
    assert sys.argv == [recipe, "--help"]
    monkeypatch.setattr(sys, "argv", ["pytest", "--help"])
    answer_help(recipe)  # imported by something else
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["train_embedded", "make_scene_assets"])
def test_options_of_a_parser_of_its_own(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        recipe_module(name).main()
    theirs = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    assert theirs == set(_ours(name)) and len(theirs) > 1
