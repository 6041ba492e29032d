"""Which songs of a data folder networks have not seen, whatever split is prepared there.

The released networks were trained on some songs of GTZAN; whoever has the others can test them on those.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from catalogue import SPLITS, Catalogue, artist_names
from common import UserError
from song_lists import artist_of, read_lines, song_names
from splits import repeat_groups


def read_seen(paths: Sequence[Path], sums: Mapping[str, str]) -> set[str]:
    """The songs that networks were trained and validated on, by ``song_names`` without an extension.

    Parameters
    ----------
    paths : lists such as ``prepare_gtzan_data.py`` writes, ``<genre>/<file>`` a line
    sums : SHA-256 of the networks' own lists by split, from their checkpoints

    Raises
    ------
    UserError where the networks' training or validation list is not among them.
    """
    lists = [read_lines(path) for path in paths]
    found = {hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest() for lines in lists}
    for split in ("train", "val"):
        if sums[split] not in found:
            raise UserError(
                f"none of {', '.join(map(str, paths))} is the list of the networks' {split} songs (SHA-256 "
                f"{sums[split][:12]}...): name {split}.txt of the split that they were trained on, as it was made"
            )
    return {song_names(line)[1] for lines in lists for line in lines}


def unseen_songs(
    catalogue: Catalogue, seen: set[str], artists: Mapping[str, str], repeats: Iterable[tuple[str, str]]
) -> tuple[Catalogue, dict[str, int | None]]:
    """The catalogue with those songs as its test that are not ``seen``, nor by an artist of these, nor repeats of any.

    Parameters
    ----------
    seen : names as ``read_seen`` gives them
    artists : what ``read_artists`` gives; for songs that it lacks the catalogue's are taken. All artists of a joint
        credit count, an unknown one is nobody
    repeats : pairs of usable tracks that hold one recording

    Returns
    -------
    The catalogue, its songs with these artists, and how many of its usable songs are left out: ``listed``, by an
    ``artist`` of the seen (None if no artist of theirs is known) and ``repeat``. ``absent`` are the seen songs that the
    catalogue lacks: repeats of them can't be told.

    Raises
    ------
    UserError where no song is left.
    """
    songs = {song.track: song for song in catalogue.songs.values() if song.verdict == "ok"}
    names = {track: song_names(song.file)[1] for track, song in songs.items()}
    known = {track for track, name in names.items() if name in seen}
    artist = {track: artist_of(song.file, artists) or song.artist for track, song in songs.items()}
    by = {track: artist_names(name) for track, name in artist.items()}
    heard = set[str]().union(*(artist_names(artists.get(name, "")) for name in seen), *(by[track] for track in known))
    shared = {track for track in songs if by[track] & heard} - known
    group_of = repeat_groups([*songs], repeats)
    taken = {group_of[track] for track in known | shared}
    repeated = {track for track in songs if group_of[track] in taken} - known - shared
    test = sorted({*songs} - known - shared - repeated)
    if not test:
        raise UserError(f"the networks have seen all songs in {catalogue.data}, or their artists: name another --data")
    count = {"listed": len(known), "absent": len(seen - {*names.values()}), "repeat": len(repeated)}
    splits = {split: test if split == "test" else [] for split in SPLITS}
    named = {track: dataclasses.replace(song, artist=artist[track]) for track, song in songs.items()}
    catalogue = dataclasses.replace(catalogue, songs=catalogue.songs | named, splits=splits)
    return catalogue, count | {"artist": len(shared) if heard else None}
