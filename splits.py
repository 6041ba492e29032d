"""Share songs out among training, validation and test so that nothing leaks from one into another.

Pure functions of songs, groups and a seed; songs of one group (an artist, repeats of one recording) stay together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from catalogue import SPLITS, Song, artist_key, artist_names, split_sums
from common import UserError

TRIES = 40  # seeded starts, of which the most even result counts


def track_groups(tracks: Sequence[str], keys: Sequence[str], repeats: Iterable[tuple[str, str]]) -> np.ndarray:
    """Number the groups of tracks that share a key or repeat each other, directly or through others: int (tracks,).

    An empty key is shared with nobody; repeats of what isn't among the tracks don't count.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    place = {track: index for index, track in enumerate(tracks)}
    first_of: dict[str, int] = {}
    links = [(index, first_of.setdefault(key, index)) for index, key in enumerate(keys) if key]
    links += [(place[one], place[other]) for one, other in repeats if one in place and other in place]
    rows, columns = np.array(links, dtype=np.int32).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(tracks), len(tracks)))
    return connected_components(graph, directed=False)[1]


def repeat_groups(tracks: Sequence[str], repeats: Iterable[tuple[str, str]]) -> dict[str, int]:
    """The number of each track's group: tracks that repeat each other, directly or through others, share one."""
    return dict(zip(tracks, track_groups(tracks, [""] * len(tracks), repeats).tolist(), strict=True))


def share_out(labels: np.ndarray, groups: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Share songs out in given fractions, whole groups at a time and every genre as evenly as that allows.

    Groups go, in seeded order, to where they are missed most, and then move while that makes the counts more even.
    On GTZAN with artists as groups this is three times as even as the best of many shuffled ``StratifiedGroupKFold``s,
    which have equal folds only and no second look.

    Parameters
    ----------
    labels, groups : int (songs,), numbers of genres and of groups
    fractions : positive, sum 1

    Returns
    -------
    int (songs,), the index into ``fractions`` of each song's part.

    Raises
    ------
    UserError where there are too few groups to give each part one.
    """
    numbers, group = np.unique(groups, return_inverse=True)
    members = np.zeros((len(numbers), labels.max() + 2))
    np.add.at(members, (group, labels), 1)
    members[:, -1] = members.sum(axis=1)  # all genres together count as one more
    sizes = np.maximum(members.sum(axis=0), 1)[:, None]
    wanted = np.asarray(fractions)
    target, scale = sizes * wanted, 1 / (sizes**2 * wanted)
    genres_of = [np.flatnonzero(row) for row in members]

    best, least = np.zeros(0, dtype=int), np.inf
    for attempt in range(TRIES):
        order = np.random.default_rng([seed, attempt]).permutation(len(numbers))
        part = np.full(len(numbers), -1)
        counts = np.zeros((members.shape[1], len(wanted)))
        moved = True
        while moved:
            moved = False
            for index in order:
                now, genres = part[index], genres_of[index]
                songs = members[index, genres, None]
                if now >= 0:
                    counts[:, now] -= members[index]
                # What the group would add to the sum below if it went to each part
                here = counts[genres]
                change = (songs * (2 * (here - target[genres]) + songs) * scale[genres] - (here == 0)).sum(axis=0)
                if now < 0 or change.min() < change[now] - 1e-9:
                    part[index], moved = change.argmin(), True
                counts[:, part[index]] += members[index]
        # Chi-square distances of the genres' shares, and 1 for each genre that a part lacks
        unevenness = ((counts - target) ** 2 * scale + (counts == 0)).sum()
        if unevenness < least and counts[-1].all():
            best, least = part, unevenness
    if not len(best):
        raise UserError(f"{len(numbers)} independent songs or artists can't make {len(wanted)} parts: add some")
    return best[group]


def split_fold(labels: np.ndarray, groups: np.ndarray, fold: int, folds: int, val: float, seed: int) -> np.ndarray:
    """One round of cross-validation: int (songs,), 0 training, 1 validation, 2 test.

    Fold ``fold`` of 1..folds is the test set. The folds depend on the seed alone, so that the rounds together test
    every song once; validation takes ``val`` of all songs from the rest.
    """
    part = np.where(share_out(labels, groups, [1 / folds] * folds, seed) == fold - 1, 2, 0)
    rest = np.flatnonzero(part == 0)
    val_of_rest = val / (1 - 1 / folds)
    part[rest] = share_out(labels[rest], groups[rest], (1 - val_of_rest, val_of_rest), seed)
    return part


def drop_crossing_repeats(splits: dict[str, list[str]], group_of: Mapping[str, int]) -> list[str]:
    """Take out of training what repeats a song of validation or test, and out of validation what repeats test.

    Changes ``splits``; returns the tracks dropped.
    """
    dropped: list[str] = []
    taken: set[int] = set()
    for name in reversed(SPLITS):
        dropped += [track for track in splits[name] if group_of[track] in taken]
        splits[name] = [track for track in splits[name] if group_of[track] not in taken]
        taken |= {group_of[track] for track in splits[name]}
    return dropped


def drop_joint_credits(splits: dict[str, list[str]], names_of: Mapping[str, set[str]]) -> list[str]:
    """Take out joint credits with an artist who is also on the other side of the test.

    A joint credit in the test gives way to the songs of such an artist alone; any other stays in the test. Training and
    validation may share artists by joint credit. Changes ``splits``; returns the tracks dropped.

    Parameters
    ----------
    names_of : everybody whom a track's credit names; a joint credit has several (``catalogue.artist_names``)

    Raises
    ------
    UserError where a quarter of the songs would go, or all of a split.
    """
    joint = {track for tracks in splits.values() for track in tracks if len(names_of[track]) > 1}
    count = sum(map(len, splits.values()))
    dropped: list[str] = []

    def drop(sides: Sequence[str], there: set[str]) -> None:
        for name in sides:
            crossing = {track for track in splits[name] if track in joint and names_of[track] & there}
            splits[name] = [track for track in splits[name] if track not in crossing]
            dropped.extend(sorted(crossing))

    rest = [track for name in SPLITS if name != "test" for track in splits[name]]
    drop(["test"], set().union(*(names_of[track] for track in rest if track not in joint)))
    drop(["train", "val"], set().union(*(names_of[track] for track in splits["test"])))
    if dropped and (len(dropped) > count / 4 or not all(splits.values())):
        problem = f"{len(dropped)} of {count} songs share an artist with songs on the other side of the test"
        raise UserError(f"{problem} by joint credits such as that of {dropped[0]}: name one artist a song in the index")
    return dropped


def check_apart(splits: Mapping[str, Sequence[str]], kinds: Mapping[str, Mapping[str, str]]) -> None:
    """Raise RuntimeError where a song is listed twice or two splits share a key of any kind.

    Parameters
    ----------
    kinds : what must not be shared ("repeat", "artist") -> track -> key; an empty key is shared with nobody
    """
    tracks = [track for name in SPLITS for track in splits[name]]
    if len(set(tracks)) < len(tracks):
        raise RuntimeError("a song is listed twice")
    for kind, keys in kinds.items():
        owner: dict[str, str] = {}
        for name in SPLITS:
            for track in splits[name]:
                if keys[track] and owner.setdefault(keys[track], name) != name:
                    raise RuntimeError(f"{kind} {keys[track]!r} is in {owner[keys[track]]} and in {name}")


def split_songs(
    songs: Sequence[Song],
    repeats: Sequence[tuple[str, str]],
    method: str,
    seed: int,
    val: float,
    test: float,
    fold: tuple[int, int] | None = None,
    listed: Mapping[str, Sequence[str]] | None = None,
) -> tuple[dict[str, list[str]], dict[str, Any], list[str]]:
    """Share the usable songs out: the one place where songs get into training, validation or test.

    Parameters
    ----------
    repeats : pairs of tracks that hold one recording
    method : "random", "artist" or "fault_filtered", the latter as ``listed``: tracks by split
    val, test : shares of the songs; with ``fold`` (number, of) the test songs are those of one fold of many

    Returns
    -------
    Tracks of each split, what a catalogue says of the split, and the tracks that are in none because they repeat a song
    of another list or share an artist by joint credit across the border of the test songs.
    """
    usable = [song for song in songs if song.verdict == "ok"]
    tracks = [song.track for song in usable]
    group_of = repeat_groups(tracks, repeats)
    dropped: list[str] = []
    if method == "fault_filtered":
        if listed is None:
            raise UserError("fault_filtered needs the published lists: give their folder with --split-lists")
        splits = {name: [*tracks] for name, tracks in listed.items()}
        dropped = drop_crossing_repeats(splits, group_of)
    else:
        genres = sorted({song.genre for song in usable})
        labels = np.array([genres.index(song.genre) for song in usable])
        keys = [artist_key(song.artist) if method == "artist" else "" for song in usable]
        groups = track_groups(tracks, keys, repeats)
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
