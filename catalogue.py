"""The song catalogue: every song of a data folder, which split it is in, and how the split was made."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError
from files import read_json, write_json, write_text

SPLITS = ("train", "val", "test")
CATALOGUE_FORMAT = 1


@dataclass(frozen=True)
class Song:
    """One song of the data set, as ``prepare_gtzan_data.py`` found it."""

    track: str  # unique name, also that of its feature files: "blues.00000"
    file: str  # "<genre>/<file name>", the form of the split lists
    path: str  # the audio: relative to the data folder, or absolute where it lies elsewhere
    genre: str
    artist: str  # "" when unknown: then the song counts as an artist of its own
    seconds: float
    rate: int  # Hz, of the file as found
    sha256: str  # of the file
    verdict: str  # "ok", or why the song is left out


@dataclass(frozen=True)
class Catalogue:
    """Every song found, which split each usable song is in, and how the split was made."""

    genres: list[str]  # class names in the order of the class numbers: sorted folder names
    songs: dict[str, Song]  # by track
    splits: dict[str, list[str]]  # "train", "val", "test" -> tracks
    split: dict[str, Any]  # name, seed, sha256 of the lists
    data: Path

    def audio_path(self, track: str) -> Path:
        """The file with a track's sound."""
        return self.data / self.songs[track].path  # an absolute path stands for itself

    def contents(self) -> dict[str, str]:
        """SHA-256 of what the training and the validation songs hold, by which a network knows its songs again."""
        return {
            split: hashlib.sha256("".join(self.songs[t].sha256 for t in self.splits[split]).encode()).hexdigest()
            for split in ("train", "val")
        }

    def label(self, track: str) -> int:
        """The class number of a track: the place of its genre."""
        return self.genres.index(self.songs[track].genre)

    def labels(self, tracks: Iterable[str]) -> np.ndarray:
        """Class numbers of tracks, int64 (songs,)."""
        return np.array([self.label(track) for track in tracks], dtype=np.int64)


def artist_key(artist: str) -> str:
    """Artists are one if their names agree but for case, white space and how accents are coded; "" is nobody known."""
    return unicodedata.normalize("NFC", " ".join(artist.split()).casefold())


def artist_names(artist: str) -> set[str]:
    """Keys of an artist and of everybody whom a joint credit names: who sings on "A, B & C" sings as B too.

    Bands with such names are taken apart as well.
    """
    key = artist_key(artist)
    return {key, *re.split(r"(?:\s*(?:[,&/;+()]|\b(?:and|with|featuring|feat|ft|vs)\b\.?)\s*)+", key)} - {""}


def split_list(songs: Mapping[str, Song], tracks: Iterable[str]) -> str:
    """The text of a split's list: a file name a line."""
    return "".join(songs[track].file + "\n" for track in tracks)


def split_sums(songs: Mapping[str, Song], splits: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """SHA-256 of every split's list, by which a catalogue knows its lists again."""
    return {name: hashlib.sha256(split_list(songs, tracks).encode()).hexdigest() for name, tracks in splits.items()}


def write_catalogue(catalogue: Catalogue, extra: dict[str, Any]) -> None:
    """Write ``metadata.json``, ``splits/<name>/*.txt`` and ``processed/*_files.txt`` below the data folder."""
    for split in SPLITS:
        text = split_list(catalogue.songs, catalogue.splits[split])
        write_text(catalogue.data / "splits" / catalogue.split["name"] / f"{split}.txt", text)
        write_text(catalogue.data / "processed" / f"{split}_files.txt", text)
    write_json(
        catalogue.data / "metadata.json",
        {
            "format": CATALOGUE_FORMAT,
            "genres": catalogue.genres,
            "split": catalogue.split,
            **extra,
            "songs": [asdict(song) for song in catalogue.songs.values()],
        },
    )


def read_catalogue(data: Path) -> Catalogue:
    """The catalogue below a data folder. Raises UserError if it is absent, broken or at odds with its lists."""
    maker = "prepare_gtzan_data.py"
    value = read_json(data / "metadata.json", maker)
    try:
        if value["format"] != CATALOGUE_FORMAT:
            raise ValueError(f"format {value['format']}, expected {CATALOGUE_FORMAT}")
        songs = {song["track"]: Song(**song) for song in value["songs"]}
        genres, split = [str(genre) for genre in value["genres"]], dict(value["split"])
        sums = {name: split["sha256"][name] for name in SPLITS}
        for song in songs.values():
            texts = (song.track, song.file, song.path, song.genre, song.artist, song.sha256, song.verdict)
            if not all(isinstance(text, str) for text in texts) or (song.verdict == "ok" and song.genre not in genres):
                raise ValueError(f"song {song.track!r}")
            if Path(song.track).name != song.track:  # its features are stored under it
                raise ValueError(f"{song.track!r} is no name")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{data / 'metadata.json'} is not a catalogue ({error}): run {maker} again") from None
    by_file = {song.file: song.track for song in songs.values() if song.verdict == "ok"}
    splits: dict[str, list[str]] = {}
    for name in SPLITS:
        path = data / "processed" / f"{name}_files.txt"
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != sums[name]:  # the run that made it was stopped, or it was edited
                raise UserError(f"{path} is not the list of {data / 'metadata.json'}: run {maker} again")
            splits[name] = [by_file[line] for line in content.decode().splitlines() if line]
        except OSError:
            raise UserError(f"{path} is not there: run {maker} first") from None
        except (KeyError, UnicodeDecodeError) as error:
            raise UserError(f"{path} lists {error}, which metadata.json doesn't: run {maker} again") from None
    tracks = [track for name in SPLITS for track in splits[name]]
    if len(set(tracks)) != len(tracks):
        raise UserError(f"a song is in two lists of {data / 'processed'}: run {maker} again")
    return Catalogue(genres, songs, splits, split, data)


def read_repeats(catalogue: Catalogue) -> list[tuple[str, str]]:
    """Pairs of usable tracks that hold one recording. Raises UserError if they weren't looked for, or are damaged."""
    path, maker = catalogue.data / "metadata.json", "prepare_gtzan_data.py"
    usable = {song.track for song in catalogue.songs.values() if song.verdict == "ok"}
    try:
        pairs = [
            (first, second)
            for first, second in (pair["tracks"] for pair in read_json(path, maker, "repeats")["repeats"])
        ]
        if unknown := {track for pair in pairs for track in pair} - usable:
            raise ValueError(f"{min(unknown)!r} is no usable song")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the repeats in {path} are damaged ({error}): run {maker} again") from None
    return pairs
