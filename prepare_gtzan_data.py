"""Find the songs, check every one of them, and split them into training, validation and test lists.

Genres are the names of the folders that the songs lie in. Songs that can't be used are named, recorded and left
out. Repeats of one recording never lie on both sides of a split.

Reads   the Kaggle zip, the original genres.tar.gz, or a folder of genre folders (--source, else data/raw/)
Writes  data/raw/genres/<genre>/<file>                    the songs of an archive; a folder is used where it lies
        data/metadata.json                                every song with its verdict, repeats, how it was split
        data/splits/<split>/{train,val,test}.txt          this split
        data/processed/{train,val,test}_files.txt         the split in use: the one made last
Next    extract_features.py

Examples
    python prepare_gtzan_data.py --source archive.zip
    python prepare_gtzan_data.py --split artist --artist-index GTZANindex.txt
    python prepare_gtzan_data.py --split fault_filtered --split-lists lists/
    python prepare_gtzan_data.py --split artist --artist-index GTZANindex.txt --folds 3 --fold 1
"""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from archives import ARCHIVE_SUFFIXES, AUDIO_SUFFIXES, Limits, extract_songs, is_archive, is_audio_name
from catalogue import SPLITS, Catalogue, Song, artist_key, artist_names, split_sums, write_catalogue
from common import (
    UserError,
    argument_parser,
    command,
    complain,
    file_sha256,
    format_table,
    fraction,
    library_versions,
    locked,
    one_line,
    positive_int,
    progress,
    seconds,
    workers_end_with_us,
)
from repeats import DEFAULT_THRESHOLD, Repeat, find_repeats, fingerprint, sound_digest
from sound_faults import no_file
from splits import (
    check_apart,
    drop_crossing_repeats,
    drop_joint_credits,
    linked_groups,
    repeat_groups,
    share_out,
    split_fold,
)

NESTED = ("genres", "genres_original", "Data/genres_original", "Data/genres")  # where data sets put the genre folders
PUBLISHED_LISTS = {"train": "train_filtered.txt", "val": "valid_filtered.txt", "test": "test_filtered.txt"}
MAX_NAME_BYTES = 200  # of genre and file: files named by them must be possible anywhere
SILENCE = 1e-4  # standard deviation of the samples (-80 dB) below which a song counts as silent


# ---------------------------------------------------------------- finding the songs


def find_genre_folders(source: Path | None, data: Path, limits: Limits | None) -> Path:
    """The folder whose subfolders are genres; an archive is extracted first. Raises UserError if nothing fits."""
    raw = data / "raw"
    if source is None:
        archives = sorted(path for path in raw.glob("*") if path.is_file() and is_archive(path))
        if len(archives) > 1:
            raise UserError(f"{raw} holds {len(archives)} archives: name the one to use with --source")
        source = archives[0] if archives else raw
    if source.is_file() and is_archive(source):
        extract_songs(source, raw / "genres", limits)
        source = raw / "genres"
    found = "nothing there"
    if source.is_dir():
        for folder in (*(source / nested for nested in NESTED), source):
            if folder.is_dir() and any(_songs_in(genre) for genre in _folders_in(folder)):
                return folder
        names = [path.name for path in sorted(source.iterdir())]
        found = f"found {len(names)} entries there ({', '.join(names[:5])}...)" if names else "found an empty folder"
    elif source.exists():
        found = "found a file of another kind"
    raise UserError(
        f"no songs in {source}: {found}; expected genre folders of songs ({' '.join(sorted(AUDIO_SUFFIXES))}) or an "
        f"archive of them ({' '.join(ARCHIVE_SUFFIXES)}): name it with --source or put it into {raw}"
    )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _songs_in(folder: Path) -> list[Path]:
    """What is named like a song; that it is one shows when it is checked."""
    return sorted(path for path in folder.iterdir() if is_audio_name(path.name))


def list_songs(root: Path, data: Path) -> list[Song]:
    """Every song below the genre folders, not yet looked at, ordered by genre and file name."""
    songs: dict[str, Song] = {}
    home = Path(os.path.abspath(data))
    for folder in _folders_in(root):
        for path in _songs_in(folder):
            where = Path(os.path.abspath(path))
            inside = where.is_relative_to(home)
            song = Song(
                track=free_track_name(folder.name, path.name, songs),
                file=f"{folder.name}/{path.name}",
                path=where.relative_to(home).as_posix() if inside else str(where),
                genre=folder.name,
                artist="",
                seconds=0.0,
                rate=0,
                sha256="",
                verdict="ok",
            )
            songs[song.track.casefold()] = song
    return list(songs.values())


def track_name(genre: str, stem: str) -> str:
    """``blues.00000`` of ``blues/blues.00000.wav``, ``rock.my song`` of ``rock/my song.mp3``."""
    return stem if stem.startswith(f"{genre}.") else f"{genre}.{stem}"


def free_track_name(genre: str, file_name: str, taken: dict[str, Song]) -> str:
    """The track name, with the extension and then a number added while another song has it (``taken``: casefolded)."""
    track = track_name(genre, Path(file_name).stem)
    if track.casefold() in taken:
        track = base = track + Path(file_name).suffix
        number = 2
        while track.casefold() in taken:
            track, number = f"{base}~{number}", number + 1
    return track


# ---------------------------------------------------------------- checking the songs


@dataclass(frozen=True)
class Check:
    """What one song turned out to be."""

    verdict: str
    sha256: str = ""  # of the file
    seconds: float = 0.0
    rate: int = 0
    sound: str = ""  # digest of the decoded sound
    print: np.ndarray | None = None


def check_song(path: Path, file: str, min_seconds: float) -> Check:
    """Decode a song wholly and judge it. Never raises: whatever goes wrong is the verdict."""
    try:
        from decoding import decode

        if problem := no_file(path):
            return Check(problem)
        if one_line(file) != file:
            return Check("its name holds a line break or another character that can't be printed: rename it")
        if len(file.encode()) > MAX_NAME_BYTES:
            return Check("its name is too long to name its features by: rename it")
        digest = file_sha256(path)
    except Exception as error:
        return Check(_reason(error, path))
    try:
        sound = decode(path)
        check = Check("ok", digest, round(sound.seconds, 3), sound.rate)
        if sound.notes:
            return replace(check, verdict="; ".join(sound.notes))
        if sound.seconds < min_seconds:
            return replace(check, verdict=f"only {sound.seconds:.2f} s of sound")
        if sound.samples.std(dtype=np.float64) < SILENCE:
            return replace(check, verdict="silent")
        return replace(check, sound=sound_digest(sound.samples), print=fingerprint(sound.samples))
    except Exception as error:
        return Check(_reason(error, path), digest)


def _reason(error: Exception, path: Path) -> str:
    text = " ".join(str(error).removeprefix(f"{path}: ").split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def check_songs(songs: Sequence[Song], data: Path, min_seconds: float, workers: int) -> list[Check]:
    from joblib import Parallel, delayed

    jobs = (delayed(check_song)(data / song.path, song.file, min_seconds) for song in songs)
    results = Parallel(return_as="generator", **workers_end_with_us(workers, len(songs)))(jobs)
    return list(progress(results, "checking songs", len(songs)))


def judged(song: Song, check: Check, artist: str) -> Song:
    """The song with the results of its check, fit to be written as UTF-8."""
    names = {key: getattr(song, key).encode("utf-8", "backslashreplace").decode() for key in ("track", "file", "path")}
    return replace(
        song,
        **names,
        artist=artist,
        seconds=check.seconds,
        rate=check.rate,
        sha256=check.sha256,
        verdict=check.verdict.encode("utf-8", "backslashreplace").decode(),
    )


# ---------------------------------------------------------------- artists and published lists


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, with or without a byte order mark. Raises UserError if it can't be read."""
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None


def song_names(file: str) -> tuple[str, str]:
    """What a song is looked up by in lists of others, ``<genre>.<song>`` with its extension and without.

    However the file system writes accents.
    """
    path = PurePosixPath(unicodedata.normalize("NFC", file))
    genre = path.parent.name
    return (track_name(genre, path.name), track_name(genre, path.stem)) if genre else (path.name, path.stem)


def read_artists(path: Path) -> dict[str, str]:
    """Artists by ``song_names``, from lines ``file ::: artist ::: title`` as in Sturm's index of GTZAN.

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
        raise UserError(f"{path} has no line 'file ::: artist ::: title': expected an index such as GTZANindex.txt")
    return artists


def artist_of(file: str, artists: Mapping[str, str]) -> str:
    """The artist of a song ``<genre>/<file>`` by what ``read_artists`` returns; "" if it isn't there."""
    exact, stem = song_names(file)
    return artists.get(exact) or artists.get(stem, "")


def read_split_lists(folder: Path, songs: Sequence[Song]) -> dict[str, list[str]]:
    """Tracks of the published lists ``{train,valid,test}_filtered.txt``, matched by genre and stem.

    Absent and unusable songs are counted on stderr. Raises UserError if lists overlap or name no song here.
    """
    by_name: dict[tuple[str, str], Song] = {}
    for song in songs:
        name = (song.genre, PurePosixPath(song.file).stem)
        if name not in by_name or by_name[name].verdict != "ok":
            by_name[name] = song
    splits: dict[str, list[str]] = {}
    seen: dict[tuple[str, str], str] = {}
    for split, file_name in PUBLISHED_LISTS.items():
        path = folder / file_name
        names = {(PurePosixPath(line).parent.name, PurePosixPath(line).stem) for line in _stripped(read_lines(path))}
        for name in sorted(names):
            if seen.setdefault(name, split) != split:
                raise UserError(f"{'/'.join(name)} is in the lists of {seen[name]} and of {split}: mend {folder}")
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


def _stripped(lines: Sequence[str]) -> list[str]:
    return [line.strip() for line in lines if line.strip()]


# ---------------------------------------------------------------- reporting


def _report_repeats(usable: Sequence[Song], repeats: Sequence[Repeat]) -> None:
    exact = sum(pair.exact for pair in repeats)
    print(f"\nrepeats: {exact} exact and {len(repeats) - exact} near pairs, each kept within one split")
    for pair in repeats:
        first, second = usable[pair.first], usable[pair.second]
        if first.genre != second.genre:
            complain(f"{first.track} and {second.track} are the same sound under two genres ({pair.score:.2f})")


def _report_splits(catalogue: Catalogue, left_out: int) -> None:
    songs = catalogue.songs
    counts = {split: Counter(songs[track].genre for track in catalogue.splits[split]) for split in SPLITS}
    rows: list[list[object]] = [
        [genre, *(counts[split][genre] for split in SPLITS), sum(counts[split][genre] for split in SPLITS)]
        for genre in catalogue.genres
    ]
    totals = [counts[split].total() for split in SPLITS]
    rows.append(["all", *totals, sum(totals)])
    artists = {split: {artist_key(songs[t].artist) for t in catalogue.splits[split]} - {""} for split in SPLITS}
    known = any(artists.values())
    if known:
        rows.append(["artists", *(len(artists[split]) for split in SPLITS), len(set().union(*artists.values()))])
    print(f"\n{format_table(('genre', *SPLITS, 'all'), rows)}")
    if left_out:
        print(f"{left_out} songs can't be used and are left out")
    unlisted = len(songs) - left_out - sum(totals)
    if unlisted:
        print(f"{unlisted} usable songs are in no list")
    trained_on = set[str]().union(*(artist_names(songs[track].artist) for track in catalogue.splits["train"]))
    for split in ("val", "test"):
        tracks = catalogue.splits[split]
        shared = sum(not trained_on.isdisjoint(artist_names(songs[track].artist)) for track in tracks)
        if known:
            print(
                f"{shared} of {len(tracks)} {split} songs have an artist who is in training too, joint credits included"
            )
    for split in SPLITS:
        if missing := [genre for genre in catalogue.genres if not counts[split][genre]]:
            listed = catalogue.split["method"] == "fault_filtered"
            reason = "none of its list is here" if listed else "too few to share out"
            complain(f"{split} has no song of {', '.join(missing)}: {reason}")


# ---------------------------------------------------------------- command line


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "--data", "--seed")
    add = parser.add_argument
    add("--source", type=Path, metavar="PATH", help="archive, or folder of genre folders (else what is in data/raw)")
    add("--split", choices=["random", "artist", "fault_filtered"], default="random", help="which songs go together")
    add("--artist-index", type=Path, metavar="FILE", help="lines 'file ::: artist ::: title': Sturm's GTZANindex.txt")
    add("--split-lists", type=Path, metavar="DIR", help="folder of {train,valid,test}_filtered.txt")
    add("--val-fraction", type=fraction, default=0.15, metavar="X", help="share of the songs for validation")
    add("--test-fraction", type=fraction, default=0.15, metavar="X", help="share of the songs for the test")
    add("--folds", type=positive_int, metavar="K", help="cross-validation: cut into K folds")
    add("--fold", type=positive_int, metavar="I", help="the fold, 1 to K, that is the test set")
    add("--min-seconds", type=seconds, default=1.0, metavar="S", help="shorter songs are left out")
    add(
        "--repeat-threshold",
        type=fraction,
        default=DEFAULT_THRESHOLD,
        metavar="X",
        help="similarity from which two songs count as one recording; 1 looks for exact repeats only",
    )
    add("--workers", type=positive_int, default=os.cpu_count() or 1, metavar="N", help="processes")
    add("--no-archive-limits", action="store_true", help="extract an archive of any size")
    args = parser.parse_args(argv)
    if args.split == "artist" and not args.artist_index:
        parser.error("--split artist needs --artist-index")
    if args.split == "fault_filtered" and not args.split_lists:
        parser.error("--split fault_filtered needs --split-lists")
    if args.split_lists and args.split != "fault_filtered":
        parser.error("--split-lists goes with --split fault_filtered")
    shares = [name for name in ("val_fraction", "test_fraction") if getattr(args, name) != parser.get_default(name)]
    if shares and (args.split == "fault_filtered" or (args.folds and "test_fraction" in shares)):
        parser.error("the split lists and folds say how many songs are tested: leave out the fraction")
    if (args.folds is None) != (args.fold is None):
        parser.error("--folds and --fold go together")
    if args.folds and (args.split == "fault_filtered" or args.folds < 2 or args.fold > args.folds):
        parser.error("--folds is 2 or more, --fold no larger, and the split random or artist")
    if not min(args.val_fraction, args.test_fraction) > 0 or args.val_fraction + args.test_fraction >= 1:
        parser.error("--val-fraction and --test-fraction are above 0 and sum to less than 1")
    if args.folds and args.val_fraction + 1 / args.folds >= 1:
        parser.error("--val-fraction leaves nothing to train on with so few folds")
    return args


def split_songs(
    songs: Sequence[Song],
    repeats: Sequence[tuple[str, str]],
    method: str,
    seed: int,
    val: float,
    test: float,
    fold: tuple[int, int] | None = None,
    lists: Path | None = None,
) -> tuple[dict[str, list[str]], dict[str, Any], list[str]]:
    """Share the usable songs out: the one place where songs get into training, validation or test.

    Parameters
    ----------
    repeats : pairs of tracks that hold one recording
    method : "random", "artist" or "fault_filtered", the latter by the published ``lists``
    val, test : shares of the songs; with ``fold`` (number, of) the test songs are those of one fold of many

    Returns
    -------
    Tracks of each split, what a catalogue says of the split, and the tracks that are in none because they repeat a song
    of another list or share an artist by joint credit across the border of the test songs.
    """
    usable = [song for song in songs if song.verdict == "ok"]
    place = {song.track: index for index, song in enumerate(usable)}
    pairs = [(place[first], place[second]) for first, second in repeats]
    group_of = repeat_groups([*place], repeats)
    dropped: list[str] = []
    if method == "fault_filtered":
        if lists is None:
            raise UserError("fault_filtered needs the published lists: give their folder with --split-lists")
        splits = read_split_lists(lists, songs)
        dropped = drop_crossing_repeats(splits, group_of)
    else:
        genres = sorted({song.genre for song in usable})
        labels = np.array([genres.index(song.genre) for song in usable])
        keys = [artist_key(song.artist) if method == "artist" else "" for song in usable]
        groups = linked_groups(len(usable), keys, pairs)
        if fold:
            part = split_fold(labels, groups, *fold, val, seed)
        else:
            part = share_out(labels, groups, (1 - val - test, val, test), seed)
        splits = {
            name: sorted(song.track for song, place in zip(usable, part, strict=True) if place == number)
            for number, name in enumerate(SPLITS)
        }
        if method == "artist":
            dropped = drop_joint_credits(splits, {song.track: artist_names(song.artist) for song in usable})
    kinds = {"repeat": {track: str(group) for track, group in group_of.items()}}
    if method == "artist":
        kinds["artist"] = {song.track: artist_key(song.artist) for song in usable}
    check_apart(splits, kinds)
    record = {
        "name": f"{method}_fold{fold[0]}of{fold[1]}" if fold else method,
        "method": method,
        "seed": seed,
        "fold": {"number": fold[0], "of": fold[1]} if fold else None,
        "sha256": split_sums({song.track: song for song in songs}, splits),
    }
    return splits, record, dropped


def _run(args: argparse.Namespace) -> int:
    artists = read_artists(args.artist_index) if args.artist_index else {}
    root = find_genre_folders(args.source, args.data, None if args.no_archive_limits else Limits())
    found = list_songs(root, args.data)
    genres = sorted({song.genre for song in found})
    if len(genres) < 2:
        raise UserError(f"{root} has songs of one genre only ({genres[0]}): at least two genre folders are needed")
    print(f"{len(found)} songs of {len(genres)} genres in {root}", flush=True)

    checks = check_songs(found, args.data, args.min_seconds, args.workers)
    songs = [judged(song, check, artist_of(song.file, artists)) for song, check in zip(found, checks, strict=True)]
    left_out = [song for song in songs if song.verdict != "ok"]
    for song in left_out:
        complain(f"{song.file}: {song.verdict}; left out")
    usable = [song for song in songs if song.verdict == "ok"]
    if not usable:
        raise UserError(f"none of the {len(songs)} songs in {root} can be used: see the reasons above")
    if artists:
        unknown = sum(not song.artist for song in usable)
        if unknown == len(usable):
            raise UserError(f"{args.artist_index} names the artist of none of these songs: is it of this data set?")
        print(f"{unknown} songs have no known artist; each counts as an artist of its own")

    good = [check for check in checks if check.verdict == "ok"]
    prints = [check.print for check in good if check.print is not None]
    repeats = find_repeats([check.sound for check in good], prints, args.repeat_threshold)
    _report_repeats(usable, repeats)
    repeated = [(usable[pair.first].track, usable[pair.second].track) for pair in repeats]
    fold = (args.fold, args.folds) if args.folds else None
    splits, split, dropped = split_songs(
        songs, repeated, args.split, args.seed, args.val_fraction, args.test_fraction, fold, args.split_lists
    )
    listed = args.split == "fault_filtered"
    reason = "repeats a song of another list" if listed else "names an artist on the other side of the test"
    for track in dropped:
        complain(f"{track} is left out: it {reason}")
    by_track = {song.track: song for song in songs}
    catalogue = Catalogue(genres, by_track, splits, split, args.data)
    write_catalogue(
        catalogue,
        {
            "source": str(args.source or root),
            "versions": library_versions(),
            "left_out": len(left_out),
            "thresholds": {"min_seconds": args.min_seconds, "repeat": args.repeat_threshold, "silence": SILENCE},
            "fractions": {"val": args.val_fraction, "test": args.test_fraction},
            "repeats": [
                {
                    "tracks": tracks,
                    "kind": "exact" if pair.exact else "near",
                    "score": pair.score,
                }
                for tracks, pair in zip(repeated, repeats, strict=True)
            ],
            "dropped": dropped,
        },
    )
    _report_splits(catalogue, len(left_out))
    wrote = f"{args.data / 'metadata.json'} and the {split['name']} lists"
    print(f"\nwrote {wrote}; next: extract_features.py --data {args.data}")
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    with locked(args.data):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
