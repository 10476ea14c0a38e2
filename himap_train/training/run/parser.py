"""The parser of `finetune.py`'s command line: an unknown key names the nearest valid one."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from himap_train.command_line import config_first, end_with
from himap_train.training.schedules.settings import setting_names


class SuggestingParser(LightningArgumentParser):
    """Names the nearest valid key where an unknown one is given; options overrule files wherever they stand."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """As jsonargparse does, the files first."""
        given = _own_data(config_first(sys.argv[1:] if args is None else args))
        return super().parse_args(given, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and the message."""
        in_file = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
        in_options = re.search(r"[Uu]nrecognized arguments.*?--([\w.-]+)", message)
        top_level = re.search(r"[Oo]ption '([\w.]+)' is not accepted|[Kk]ey '([\w.]+)' is not expected", message)
        found = in_file or in_options or top_level
        if found:
            above = re.findall(r"Parser key \"([\w.]+)\"", message) if found is top_level else []
            wanted = ".".join([*above, *(part for part in found.groups() if part)]).replace("-", "_")
            near = difflib.get_close_matches(wanted, self._keys(), n=1, cutoff=0.5)
            message += f". Did you mean {near[0]!r}?" if near else ""
        end_with(self, message)

    def _keys(self) -> list[str]:
        keys = [key for action in self._actions for key in [action.dest] if key not in ("help", "print_config")]
        return [*keys, *setting_names()]


def _own_data(options: list[str]) -> list[str]:
    """`--rehearse --data mine` is `--rehearse=mine`; other values of `--data` are files of its settings."""
    for at, option in enumerate(options if "--rehearse" in options else ()):
        if option == "--data=mine" or options[at : at + 2] == ["--data", "mine"]:
            others = options[:at] + options[at + 2 - ("=" in option) :]
            return ["--rehearse=mine" if other == "--rehearse" else other for other in others]
    return options


def set_epochs(trainer: Namespace) -> None:
    """One epoch where a config says nothing, as many as `max_steps` takes where it says that alone."""
    if trainer.max_epochs is None:
        trainer.max_epochs = -1 if trainer.max_steps > 0 else 1
