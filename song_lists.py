"""Lists and indexes that others made of a data set: artists, published splits, and how songs are found in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from catalogue import Song
from common import UserError, complain

PUBLISHED_LISTS = {"train": "train_filtered.txt", "val": "valid_filtered.txt", "test": "test_filtered.txt"}


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, with or without a byte order mark. Raises UserError if it can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}): say where it is") from None


def track_name(genre: str, stem: str) -> str:
    """``blues.00000`` of ``blues/blues.00000.wav``, ``rock.my song`` of ``rock/my song.mp3``."""
    return stem if stem.startswith(f"{genre}.") else f"{genre}.{stem}"


def song_names(file: str) -> tuple[str, str]:
    """What a song is looked up by in lists of others, ``<genre>.<song>`` with its extension and without.

    However the file system writes accents.
    """
    path = PurePosixPath(unicodedata.normalize("NFC", file))
    genre = path.parent.name
    return (track_name(genre, path.name), track_name(genre, path.stem)) if genre else (path.name, path.stem)


def read_artists(path: Path) -> dict[str, str]:
    """Artists by ``song_names``, from lines ``<genre>/<file> ::: artist ::: title``.

    As in Sturm's index of GTZAN ``<genre>.<number>.wav`` needs no folder.
    Of files that differ in the extension only, the first counts for songs of yet another extension.
    """
    artists: dict[str, str] = {}
    for line in read_lines(path):
        file, *fields = (field.strip() for field in line.split(":::"))
        if fields and not file.startswith("#"):
            exact, stem = song_names(file)
            artists[exact] = fields[0]
            artists.setdefault(stem, fields[0])
    if not artists:
        raise UserError(f"{path} has no line '<genre>/<file> ::: artist ::: title' as GTZANindex.txt has: name another")
    return artists


def artist_of(file: str, artists: Mapping[str, str]) -> str:
    """The artist of a song ``<genre>/<file>`` by what ``read_artists`` returns; "" if it isn't there."""
    exact, stem = song_names(file)
    return artists.get(exact) or artists.get(stem, "")


def read_split_lists(folder: Path, songs: Sequence[Song]) -> dict[str, list[str]]:
    """Tracks of the published lists ``{train,valid,test}_filtered.txt``, found by ``song_names`` without an extension.

    Absent and unusable songs are counted on stderr. Raises UserError if lists overlap or name no song here.
    """
    by_name: dict[str, Song] = {}
    for song in songs:
        name = song_names(song.file)[1]
        if name not in by_name or by_name[name].verdict != "ok":
            by_name[name] = song
    splits: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for split, file_name in PUBLISHED_LISTS.items():
        path = folder / file_name
        names = {song_names(line.strip())[1] for line in read_lines(path) if line.strip()}
        for name in sorted(names):
            if seen.setdefault(name, split) != split:
                raise UserError(f"{name} is in the lists of {seen[name]} and of {split}: mend {folder}")
        here = [by_name[name] for name in sorted(names) if name in by_name]
        usable = [song.track for song in here if song.verdict == "ok"]
        if len(usable) < len(names):
            complain(
                f"{path} lists {len(names)} songs: {len(names) - len(here)} are not here, "
                f"{len(here) - len(usable)} can't be used, {len(usable)} remain"
            )
        if not usable:
            raise UserError(f"none of the songs that {path} lists can be used: expected <genre>/<song>")
        splits[split] = usable
    return splits
