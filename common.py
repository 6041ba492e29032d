"""What every script shares that is not music: the command line, files written whole.

Nothing here imports torch or librosa, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import os
import socket
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

# Waiting threads that spin take the cores that working ones need: training beside another process is twice as
# fast without. Must be set before torch is loaded, and every script loads this module first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MAX_THREADS = 1024
LOCK_TRIES = 100  # in about a second


# ---------------------------------------------------------------- command line


class UserError(Exception):
    """A mistake that one line can explain; the line ends with what to do next."""


class WriteError(UserError):
    """A file can't be written; the line ends with "run this again"."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings keep their line breaks and every option that has a default shows it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def seconds(text: str) -> float:
    """An argparse type: a number of seconds, 0 to a million."""
    value = float(text)
    if not 0 <= value <= 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1000000")
    return value


def whole_number(text: str, least: int = 0, most: float = math.inf) -> int:
    """An argparse type: a whole number of at least 0."""
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
    if value > most:
        raise argparse.ArgumentTypeError(f"{text} is more than {most}")
    return value


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    return whole_number(text, 1)


def seed_number(text: str) -> int:
    """An argparse type: a whole number below 2^32, which is what every library takes for a seed."""
    return whole_number(text, 0, 2**32 - 1)


def thread_count(text: str) -> int:
    """An argparse type: a number of threads that libraries take."""
    return whole_number(text, 1, MAX_THREADS)


_SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {"type": Path, "default": Path("data"), "metavar": "DIR", "help": "folder of songs, splits and features"},
    "--models": {"type": Path, "default": Path("models"), "metavar": "DIR", "help": "folder of checkpoints"},
    "--seed": {"type": seed_number, "default": 0, "metavar": "N", "help": "seed of every random choice"},
    "--device": {
        "choices": ["auto", "cpu", "cuda", "mps"],
        "default": "auto",
        "help": "where networks run; auto takes MPS, then CUDA, then CPU",
    },
    "--threads": {"type": thread_count, "default": os.cpu_count() or 1, "metavar": "N", "help": "CPU threads"},
    "--json": {"action": "store_true", "help": "print the result as JSON on standard output, and nothing else there"},
}


def argument_parser(description: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser described by a script's docstring, with the named shared options (``"--data"``, ``"--seed"``...)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    for name in shared:
        parser.add_argument(name, **_SHARED_OPTIONS[name])
    return parser


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorate ``main(argv=None) -> int`` so that a user's mistake is one line on stderr and exit code 1."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _open_standard_streams()
        try:
            with _own_lines_only():
                return main(argv)
        except UserError as error:
            complain(str(error))
            return 1
        except BrokenPipeError:  # whoever read the output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            place = (
                os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file can't be written"
            )
            complain(f"{place}: {error.strerror or error}; put that right, then run the same command again")
            return 1
        except KeyboardInterrupt:
            complain("interrupted; run the same command again to go on")
            return 130

    return wrapped


def _open_standard_streams() -> None:
    """Make standard streams of what the caller closed, lest the next file that is opened be taken for one of them.

    Characters that standard output can't encode are spelled out there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each gets the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)  # workers have them too
            setattr(sys, name, stream)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _own_lines_only() -> Iterator[None]:
    """Keep what C libraries print (libsndfile's mp3 decoder does) off the terminal: stderr is for this code's lines."""
    ours = sys.stderr
    if ours is None or sys.__stderr__ is None or ours is not sys.__stderr__:  # a caller wants to see all
        yield
        return
    ours.flush()
    terminal = os.dup(2)
    with open(os.devnull, "wb") as nowhere, os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as lines:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = lines
        try:
            yield
        finally:
            sys.stderr = ours
            os.dup2(terminal, 2)
            os.close(terminal)


def complain(message: str) -> None:
    """One line on stderr, whatever the message or a file name in it contains."""
    print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Text with everything spelled out that breaks a line, drives a terminal or is no valid Unicode."""
    return "".join(
        sign if sign.isprintable() or unicodedata.category(sign) == "Zs" else ascii(sign)[1:-1] for sign in text
    )


def workers_end_with_us(workers: int, jobs: int) -> dict[str, Any]:
    """Options of ``joblib.Parallel``: up to ``workers`` processes that end soon after this one, however that dies.

    There are no more of them than jobs. They end within a second or two.
    Those of a killed run would otherwise work on in a folder that the next run has. Windows doesn't tell orphans that
    they are; there they end when they have had nothing to do for ten seconds.
    """
    count = max(1, min(workers, jobs))
    return {"n_jobs": count, "initializer": _end_with, "initargs": (os.getpid(),), "idle_worker_timeout": 10}


def _end_with(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def progress(iterable: Iterable[Any], description: str, total: int | None = None) -> Iterable[Any]:
    """A tqdm bar on stderr, silent when stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, desc=description, total=total, disable=None, leave=False)


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Plain text columns: the first flush left, the others flush right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, saved with every result."""
    import importlib.metadata  # a tenth of the time that --help takes

    names = ("torch", "librosa", "numpy", "scikit-learn", "soundfile", "soxr")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in names}}


def versions_line() -> str:
    """Those versions as text: "python 3.11.7, torch 2.13.0, ..."."""
    return ", ".join(f"{name} {version}" for name, version in library_versions().items())


# ---------------------------------------------------------------- files


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` on success, remove it on any error.

    Raises WriteError where the disk is full or the folder can't be written to; ``path`` is then as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".part", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
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
            if name.startswith(".") and name.endswith(".part"):
                Path(parent, name).unlink(missing_ok=True)


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The same for one file and the time that it is written; whatever else lies beside it is not touched."""
    with _lock(path.with_name(f".{path.name[:80]}.lock"), path):
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


def check_replaceable(path: Path, is_own: Callable[[bytes], bool], kind: str, option: str) -> None:
    """Raise UserError if ``path`` is something else than an earlier ``kind``, so that no song is lost to a slip.

    ``is_own`` judges by the first 200 bytes; ``option`` is what named the path.
    """
    try:
        with path.open("rb") as stream:
            if is_own(stream.read(200)):
                return
        problem = f"is there already and is no {kind}"
    except FileNotFoundError:
        return
    except OSError as error:
        problem = f"can't be read ({error.strerror})"
    raise UserError(f"{path} {problem}: choose another {option}")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, array: np.ndarray) -> None:
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
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
