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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from archives import ARCHIVE_SUFFIXES, SOUND_SUFFIXES, Limits, extract_songs, is_archive, is_sound_name
from catalogue import SPLITS, Catalogue, Song, artist_key, artist_names, write_catalogue
from common import (
    UserError,
    argument_parser,
    command,
    complain,
    format_table,
    fraction,
    library_versions,
    one_line,
    path_name,
    positive_int,
    progress,
    seconds,
    workers_end_with_us,
)
from files import file_sha256, locked
from repeats import DEFAULT_THRESHOLD, Repeat, find_repeats, fingerprints, sound_digest
from song_lists import PUBLISHED_LISTS, artist_of, read_artists, read_lines, read_split_lists, track_name
from sound_faults import no_file
from splits import split_songs

NESTED = ("genres", "genres_original", "Data/genres_original", "Data/genres")  # where data sets put the genre folders
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
        f"no songs in {source}: {found}; expected genre folders of songs ({' '.join(sorted(SOUND_SUFFIXES))}) or an "
        f"archive of them ({' '.join(ARCHIVE_SUFFIXES)}): name it with --source or put it into {raw}"
    )


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _songs_in(folder: Path) -> list[Path]:
    """What is named like a song; that it is one shows when it is checked."""
    return sorted(filter(is_sound_name, folder.iterdir()))


def list_songs(root: Path, data: Path) -> list[Song]:
    """Every song below the genre folders, not yet looked at, ordered by genre and file name."""
    songs: dict[str, Song] = {}
    home = Path(os.path.abspath(data))
    if loose := sum(path.is_file() and is_sound_name(path) for path in root.iterdir()):
        complain(f"{root}: sound files in no genre folder are not used, {loose} here")
    for folder in _folders_in(root):
        paths = _songs_in(folder)
        if passed_over := sum(map(is_sound_name, folder.rglob("*"))) - len(paths):
            complain(f"{folder}: sound files in subfolders are not used, {passed_over} here")
        for path in paths:
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
    prints: Sequence[np.ndarray] = ()  # of its pieces


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
        return replace(check, sound=sound_digest(sound.samples), prints=fingerprints(sound.samples))
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
    names = ("track", "file", "path", "genre")
    return replace(
        song,
        **{name: getattr(song, name).encode("utf-8", "backslashreplace").decode() for name in names},
        artist=artist,
        seconds=check.seconds,
        rate=check.rate,
        sha256=check.sha256,
        verdict=check.verdict.encode("utf-8", "backslashreplace").decode(),
    )


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
    reasons = {
        "artist": "too few that can be used with artists kept apart",
        "fault_filtered": "none of its list is here",
    }
    for split in SPLITS:
        if missing := [genre for genre in catalogue.genres if not counts[split][genre]]:
            reason = reasons.get(catalogue.split["method"], "too few that can be used")
            complain(f"{split} has no song of {', '.join(missing)}: {reason}")


# ---------------------------------------------------------------- command line


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "--data", "--seed")
    add = parser.add_argument
    add(
        "--source",
        type=path_name,
        metavar="PATH",
        help="archive, or folder of genre folders (else what is in data/raw)",
    )
    add(
        "--split",
        choices=["random", "artist", "fault_filtered"],
        default="random",
        help="random, artist (no artist on both sides) or fault_filtered (published lists)",
    )
    add(
        "--artist-index",
        type=path_name,
        metavar="FILE",
        help="lines '<genre>/<file> ::: artist ::: title', or Sturm's GTZANindex.txt",
    )
    add("--split-lists", type=path_name, metavar="DIR", help="folder of {train,valid,test}_filtered.txt")
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


def _run(args: argparse.Namespace) -> int:
    artists = read_artists(args.artist_index) if args.artist_index else {}
    if args.split_lists:  # a mistake here is told before all songs are checked
        for name in PUBLISHED_LISTS.values():
            read_lines(args.split_lists / name)
    root = find_genre_folders(args.source, args.data, None if args.no_archive_limits else Limits())
    found = list_songs(root, args.data)
    names = sorted({song.genre for song in found})
    if len(names) < 2:
        raise UserError(f"{root} has songs of one genre only ({names[0]}): at least two genre folders are needed")
    print(f"{len(found)} songs of {len(names)} genres in {root}", flush=True)

    checks = check_songs(found, args.data, args.min_seconds, args.workers)
    songs = [judged(song, check, artist_of(song.file, artists)) for song, check in zip(found, checks, strict=True)]
    left_out = [song for song in songs if song.verdict != "ok"]
    for song in left_out:
        complain(f"{song.file}: {song.verdict}; left out")
    usable = [song for song in songs if song.verdict == "ok"]
    if not usable:
        raise UserError(f"none of the {len(songs)} songs in {root} can be used: see the reasons above")
    genres = sorted({song.genre for song in usable})
    if len(genres) < 2:
        problem = f"only {genres[0]} has songs that can be used"
        raise UserError(f"{problem}, and two genres are needed: see the reasons above")
    for genre in names:
        if genre not in genres:
            complain(f"{genre}: none of its songs can be used, so it is no genre here")
    if artists:
        unknown = sum(not song.artist for song in usable)
        if unknown == len(usable):
            expected = "expected lines '<genre>/<file> ::: artist ::: title'"
            raise UserError(f"{args.artist_index} names the artist of none of these songs: {expected}")
        print(f"{unknown} songs have no known artist; each counts as an artist of its own")

    good = [check for check in checks if check.verdict == "ok"]
    repeats = find_repeats([check.sound for check in good], [check.prints for check in good], args.repeat_threshold)
    _report_repeats(usable, repeats)
    repeated = [(usable[pair.first].track, usable[pair.second].track) for pair in repeats]
    fold = (args.fold, args.folds) if args.folds else None
    listed = read_split_lists(args.split_lists, songs) if args.split_lists else None
    splits, split, dropped = split_songs(
        songs, repeated, args.split, args.seed, args.val_fraction, args.test_fraction, fold, listed
    )
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
    print(f"\nwrote {wrote}")
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    with locked(args.data):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
