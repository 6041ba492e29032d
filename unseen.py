"""Which songs of a data folder networks have not seen, whatever split is prepared there.

The released networks were trained on some songs of GTZAN; whoever has the others can test them on those.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from catalogue import SPLITS, Catalogue, artist_names
from common import UserError
from prepare_gtzan_data import read_lines, track_name
from splits import linked_groups


def read_seen(paths: Sequence[Path], sums: Mapping[str, str]) -> set[str]:
    """The songs that networks were trained and validated on, as ``track_name`` has them whatever their extension.

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
                f"the networks' {split} songs are in none of {', '.join(map(str, paths))}: name the {split}.txt of the "
                "split that they were trained on too"
            )
    return {_name(line) for lines in lists for line in lines}


def _name(file: str) -> str:
    path = PurePosixPath(file)
    return track_name(path.parent.name, path.stem)


def unseen_songs(
    catalogue: Catalogue, seen: set[str], artists: Mapping[str, str], repeats: Iterable[Sequence[str]]
) -> tuple[Catalogue, dict[str, int]]:
    """The catalogue with those songs as its test that are not ``seen``, nor by an artist of these, nor repeats of any.

    Parameters
    ----------
    seen : names as ``read_seen`` gives them
    artists : credits by such a name; of joint credits every artist counts, unknown artists are nobody's
    repeats : pairs of usable tracks that hold one recording

    Returns
    -------
    The catalogue, and how many usable songs are left out: ``listed``, ``artist`` and ``repeat``.

    Raises
    ------
    UserError where no song is left.
    """
    names = {song.track: _name(song.file) for song in catalogue.songs.values() if song.verdict == "ok"}
    known = {track for track, name in names.items() if name in seen}
    heard = set[str]().union(*(artist_names(artists.get(name, "")) for name in seen))
    shared = {track for track, name in names.items() if artist_names(artists.get(name, "")) & heard} - known
    place = {track: index for index, track in enumerate(names)}
    pairs = [(place[first], place[second]) for first, second in repeats]
    group_of = dict(zip(names, linked_groups(len(names), [""] * len(names), pairs), strict=True))
    taken = {group_of[track] for track in known | shared}
    repeated = {track for track in names if group_of[track] in taken} - known - shared
    test = sorted({*names} - known - shared - repeated)
    if not test:
        raise UserError(f"the networks have seen all songs in {catalogue.data}, or their artists: name another --data")
    count = {"listed": len(known), "artist": len(shared), "repeat": len(repeated)}
    splits = {split: test if split == "test" else [] for split in SPLITS}
    return dataclasses.replace(catalogue, splits=splits), count
