"""Images: where a record's file may lie, and how it is opened.

Paths come from other people's data, so they are resolved (symbolic links included) and refused when they leave the
image folder. Only the formats of `FORMATS` are decoded: Pillow would hand others to programs that it finds.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from PIL import Image, UnidentifiedImageError

from himap_train.data.pixel_modes import SAY_HOW_IT_LIES, as_rgb, orientation
from himap_train.data.records import ImageSource, RecordError
from himap_train.models.families.base import Background

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
_NOT_A_PATH = re.compile(r"data:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def resolve_image_path(name: str, folder: Path, where: str, follow_links: bool = False) -> Path:
    """The file that `name` means inside `folder`.

    Args:
        name: path as the record has it, relative to `folder`.
        folder: the image folder.
        where: the record, for the message.
        follow_links: symbolic links in the folder may lead out of it.

    Raises:
        RecordError: no path, or one that leaves the folder (`..`, absolute, or through a symbolic link). Nothing is
            opened.
    """
    name = name.removeprefix("file://")
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    if not name.strip() or "\0" in name:
        raise RecordError(f"{where}: the image path is {shown}; give a file below {folder}, or leave `image` out")
    if _NOT_A_PATH.match(name):
        raise RecordError(f"{where}: the image is {shown}; images are read from files alone: store it below {folder}")
    try:
        longest = max(map(len, os.fsencode(name).split(b"/")))
    except UnicodeEncodeError:
        raise RecordError(f"{where}: the image path {shown} has half a character, which no file name has") from None
    if longest > 255 or len(name) > 4000:
        raise RecordError(
            f"{where}: the image path has {len(name)} characters ({shown}), more than a file name can have; where that "
            f"is the image itself (base64), store it in a file below {folder}"
        )
    root = _resolved(folder)
    joined = os.path.join(root, name)
    path, real = os.path.normpath(joined), os.path.realpath(joined)
    inside = root + os.sep
    if follow_links and path.startswith(inside):
        return Path(path)
    if not real.startswith(inside):
        linked = path.startswith(inside)
        raise RecordError(
            f"{where}: image path {shown} leaves the image folder {folder} (it leads to {real}); "
            + ("allow symbolic links to lead out of it (follow_links: true), or " if linked else "")
            + "set image_folder to a folder that holds all images"
        )
    return Path(real)


def image_source(value: Any, folder: Path | None, where: str, follow_links: bool) -> ImageSource:
    """An image as a row holds it: decoded, bytes, a path below `folder`, or {"bytes", "path"}."""
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        value = value["bytes"]
    if isinstance(value, Image.Image | bytes):
        return value
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str):
        found = f"{type(value).__name__} {value!r:.60}"
        raise RecordError(f"{where}: an image is {found}; expected a path, an image or bytes")
    if folder is None:
        raise RecordError(
            f"{where}: the image is a path ({path!r:.80}); set image_folder to the folder that holds the images"
        )
    return resolve_image_path(path, folder, where, follow_links)


@lru_cache(maxsize=16)
def _resolved(folder: Path) -> str:
    return os.path.realpath(folder).rstrip(os.sep)  # "" for the root of the file system


def open_image(source: ImageSource, where: str, background: Background = "white") -> Image.Image:
    """Decodes one image as RGB, turned upright by its EXIF orientation, as `pixel_modes.as_rgb` says.

    Args:
        source: file, bytes of a file, or decoded image.
        where: the record, for the message.
        background: colour that lies under what is transparent.

    Raises:
        RecordError: missing, not an image, or broken; names the record and the file.
    """
    try:
        return as_rgb(source if isinstance(source, Image.Image) else _opened(source), background)
    except Exception as error:  # decoders raise many kinds for what is no image
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def image_size(source: ImageSource, where: str) -> tuple[int, int]:
    """(width, height) in pixels of the upright image, reading no more than the header of a file.

    Raises:
        RecordError: missing, or the header is not that of an image.
    """
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else _opened(source) as image:
            return image.size[::-1] if _lies_on_its_side(image) else image.size
    except Exception as error:  # decoders raise many kinds for what is no image
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def _lies_on_its_side(image: Image.Image) -> bool:
    """Whether width and height change places when it is turned upright. Of a PNG what stands before its pixels says it,
    as Pillow would decode them to look behind; a TIFF turns itself.
    """
    if image.format == "TIFF" or (image.format == "PNG" and SAY_HOW_IT_LIES.isdisjoint(image.info)):
        return False
    return orientation(image) in (5, 6, 7, 8)


def content_digest(source: ImageSource, where: str) -> str:
    """SHA-256, in hex, of the file's bytes, or of the pixels of an image that has no file.

    Raises:
        RecordError: a file that cannot be read, or pixels that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        digest = hashlib.sha256(f"{source.size}".encode())
        for background in get_args(Background)[: 1 + source.has_transparency_data]:
            digest.update(open_image(source, where, background).tobytes())
        return digest.hexdigest()
    try:
        if isinstance(source, Path):
            _require_file(source)
        return hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()
    except (OSError, ValueError, MemoryError) as error:
        raise RecordError(f"{where}: {_what_is_wrong(source, error)}") from error


def _opened(source: Path | bytes) -> Image.Image:
    """The image with its header read."""
    if isinstance(source, Path):
        _require_file(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _require_file(path: Path) -> None:
    """Raises OSError for what is no file: opening a pipe would wait for its writer, a device may never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device")
        raise OSError(f"it is {kind}, expected a file")


def _what_is_wrong(source: ImageSource, error: BaseException) -> str:
    name = str(source) if isinstance(source, Path) else "the image stored in the record"
    if isinstance(error, FileNotFoundError):
        return f"image file {name} does not exist; check image_folder and the record's `image`"
    if isinstance(error, UnidentifiedImageError):
        return f"{name} is not an image file that can be read; expected {', '.join(FORMATS)}: convert it to one of them"
    if isinstance(error, MemoryError):
        return f"{name} does not fit into memory when it is decoded; scale it down"
    return f"{name} is broken ({type(error).__name__}: {error})"
