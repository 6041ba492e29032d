"""What every script shares at the command line: options, mistakes in one line, progress, tables.

Nothing here imports torch or librosa, so that ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import functools
import io
import math
import os
import re
import shlex
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Waiting threads that spin take the cores that working ones need: training beside another process is twice as
# fast without. Must be set before torch is loaded, and every script loads this module first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MAX_THREADS = 1024
LONGEST_LINE = 10_000  # signs of a complaint


class UserError(Exception):
    """A mistake that one line can explain; the line ends with what to do next."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings keep their line breaks and every option that has a default shows it, if it is no mere switch."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 or action.default in (None, "", []):
            return action.help
        if isinstance(action.default, list | tuple):
            typed = " ".join(map(str, action.default)).replace("%", "%%")  # what is returned is a format
            return f"{action.help} (default: {typed})"
        return super()._get_help_string(action)


def number(kind: type[int] | type[float], least: float = 0, most: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a number of a kind, ``least`` to ``most``, neither NaN nor infinite."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} is no {'whole ' * (kind is int)}number") from None
        if not least <= value <= most or value == math.inf:  # NaN is in no range
            end = "finite" if most == math.inf else f"at most {most:.10g}"
            raise argparse.ArgumentTypeError(f"must be at least {least:.10g} and {end}")
        return value

    return read


fraction = number(float, 0, 1)
seconds = number(float, 0, 1e6)
positive_int = number(int, 1)
seed_number = number(int, 0, 2**32 - 1)  # what every library takes for a seed
thread_count = number(int, 1, MAX_THREADS)


def path_name(text: str) -> Path:
    """An argparse type: a path. An empty one, of an unset variable, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a name is needed, this one is empty")
    return Path(text)


_SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "--data": {
        "type": path_name,
        "default": Path("data"),
        "metavar": "DIR",
        "help": "folder of songs, splits and features",
    },
    "--models": {"type": path_name, "default": Path("models"), "metavar": "DIR", "help": "folder of checkpoints"},
    "--seed": {"type": seed_number, "default": 0, "metavar": "N", "help": "seed of every random choice"},
    "--device": {
        "choices": ["auto", "cpu", "cuda", "mps"],
        "default": "auto",
        "help": "where networks run; auto takes MPS, then CUDA, then CPU",
    },
    "--threads": {"type": thread_count, "default": os.cpu_count() or 1, "metavar": "N", "help": "CPU threads"},
    "--json": {"action": "store_true", "help": "print the result as JSON on standard output, and nothing else there"},
}


def argument_parser(description: str | None, *shared: str, add_help: bool = True) -> argparse.ArgumentParser:
    """A parser described by a script's docstring, with the named shared options (``"--data"``, ``"--seed"``...)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, add_help=add_help)
    for name in shared:
        parser.add_argument(name, **_SHARED_OPTIONS[name])
    return parser


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorate ``main(argv=None) -> int`` so that a user's mistake is one line on stderr and exit code 1.

    What is done says what comes next, by the ``Next`` line of the script's docstring if it has one.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _open_standard_streams()
        try:
            with _flushed_output():
                with _own_lines_only():
                    code = main(argv)
                after = re.search(r"^Next +(.*)$", main.__globals__["__doc__"] or "", re.MULTILINE)
                one_of_many = os.environ.get("RANK", "0") != "0"  # processes that train together
                if code == 0 and after and not one_of_many:
                    print(f"next: {after[1]}{_folder_options(argv)}")
                return code
        except UserError as error:
            complain(str(error))
            return 1
        except BrokenPipeError:  # whoever read the output has gone
            return 1
        except OSError as error:
            name = error.filename
            where = os.fsdecode(name) if isinstance(name, str | bytes) else "a file can't be written"
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "not a folder" if in_the_way else error.strerror or error
            complain(f"{where}: {reason}; put that right, then run the same command again")
            return 1
        except (MemoryError, RuntimeError) as error:  # torch has several kinds for memory, which are no MemoryError
            if not isinstance(error, MemoryError) and not re.search(
                "out of memory|t allocate memory|not enough memory", str(error)
            ):
                raise
            complain("memory is full: close other programs or, where taken, lower --batch-size or choose --device cpu")
            return 1
        except KeyboardInterrupt:
            complain("interrupted; run the same command again to go on")
            return 130

    return wrapped


def _folder_options(argv: Sequence[str] | None) -> str:
    """ " (where taken: --data DIR --models DIR)" with those that were given, for the next scripts."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("data", "models"):
        parser.add_argument(f"--{name}")
    given = {name: value for name, value in vars(parser.parse_known_args(argv)[0]).items() if value is not None}
    words = [word for name, value in given.items() for word in (f"--{name}", shlex.quote(value))]
    return f" (where taken: {' '.join(words)})" if words else ""


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
def _flushed_output() -> Iterator[None]:
    """Meet a full disk or a reader that has gone here, not when Python ends, where nothing catches it."""
    failed = True
    try:
        yield
        failed = False
    except SystemExit as end:
        failed = bool(end.code)
        raise
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left, when Python ends
            if not failed:  # what is being raised says more
                raise


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
    """One line on stderr, of bounded length, whatever the message or a file name in it contains."""
    line = f"{Path(sys.argv[0]).name}: {one_line(message[:LONGEST_LINE])}"
    if "tqdm" in sys.modules:  # there may be a bar in the way
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def one_line(text: str) -> str:
    """Text with everything spelled out that breaks a line, drives a terminal or is no valid Unicode."""
    return "".join(sign if _stays_in_line(sign) else ascii(sign)[1:-1] for sign in text)


def _stays_in_line(sign: str) -> bool:
    """Letters, signs, spaces, and the two that join and part them in Persian, Hindi and emoji."""
    return sign.isprintable() or unicodedata.category(sign) == "Zs" or sign in "\u200c\u200d"


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
    cells = [[one_line(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, or what it is tested against."""
    import importlib.metadata  # a tenth of the time that --help takes

    names = ("torch", "librosa", "numpy", "scipy", "scikit-learn", "soundfile", "soxr")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in names}}


def versions_line() -> str:
    """Those versions as text: "python 3.11.7, torch 2.13.0, ..."."""
    return ", ".join(f"{name} {version}" for name, version in library_versions().items())
