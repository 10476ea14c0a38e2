"""What the recipes' command lines have in common: typed options, hyphens or underscores, errors without a traceback."""

from __future__ import annotations

import difflib
import itertools
import logging
import re
import shutil
import socket
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, auto_cli, get_loader, set_loader
from transformers.utils import logging as transformers_logging

from himap_train.data.records import RecordError
from himap_train.data.skips import TooManySkippedError
from himap_train.storage import told
from himap_train.structured import plain_yaml, read_yaml

USER_ERRORS = (OSError, ValueError, RecordError, TooManySkippedError)
"""Errors whose message tells a user what to do; all others are bugs and keep their traceback."""


_stock_yaml = get_loader("yaml")


def _bounded_yaml(text: str) -> Any:
    """As the parser reads values and files, once it is known that they are plain and of some size."""
    plain_yaml(text)
    return _stock_yaml(text)


set_loader("yaml", _bounded_yaml, (yaml.YAMLError,))


class SuggestingParser(ArgumentParser):
    """Takes `--private` for `--private=true`, and names the nearest valid option where an unknown one is given."""

    def parse_args(self, args: Sequence[str], *more: Any, **options: Any) -> Any:  # type: ignore[override]
        """Options of a command line."""
        given = (action for action in self._actions if getattr(action, "_typehint", None) is bool)
        flags = {name for action in given for name in action.option_strings}
        following = zip(args, [*args[1:], "--"], strict=False)
        valued = [f"{arg}=true" if arg in flags and after.startswith("-") else arg for arg, after in following]
        return super().parse_args(valued, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2 and the message."""
        for name in re.findall(r"--([\w.-]+)", message) if "unrecognized" in message else ():
            near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1, cutoff=0.5)
            message += f"; did you mean --{near[0]}?" if near else ""
        end_with(self, message)


def end_with(parser: ArgumentParser, message: str) -> NoReturn:
    """End with status 2 and a message in one line, without the usage, which takes screens.

    Raises:
        SystemExit: Always; argparse's own error where the parser is not to exit.
    """
    if not parser.exit_on_error:
        raise ArgumentError(None, message)
    print(f"error: {' '.join(message.split())}; --help lists the options", file=sys.stderr)
    raise SystemExit(2)


def check_config_files(options: Sequence[str], groups: bool = False) -> None:
    """Read the YAML files that options name as plain data within bounds, before the parser does.

    Args:
        options: Of a command line.
        groups: Whether other options than `--config` may stand for a group of settings in a file: `--model x.yaml`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It holds no mapping.
    """
    for option, after in zip(options, [*options[1:], ""], strict=False):
        name, _, value = option.partition("=")
        file = value or ("" if after.startswith(("-", "{")) else after)
        group = groups and name.startswith("--") and file.endswith((".yaml", ".yml")) and Path(file).exists()
        if group or (file and name in ("--config", "-c")):
            read_yaml(Path(file))


def config_first(options: Sequence[str]) -> list[str]:
    """Options with `--config FILE` before all others, which overrule it wherever they stand."""
    files: list[str] = []
    others: list[str] = []
    given = iter(options)
    for option in given:
        if option in ("--config", "-c"):
            files += [option, *itertools.islice(given, 1)]
        else:
            (files if option.startswith("--config=") else others).append(option)
    return files + others


def quiet_libraries() -> None:
    """No advertisements, no bars while weights load, no warnings about what is meant as it is."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # the frozen vision tower
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing. is deprecated")  # PEFT asks for it
    warnings.filterwarnings("ignore", message=r".*does not have many workers")
    warnings.filterwarnings("ignore", message=r".*LeafSpec")
    warnings.filterwarnings("ignore", message=r"Total length of `list` across ranks is zero")  # nothing to validate on
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated")  # DeepSpeed calls it
    transformers_logging.disable_progress_bar()


def run_command(main: Callable[..., Any], argv: Sequence[str] | None = None) -> int:
    """Call `main` with the options of a command line; its signature is their schema.

    Args:
        main: Fully typed; its docstring is the help. Its `**name` stands for the options of the function that is called
            with `**name`.
        argv: Options; by default those of this process.

    Returns:
        Exit status: 0; 2 after an error that the user can mend, whose message goes to standard error; 130 after Ctrl-C.
    """
    quiet_libraries()
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        args = [with_underscores(option) for option in given]
        check_config_files(args)
        auto_cli(main, args=config_first(args), as_positional=False, parser_class=SuggestingParser)
    except USER_ERRORS as error:
        print(f"error: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        return 130
    return 0


def new_output_folder(folder: Path, files: Sequence[str], overwrite: bool) -> Callable[[], None]:
    """Make a folder for results, and refuse one that holds some.

    Args:
        folder: Made with its parents.
        files: Names that count as results.
        overwrite: They may be replaced instead.

    Returns:
        What takes the old ones away. Call it when the first new result is there: nothing is lost by a run that fails.

    Raises:
        FileExistsError: There are some.
    """
    found = [folder / name for name in dict.fromkeys(files) if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} already holds results ({', '.join(path.name for path in found)}); choose another --output, "
            "or pass --overwrite=true"
        )
    folder.mkdir(parents=True, exist_ok=True)

    def clear() -> None:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return clear


def require_free_port(host: str, port: int) -> None:
    """ValueError where nobody can listen at a port, so that it is known before weights are read."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"port {port} of {host} cannot be had ({error}): choose another with --port") from error


def with_underscores(option: str) -> str:
    """`--show-kept` is `--show_kept`, as many write it; values stay as they are."""
    if not option.startswith("--"):
        return option
    name, equals, value = option.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
