"""From a name in a config to a source: the embedded scenes, a LLaVA JSON or JSONL file, a Hugging Face data set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from himap_train.data.huggingface import HuggingFaceRecords
from himap_train.data.llava_file import LlavaFile, is_llava_file
from himap_train.data.records import Source
from himap_train.data.scene_questions import SceneQuestions

_TIMEOUT_S = 5.0
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
_SCENE_OPTIONS = ("scenes", "seed", "questions_per_scene", "turns", "fixed", "decoys")
_FORMS = (
    "a LLaVA file *.json, *.jsonl or *.ndjson (also *.gz), a folder or *.parquet file with a Hugging Face data set "
    "or the name of one on the hub (owner/name), each also with :split or :config:split behind it, or "
    "embedded:[fine-]train|validation|test"
)


def open_source(
    spec: str | Path,
    image_folder: str | Path | None = None,
    split: str = "train",
    follow_links: bool = False,
) -> Source:
    """Opens a source of conversations.

    Args:
        spec: a LLaVA file (`*.json`, or `*.jsonl` or `*.ndjson` for files larger than memory; `*.gz` of each); a
            folder (from `save_to_disk`, or with parquet or JSON files) or `*.parquet` file with a Hugging Face data
            set; the name of one on the hub; `embedded:train|validation|test`, or `embedded:fine-train` and so on, for
            the scenes in the package, with options as in `embedded:train?scenes=5000&turns=2` (`fixed=1`: the same in
            every epoch). A split of a Hugging Face data set stands after a colon, a
            config before it: `owner/name:test`, `owner/name:config:test`.
        image_folder: where image paths start; by default the folder of the data file.
        split: split of a Hugging Face data set when spec names none.
        follow_links: images may lie elsewhere, where symbolic links in the image folder lead.

    Raises:
        FileNotFoundError: no such file, folder or image folder.
        ValueError: not one of these forms, or the file is not in the format.
        ConnectionError: the hub cannot be reached; comes within seconds.
    """
    text = str(spec)
    if text.startswith("embedded:"):
        return _scenes(text)
    path, config, named = parts_of(text)
    if is_llava_file(path) and not path.is_dir():
        if named:
            raise ValueError(f"data {text!r}: a file of records has no splits; give {path} alone")
        return LlavaFile(path, image_folder, follow_links)
    root = Path(image_folder) if image_folder else None
    if path.is_dir() or path.suffix.lower() == ".parquet":
        dataset = local_dataset(path, named or split, config, named is not None)
        root = root or (path if path.is_dir() else path.parent)
    elif path.exists():
        kind = f"*{path.suffix}" if path.suffix else "without an ending"
        raise ValueError(
            f"data {text!r}: files {kind} are not read. Write LLaVA records, one JSON object a line, into a file "
            f"*.jsonl; expected {_FORMS}"
        )
    elif HUB_NAME.fullmatch(str(path)):
        dataset = load_from_hub(str(path), named or split, config)
    else:
        raise FileNotFoundError(f"data {text!r} is not there (current folder: {Path.cwd()}); expected {_FORMS}")
    return HuggingFaceRecords(dataset, text, root, follow_links)


def _scenes(spec: str) -> Source:
    """`embedded:split?option=number&...` -> the embedded scenes."""
    split, _, query = spec.removeprefix("embedded:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in _SCENE_OPTIONS or not value.isdecimal():
            raise ValueError(
                f"{spec!r}: option {key}={value}; expected a number for one of {', '.join(_SCENE_OPTIONS)}"
            )
    return SceneQuestions(split, **{key: int(value) for key, value in options.items()})


def parts_of(text: str) -> tuple[Path, str | None, str | None]:
    """Path, config and split that `path`, `path:split` and `path:config:split` name; a split may be `train[:1000]`.

    Raises:
        ValueError: more parts than these.
    """
    name, *given = [text] if Path(text).exists() else re.split(r":(?![^\[]*\])", text)
    if len(given) > 2:
        raise ValueError(
            f"data {text!r} has {len(given)} parts behind its name; expected name:split or name:config:split"
        )
    return Path(name), given[0] if len(given) == 2 else None, given[-1] if given else None


def local_dataset(path: Path, split: str, config: str | None = None, named: bool = False) -> Any:
    """A split of a Hugging Face data set in a folder, or a parquet file, which is a split itself.

    Args:
        path: the folder or file.
        split: one of its splits.
        config: one of its configs, where it has several.
        named: a user has named the split, so that it is asked of a file too.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a loading script, no such split, or files that cannot be read.
    """
    import datasets
    import pyarrow.parquet

    if not path.exists():
        raise FileNotFoundError(f"data file {path} does not exist (current folder: {Path.cwd()})")
    if (script := path / f"{path.resolve().name}.py").exists():
        raise ValueError(
            f"{path} has a loading script, {script.name}; scripts of data sets are never run. Give the data alone: "
            f"expected {_FORMS}"
        )
    try:
        if path.suffix.lower() == ".parquet":
            pyarrow.parquet.read_schema(path)  # names what is wrong; `datasets` would log a traceback first
            return datasets.load_dataset("parquet", data_files=str(path), split=split if named else "train")
        if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
            return datasets.load_dataset(str(path), config, split=split)
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the libraries meet in files that they do not check
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be read as a Hugging Face data set ({what}); expected {_FORMS}") from error
    if config is not None:
        raise ValueError(f"{path} was written by save_to_disk, which knows no configs; give {path}:{split}")
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"{path} has no split {split!r}; it has {', '.join(loaded)}. Name one: {path}:{next(iter(loaded))}"
            )
        return loaded[split]
    if named and split != str(loaded.split or "train"):
        raise ValueError(f"{path} was written by save_to_disk as one split, {loaded.split or 'unnamed'}: give it alone")
    return loaded


def load_from_hub(name: str, split: str, config: str | None = None) -> Any:
    """`datasets.load_dataset` behind one quick question whether the hub answers.

    Args:
        name: owner/name.
        split: one of its splits.
        config: one of its configs, where it has several.

    Raises:
        ConnectionError: the hub cannot be reached; comes within seconds.
        ValueError: the hub has no such data set, config or split, it needs a token, or it is a script: none is run.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    way_out = (
        "Give the path of a local copy, set HF_HUB_OFFLINE=1 if it is in the cache of this machine, or use the data in "
        "the package (embedded:train)"
    )
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:  # `load_dataset` itself would retry for half a minute and more
            huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_S)
    except (GatedRepoError, RepositoryNotFoundError):
        pass  # `load_dataset` says so
    except Exception as error:  # the HTTP library's own errors differ between versions of huggingface_hub
        reason = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"data set {name} cannot be fetched from the hub ({reason}). {way_out}") from error
    try:
        return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        reason = "it is not in the local cache and HF_HUB_OFFLINE is set"
        raise ConnectionError(f"data set {name} cannot be fetched from the hub ({reason}). {way_out}") from error
    except (ValueError, FileNotFoundError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data set {name}{f', config {config!r}' if config else ''}, split {split!r}: {error}"
        ) from error
