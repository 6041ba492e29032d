"""Find the songs that a command line names: files, folders, patterns, a list on standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from archives import AUDIO_SUFFIXES
from common import UserError
from extract_features import AV_SUFFIXES

SUFFIXES = AUDIO_SUFFIXES | AV_SUFFIXES
Found = tuple[str, UserError | None]  # a song, or a name and why no song is behind it


def find_songs(names: Iterable[str], listing: Iterable[bytes] | None = None) -> Iterator[Found]:
    """The songs behind names, lazily and in their order; what is named twice comes twice.

    Parameters
    ----------
    names : files; folders, searched to any depth for known suffixes; patterns (``**`` for any depth) that the shell
        left as they were; ``-`` for the lines of ``listing``, each a file or folder
    listing : in bytes, because a file name needn't be valid text; None is standard input
    """
    for name in names:
        if name == "-":
            for line in _standard_input() if listing is None else listing:
                if path := os.fsdecode(line.rstrip(b"\r\n")):
                    yield from _behind(path)
        elif glob.has_magic(name) and not os.path.lexists(name):
            matches = sorted(glob.glob(name, recursive=True))
            if not matches:
                yield name, UserError(f"{name}: no file has such a name")
            for match in matches:
                if not os.path.isdir(match) or not name.endswith("**"):  # which has its files among the matches
                    yield from _behind(match)
        else:
            yield from _behind(name)


def _standard_input() -> Iterator[bytes]:
    # A stream of its own: a thread that still waits for a line must not hold the lock of sys.stdin when Python ends
    with open(sys.stdin.fileno(), "rb", closefd=False) as lines:
        yield from lines


def _behind(name: str) -> Iterator[Found]:
    """The songs of a folder, or the name itself; that it is a song shows when it is decoded."""
    if not os.path.isdir(name):
        yield name, None
        return
    problems: list[OSError] = []
    count = 0
    for folder, folders, files in os.walk(name, onerror=problems.append):
        folders[:] = sorted(entry for entry in folders if not entry.startswith(".") and entry != "__MACOSX")
        for file in sorted(files):
            if Path(file).suffix.lower() in SUFFIXES and not file.startswith("."):  # macOS litters with ._<name>
                count += 1
                yield os.path.join(folder, file), None
    for problem in problems:
        yield str(problem.filename), UserError(f"{problem.filename}: can't be searched ({problem.strerror})")
    if not count and not problems:
        yield name, UserError(f"{name}: a folder without songs ({', '.join(sorted(SUFFIXES))})")
