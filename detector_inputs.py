"""Find the songs that a command line names, and decode them ahead of the networks."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

from archives import SOUND_SUFFIXES, is_sound_name
from common import UserError
from decoding import SoundReader
from detector_unlike import sounds_like
from extract_features import FRAMES_PER_SECOND, silence_note, timed_features
from sound_faults import no_file

Found = tuple[str, UserError | None]  # a song, or a name and why no song is behind it
_SEPARATOR = f"[/{re.escape(os.sep)}]"
_DEEP = re.compile(rf"(.*?)(?:^|(?<={_SEPARATOR}))\*\*(?:{_SEPARATOR}+(.*))?$", re.DOTALL)  # before and after a **
_ALL_FILES = re.compile(rf"(?:^|.*{_SEPARATOR})\*\*(?:{_SEPARATOR}+\*)?", re.DOTALL)  # patterns of all files below


# ---------------------------------------------------------------- names


def find_songs(names: Iterable[str], listing: Iterable[bytes] | None = None) -> Iterator[Found]:
    """The songs behind names, lazily and in their order; what is named twice comes twice.

    Parameters
    ----------
    names : files; folders, searched to any depth for known suffixes, linked ones once; patterns (``**`` for any
        depth) that the shell left as they were; ``-`` for the lines of ``listing``, each a file or folder
    listing : in bytes, because a file name needn't be valid text; None is standard input
    """
    for name in names:
        if name == "-":
            empty = True
            for line in _standard_input() if listing is None else listing:
                if path := os.fsdecode(line.rstrip(b"\r\n")):
                    empty = False
                    yield from _behind(path)
            if empty:
                yield name, UserError("-: standard input names no song")
        elif glob.has_magic(name) and not os.path.lexists(name):
            given: set[str] = set()  # with ** a folder and what is in it both match
            for match in sorted(_matches(name)):
                if not os.path.isdir(match) or not _ALL_FILES.fullmatch(name):
                    for found in _behind(match):
                        if found[0] not in given:
                            given.add(found[0])
                            yield found
            if not given:
                yield name, UserError(f"{name}: no file has such a name")
        else:
            yield from _behind(name)


def _matches(pattern: str) -> Iterator[str]:
    """What a pattern names, as with ``glob``, whose own ``**`` follows links round and round."""
    deep = _DEEP.match(pattern)
    if deep is None:
        yield from glob.iglob(pattern)
        return
    before, after = deep[1], "*" if deep[2] is None else deep[2]
    for top in glob.iglob(before) if before else [""]:
        for folder, _ in _walk(top or os.curdir):
            inside = folder if top else folder[len(os.curdir) + 1 :]
            yield from _matches(os.path.join(glob.escape(inside), after))


def _walk(top: str, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Folders that aren't hidden, each with the names of its files; links are followed, to no folder twice."""
    seen = {os.path.realpath(top)}
    for folder, folders, files in os.walk(top, onerror=onerror, followlinks=True):
        real = {entry: os.path.realpath(os.path.join(folder, entry)) for entry in folders}
        new = []
        for entry in sorted(folders, key=lambda entry: (os.path.islink(os.path.join(folder, entry)), entry)):
            if not entry.startswith(".") and entry != "__MACOSX" and real[entry] not in seen:
                seen.add(real[entry])
                new.append(entry)
        folders[:] = sorted(new)
        yield folder, sorted(files)


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
    for folder, files in _walk(name, problems.append):
        for file in files:
            if is_sound_name(Path(file)):
                count += 1
                yield os.path.join(folder, file), None
    for problem in problems:
        yield str(problem.filename), UserError(f"{problem.filename}: can't be searched ({problem.strerror})")
    if not count and not problems:
        yield name, UserError(f"{name}: a folder without songs ({', '.join(sorted(SOUND_SUFFIXES))})")


# ---------------------------------------------------------------- sound


@dataclass(frozen=True)
class Heard:
    """A decoded song: what every network needs of it."""

    start: float  # seconds into the file
    seconds: float
    size: int  # bytes, and
    mtime: float  # seconds since 1970: the file's before it was read
    notes: list[str]  # what had to be mended to decode the song, and silence that was left out
    features: dict[str, np.ndarray]  # of extract_features.timed_features, and
    sounding: np.ndarray  # which of the sound's frames these have, bool (frames,): silence is left out
    sounds_like: str | None  # "noise" (or a tone, or silence) or "speech" if there is no music in it


def listen(
    path: str | Path, start: float = 0.0, duration: float | None = None, stop: threading.Event | None = None
) -> Heard:
    """Decode a song and make its features, once for all networks. Raises UserError as ``SoundReader``.

    Once ``stop`` is set, the rest of the song is left out.
    """
    sound = SoundReader(Path(path), start, duration)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {no_file(Path(path)) or getattr(error, 'strerror', error)}") from None
    blocks = iter(sound) if stop is None else itertools.takewhile(lambda _: not stop.is_set(), sound)
    features, sounding = timed_features(blocks)
    kind = sounds_like(features["melspectrogram"], min(sound.seconds, sounding.sum() / FRAMES_PER_SECOND))
    notes = [*sound.notes, *filter(None, [silence_note(sounding)])]
    return Heard(start, sound.seconds, status.st_size, status.st_mtime, notes, features, sounding, kind)


class Listeners:
    """Threads that ``listen`` to songs from the moment they are made; to be used once, in a ``with`` block.

    Iteration gives each song, in order, or why it can't be decoded; at most ``workers`` songs are decoded ahead of
    the one that is in use.
    """

    def __init__(self, songs: Iterable[Found], start: float = 0.0, duration: float | None = None, workers: int = 1):
        self._part = start, duration
        self._stop, self._slots = threading.Event(), threading.Semaphore(workers)
        self._ready = Queue[tuple[str, Any] | BaseException | None]()  # None is the end
        self._pool = ThreadPoolExecutor(workers)
        # Names come from a thread of their own: no answer waits until the next one is on standard input
        threading.Thread(target=self._feed, args=[songs], daemon=True).start()

    def _feed(self, songs: Iterable[Found]) -> None:
        try:
            for path, problem in songs:
                self._slots.acquire()
                if self._stop.is_set():
                    return
                self._ready.put((path, problem or self._pool.submit(self._listen, path)))
            self._ready.put(None)
        except BaseException as error:  # is raised where the songs are wanted
            self._ready.put(error)

    def _listen(self, path: str) -> Heard | UserError:
        try:
            return listen(path, *self._part, self._stop)
        except UserError as error:
            return error

    def __enter__(self) -> Listeners:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()  # also after Ctrl-C: don't decode what nobody waits for
        self._slots.release()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[str, Heard | UserError]]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            path, result = item
            heard = result if isinstance(result, UserError) else result.result()
            self._slots.release()
            yield path, heard
