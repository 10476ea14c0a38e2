"""Files and folders that are either complete or not there.

Everything is written beside its place under a temporary name and moved over in one step, so that a full disk or a
killed process leaves what was there before. What a killed process leaves is taken away by the next one that writes
there; a temporary name says which process of which machine it is of, and only those of processes that are gone count.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HOST = re.sub(r"\W", "-", socket.gethostname()) or "host"
_TEMPORARY = re.compile(r"\.(?P<name>.+?)\.(?:(?P<host>[\w-]+)@)?(?P<process>\d+)\.(?P<kind>tmp|old)")
"""`.NAME.HOST@PROCESS.tmp`, or without the host, as earlier versions wrote it."""


@contextmanager
def atomic_file(target: Path, last_good: Callable[[], Path | None] = lambda: None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; move it to `target` on success, delete it on failure.

    Args:
        target: Its folder is made where there is none.
        last_good: Finds what is still there where this cannot be written, for the message.

    Raises:
        OSError: It could not be written; says what was kept and the way out.
    """
    with _explained(target, last_good):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(target, "tmp")
        try:
            temporary.touch()
            mode = temporary.stat().st_mode & 0o666  # what the umask leaves; some writers give their owner alone access
            yield temporary
            _to_disk(temporary, mode)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it takes the place of `target`, on failure it is deleted.

    Raises:
        OSError: It could not be written; says what was kept and the way out.
        ValueError: The folder is a mount point, which nothing can take the place of.
    """
    target = target.resolve()  # where a link leads, on its disk
    if target.is_mount():
        raise ValueError(f"{target} is a mount point, which cannot be replaced in one step: give a folder inside it")
    with _explained(target, lambda: target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        temporary = _temporary(target, "tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        mode = temporary.stat().st_mode & 0o666
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _to_disk(file, mode)
            # A folder with content cannot be replaced in one step, but on Linux two can change places.
            if not target.exists():
                os.replace(temporary, target)
            elif not _exchange(temporary, target):
                previous = _temporary(target, "old")
                os.replace(target, previous)
                os.replace(temporary, target)
                shutil.rmtree(previous, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Take away what this user's killed processes on this machine left half-written in a folder, of one target or all.

    A folder that was moved aside, and whose successor did not come, is moved back.

    Returns:
        What was taken away.
    """
    removed = []
    for entry in sorted(folder.glob(".*")):
        found = _TEMPORARY.fullmatch(entry.name)
        if not found or name not in (None, found["name"]) or not _is_gone(found["host"], int(found["process"])):
            continue
        if not _is_own(entry):
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not target.exists():
            os.replace(entry, target)
            continue
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() and not entry.is_symlink() else entry.unlink(
            missing_ok=True
        )
        removed.append(entry)
    return removed


def write_failure(error: BaseException) -> OSError | None:
    """The error of the operating system behind a failed write, as an OSError; None where it is something else.

    Writers in other languages have kinds of their own for a full disk: safetensors, tokenizers, torch's archive.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number in _WRITE_FAILURES:
        return OSError(number, os.strerror(number))
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return OSError(errno.ENOSPC, f"torch could not write the whole file ({text})")
    return None


_LONGEST = 1400
"""Characters of a message: a path of 5000 is not shown whole."""


def told(error: BaseException) -> str:
    """The message of an error; where something else than this module failed to write, with what was kept."""
    failure = write_failure(error) if isinstance(error, OSError) else None
    if failure is None:
        text = str(error)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    if failure.errno in _IN_THE_WAY:
        return f"{error}. Something else has its place: move that away, or choose another name"
    refused = failure.errno in _NOT_ALLOWED
    way_out = "Give this user access, or choose another folder" if refused else "Free some space"
    return f"{error}. What was saved before, checkpoints and results, is as it was. {way_out}, and start again"


def _failed(error: OSError, wanted: Path, last_good: Path | None) -> str:
    """What to tell a user when saving `wanted` failed: the reason, what was kept and the way out."""
    folder = next(parent for parent in wanted.absolute().parents if parent.exists())
    kept = f"; the last good one is still at {last_good}" if last_good and last_good.exists() else ""
    if error.errno in _NOT_ALLOWED:
        way_out = f"Make {folder} writable for this user, or choose another folder"
        return f"could not save {wanted}: {error} ({folder} cannot be written to){kept}. {way_out}, and start again"
    if error.errno in _IN_THE_WAY:
        return f"could not save {wanted}: {error}; something else has its place{kept}. Move that away and start again"
    free = shutil.disk_usage(folder).free / 2**20
    return f"could not save {wanted}: {error} ({free:.0f} MB free in {folder}){kept}. Free some space and resume"


_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EEXIST)
_WRITE_FAILURES = (*_NOT_ALLOWED, *_IN_THE_WAY, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def _explained(target: Path, last_good: Callable[[], Path | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # tokenizers raise a bare Exception
        failure = write_failure(error)
        if failure is None:
            raise
        raise OSError(_failed(failure, target, last_good())) from error


def _temporary(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{_HOST}@{os.getpid()}.{kind}")


def _is_gone(host: str | None, process: int) -> bool:
    """Whether a process has ended. Of other machines nobody knows; one whose number is in use again counts as there."""
    if host not in (None, _HOST):
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def _is_own(entry: Path) -> bool:
    """Whether an entry of a folder belongs to this user; False where another process has taken it away."""
    try:
        return entry.lstat().st_uid == os.geteuid()
    except FileNotFoundError:
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; whether the system can."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _to_disk(file: Path, mode: int) -> None:
    """Wait until the content is on the disk: only then is a move over the old file safe."""
    if file.is_file():
        file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
