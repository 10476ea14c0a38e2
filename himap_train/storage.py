"""Files and folders that are either complete or not there.

Everything is written beside its place under a temporary name and moved over in one step, so that a full disk or a
killed process leaves what was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; move it to `target` on success, delete it on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it takes the place of `target`, on failure it is deleted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _to_disk(file)
        previous = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():  # a folder with content cannot be replaced in one step
            os.replace(target, previous)
        os.replace(temporary, target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(file: Path) -> None:
    """Wait until the content is on the disk: only then is a move over the old file safe."""
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def disk_full_message(error: OSError, wanted: Path, last_good: Path | None = None) -> str:
    """What to tell a user when saving `wanted` failed."""
    folder = next(parent for parent in wanted.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free / 2**20
    kept = f"; the last good one is still at {last_good}" if last_good and last_good.exists() else ""
    return f"could not save {wanted}: {error} ({free:.0f} MB free in {folder}){kept}. Free some space and resume"
