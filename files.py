"""Files: written whole, read with a word on what to do if that fails, folders kept to one run at a time."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from common import UserError, complain

PART = ".mgf-part"  # in the names of this project's temporary files alone; those that end so are swept up
LOCK_TRIES = 100  # in about a second
UMASK = os.umask(0o077)  # can't be read without being set
os.umask(UMASK)


class WriteError(UserError):
    """A file can't be written; the line ends with "run this again"."""


def hidden(name: str, most: int = 80) -> str:
    """The start of a hidden file's name, short enough to get an end: file systems count bytes, 255 at most."""
    return f".{name.encode('utf-8', 'ignore')[:most].decode('utf-8', 'ignore')}."


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    Raises WriteError where the disk is full or the folder can't be written to; ``path`` is then as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=hidden(path.name), suffix=PART, dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~UMASK)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise WriteError(
                f"{path} can't be written ({reason}): make room or mend that, then run this again"
            ) from None
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder that this one writes to; sweep up what killed ones left half written.

    Raises UserError, saying which process is there, if there is one.
    """
    with _lock(folder / ".lock", folder):
        _sweep(folder)
        try:
            yield
        finally:
            _sweep(folder)  # worker processes that were stopped


def _sweep(folder: Path) -> None:
    for parent, folders, files in os.walk(folder):
        # The songs are the user's, and a folder with a lock of its own is another run's
        folders[:] = [name for name in folders if name != "raw" and not Path(parent, name, ".lock").exists()]
        for name in files:
            if name.startswith(".") and name.endswith(PART):
                Path(parent, name).unlink(missing_ok=True)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The same for one file and the time that it is written; whatever else lies beside it is not touched."""
    with _lock(path.with_name(f"{hidden(path.name, 240)}lock"), path):
        yield


@contextmanager
def _lock(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file ``path``, which says who holds it.

    The lock is the system's (``flock``), not the file: it ends with its process, however that dies, so none is ever
    stale; and unlike a lock of ``fcntl`` it isn't lost when some other part of the process closes the file. Folders
    that are made for it go with it, as far as nothing was written.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with _lock_file(path, what):
            yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _lock_file(path: Path, what: Path) -> Iterator[None]:
    tries = 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = path.open("a+", encoding="utf-8")
        except FileNotFoundError as error:  # whoever made the folder has just removed it, or no file can be there
            tries += 1
            if tries == LOCK_TRIES:
                raise UserError(f"{path} can't be made ({error.strerror}): choose another place for {what}") from None
            time.sleep(0.01)
            continue
        if not _try_lock(stream, what):
            stream.seek(0)
            holder = stream.read().strip()
            stream.close()
            raise UserError(f"{what} is in use by {holder or 'another process'}: wait until it ends, or stop it")
        try:
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        stream.close()  # whoever held it before has removed the file
    try:
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        stream.flush()
        yield
    finally:
        with suppress(OSError):  # Windows keeps it, because it is open; there it lies about, unlocked
            path.unlink()
        stream.close()


def _try_lock(stream: IO[str], what: Path) -> bool:
    """Take the lock of an open file if nobody has it. Where a disk knows no locks, say so and go on."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(stream.fileno(), 1 << 30, os.SEEK_SET)  # far from the text, which others want to read
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        complain(f"{what} can't be locked ({error.strerror}): don't start a second run there")
    return True


def check_replaceable(path: Path, mark: str, kind: str, option: str) -> None:
    """Raise UserError if ``path`` is something else than an earlier ``kind``, so that no song is lost to a slip, or if
    its folder can't be written to, so that no work is.

    It is one if ``mark`` is in its first 200 bytes; ``option`` is what named the path.
    """
    problem = ""
    try:
        with path.open("rb") as stream:
            if mark.encode() not in stream.read(200):
                problem = f"is there already and is no {kind}"
    except FileNotFoundError:
        pass
    except OSError as error:
        problem = f"can't be read ({error.strerror})"
    try:
        folder = next(parent for parent in Path(os.path.realpath(path)).parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        problem = problem or f"can't be written ({error.strerror})"
    if problem:
        raise UserError(f"{path} {problem}: choose another {option}")


def write_text(path: Path, text: str) -> None:
    """Write a file whole, in UTF-8. Raises WriteError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole. Raises WriteError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy, whole. Raises WriteError."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


def read_json(path: Path, made_by: str, *keys: str) -> Any:
    """The JSON value in ``path``, an object if it must have ``keys``.

    Raises UserError, naming the script that makes it, if absent, broken or without a key.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if keys and not (isinstance(value, dict) and value.keys() >= {*keys}):
            raise ValueError(f"no object with {', '.join(keys)}")
        return value
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run {made_by} first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}): run {made_by} again") from None


def read_array(path: Path, made_by: str) -> np.ndarray:
    """The array in ``path``. Raises UserError, naming the script that makes it, if absent or broken."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):  # several of them, in a zip
            raise ValueError("not one array")
        return array
    except FileNotFoundError:
        raise UserError(f"{path} is not there: run {made_by} first") from None
    except Exception as error:  # numpy's reader of headers raises what it likes
        raise UserError(f"{path} can't be read ({error}): delete it and run {made_by} again") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
