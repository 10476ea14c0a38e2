"""Images: where a record's file may lie, and how it is opened.

Paths come from other people's data, so they are resolved (symbolic links included) and refused when they leave the
image folder.
"""

from __future__ import annotations

import hashlib
import io
import os
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from himap_train.data.records import ImageSource, RecordError

_BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def resolve_image_path(name: str, folder: Path, where: str) -> Path:
    """The file that `name` means inside `folder`.

    Args:
        name: path as the record has it, relative to `folder`.
        folder: the image folder.
        where: the record, for the message.

    Raises:
        RecordError: the path leaves the folder (`..`, absolute, or through a symbolic link). Nothing is opened.
    """
    if not name.strip() or "\0" in name:
        raise RecordError(f"{where}: the image path is {name!r}; give a file below {folder}, or leave `image` out")
    root = _resolved(folder)
    path = os.path.realpath(os.path.join(root, name))
    if not path.startswith(root + os.sep):
        raise RecordError(
            f"{where}: image path {name!r} leaves the image folder {folder} (it leads to {path}); "
            "set image_folder to a folder that holds all images"
        )
    return Path(path)


@lru_cache(maxsize=16)
def _resolved(folder: Path) -> str:
    return os.path.realpath(folder).rstrip(os.sep)  # "" for the root of the file system


def open_image(source: ImageSource, where: str) -> Image.Image:
    """Decodes one image as RGB, turned upright by its EXIF orientation.

    Raises:
        RecordError: missing, not an image, or broken; names the record and the file.
    """
    try:
        image = source if isinstance(source, Image.Image) else Image.open(_readable(source))
        return ImageOps.exif_transpose(image).convert("RGB")
    except _BROKEN as error:
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def image_size(source: ImageSource, where: str) -> tuple[int, int]:
    """(width, height) in pixels, reading no more than the header of a file.

    Raises:
        RecordError: missing, or the header is not that of an image.
    """
    try:
        if isinstance(source, Image.Image):
            return source.size
        with Image.open(_readable(source)) as image:
            return image.size
    except _BROKEN as error:
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def content_digest(source: ImageSource, where: str) -> str:
    """SHA-256, in hex, of the file's bytes, or of the pixels of an image that has no file.

    Raises:
        RecordError: a file that cannot be read, or pixels that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        image = open_image(source, where)
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    try:
        return hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()
    except OSError as error:
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def _readable(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _what_is_wrong(source: ImageSource, error: Exception) -> str:
    name = str(source) if isinstance(source, Path) else "the image stored in the record"
    if isinstance(error, FileNotFoundError):
        return f"image file {name} does not exist; check image_folder and the record's `image`"
    if isinstance(error, UnidentifiedImageError):
        return f"{name} is not an image file that can be read"
    return f"{name} is broken ({type(error).__name__}: {error})"
