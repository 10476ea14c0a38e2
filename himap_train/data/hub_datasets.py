"""Data sets from the Hugging Face hub. A machine that cannot reach it hears so within seconds."""

from __future__ import annotations

from typing import Any

_TIMEOUT_S = 5.0


def load_from_hub(name: str, split: str, config: str | None = None) -> Any:
    """`datasets.load_dataset` behind one quick question whether the hub answers.

    Args:
        name: owner/name.
        split: one of its splits.
        config: one of its configs, where it has several.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: the hub has no such data set, config or split, it needs a token, or it is a script: none is run.
    """
    import datasets
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _ask(name)
    try:
        return datasets.load_dataset(name, config, split=split)
    except ConnectionError as error:
        raise ConnectionError(_unreachable(name, "it is not in the local cache and HF_HUB_OFFLINE is set")) from error
    except (ValueError, FileNotFoundError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data set {name}{f', config {config!r}' if config else ''}, split {split!r}: {error}"
        ) from error


def _ask(name: str) -> None:
    """One request: `load_dataset` itself would retry for half a minute and more."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=_TIMEOUT_S)
    except GatedRepoError as error:
        raise ValueError(
            f"data set {name} needs a token: accept its terms on the hub and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a file or folder here nor a public data set on the hub; check the spelling"
        ) from error
    except Exception as error:  # the HTTP library's own errors differ between versions of huggingface_hub
        raise ConnectionError(_unreachable(name, f"{type(error).__name__}: {error}")) from error


def _unreachable(name: str, reason: str) -> str:
    return (
        f"data set {name} cannot be fetched from the hub ({reason}). Give the path of a local copy, set "
        "HF_HUB_OFFLINE=1 if it is in the cache of this machine, or use the data in the package (embedded:train)"
    )
