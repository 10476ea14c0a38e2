"""Put an exported folder on the Hugging Face hub, or say why that did not work."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token

from himap_train.checkpoints.adapter import BASE_FILE, CONFIG_FILE, SCHEDULE_FILE, WEIGHTS_FILE
from himap_train.checkpoints.ranking import RANKING_FILE
from himap_train.data.sources import HUB_NAME
from himap_train.models.families.image_form import FORM_FILE

_ADAPTER = [WEIGHTS_FILE, CONFIG_FILE, BASE_FILE, SCHEDULE_FILE, RANKING_FILE, FORM_FILE]
_MODEL = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
"""What an earlier upload left goes where the new one has none: loaders would take it."""


def require_hub(repository: str) -> None:
    """Before hours are spent on an export: is the name one, and is somebody logged in?

    Raises:
        ValueError: The name is not of the form owner/name.
        PermissionError: There is no token.
    """
    if not HUB_NAME.fullmatch(repository):
        raise ValueError(f"--push-to-hub={repository!r} is no name on the hub; expected owner/name")
    if get_token() is None:
        raise PermissionError(
            f"--push-to-hub={repository} needs a token with write access: run `hf auth login` or set HF_TOKEN, or "
            "leave the option out"
        )


def push_to_hub(folder: Path, repository: str, private: bool) -> str:
    """Make the repository if it is not there and upload a folder in one commit.

    Args:
        folder: What is uploaded.
        repository: owner/name.
        private: Whether a repository that is made now is private; else as its owner has set for new ones.

    Returns:
        The address of the commit.

    Raises:
        ConnectionError: The hub refused or cannot be reached; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)  # None: as its owner has set
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload with himap-train",
            delete_patterns=[*_ADAPTER, *(_MODEL if (folder / "config.json").is_file() else [])],
        )
    except Exception as error:  # errors of its HTTP library too, which another release may replace
        reason = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
        raise ConnectionError(
            f"{folder} is complete, but could not be uploaded to {repository}: {reason}. Check the token's rights and "
            f"the network, then: hf upload {repository} {folder}"
        ) from error
    return str(commit.commit_url)
