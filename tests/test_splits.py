"""Songs are shared out evenly, groups stay together, and nothing crosses into the test."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catalogue import SPLITS, artist_names
from common import UserError
from splits import check_apart, drop_crossing_repeats, drop_joint_credits, share_out, split_fold, track_groups


@st.composite
def labelled_groups(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(6, 60))
    labels = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    keys = draw(st.lists(st.sampled_from(["", "", "", *"abcdefgh"]), min_size=count, max_size=count))
    pairs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=5))
    return np.array(labels), track_groups(range(count), keys, pairs)


@given(labelled_groups(), st.integers(0, 2**40), st.integers(2, 4))
@settings(max_examples=15)
def test_parts_never_share_a_group(case: tuple[np.ndarray, np.ndarray], seed: int, folds: int) -> None:
    labels, groups = case
    fractions = [1 / folds] * folds
    if len(set(groups)) < folds:
        with pytest.raises(UserError, match="independent songs or artists"):
            share_out(labels, groups, fractions, seed)
        return
    part = share_out(labels, groups, fractions, seed)
    assert set(part) == set(range(folds))
    assert all(len(set(part[groups == group])) == 1 for group in set(groups))
    assert np.array_equal(part, share_out(labels, groups, fractions, seed))


@given(st.lists(st.integers(3, 40), min_size=2, max_size=3), st.integers(0, 100))
@settings(max_examples=8)
def test_independent_songs_are_shared_out_evenly(sizes: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    part = share_out(labels, np.arange(len(labels)), (0.7, 0.15, 0.15), seed)
    for genre, size in enumerate(sizes):
        counts = np.bincount(part[labels == genre], minlength=3)
        assert counts.min() >= 1
        assert np.abs(counts - np.array([0.7, 0.15, 0.15]) * size).max() <= 2


def test_other_seed_other_split() -> None:
    labels, groups = np.repeat([0, 1], 50), np.arange(100)
    first, second = (share_out(labels, groups, (0.7, 0.15, 0.15), seed) for seed in (0, 1))
    assert 30 < (first != second).sum() < 70  # 46.5 on average


def test_groups_join_through_others_but_not_through_blanks() -> None:
    groups = track_groups(range(6), ["a", "b", "", "a", "", "b"], [(2, 3)])
    assert groups[0] == groups[2] == groups[3]
    assert len({groups[0], groups[1], groups[4]}) == 3
    assert groups[1] == groups[5]


def test_folds_test_every_song_once() -> None:
    labels, groups = np.repeat([0, 1, 2], 20), np.arange(60) // 2
    rounds = [split_fold(labels, groups, fold, 4, 0.15, seed=3) for fold in (1, 2, 3, 4)]
    assert (sum(part == 2 for part in rounds) == 1).all()
    for part in rounds:
        assert 6 <= (part == 1).sum() <= 12
        assert all(len(set(part[groups == group])) == 1 for group in set(groups))


def test_validation_of_a_fold_is_its_share_of_all_songs() -> None:
    labels, groups = np.repeat([0, 1, 2], 20), np.arange(60)
    for fold in (1, 2, 3, 4):
        part = split_fold(labels, groups, fold, 4, 0.15, seed=3)
        assert [(part == number).sum() for number in range(3)] == [36, 9, 15]


def test_check_apart_catches_each_leak() -> None:
    good = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}
    keys = {"a": "X", "b": "X", "c": "Y", "d": ""}
    check_apart(good, {"artist": keys, "repeat": {**keys, "d": "Z"}})
    check_apart(good, {"artist": dict.fromkeys("abcd", "")})
    with pytest.raises(RuntimeError, match="artist 'X' is in train and in test"):
        check_apart(good, {"artist": {**keys, "d": "X"}})
    with pytest.raises(RuntimeError, match="repeat 'Y' is in val and in test"):
        check_apart(good, {"repeat": {**keys, "d": "Y"}})
    with pytest.raises(RuntimeError, match="listed twice"):
        check_apart({**good, "test": ["a"]}, {})


NAMES = st.sets(st.sampled_from("abcdef"), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(SPLITS), NAMES), max_size=30))
def test_no_joint_credit_crosses_into_the_test(songs: list[tuple[str, set[str]]]) -> None:
    names = {str(number): {*names, "&".join(sorted(names))} for number, (_, names) in enumerate(songs)}
    solo = {track for track, credit in names.items() if len(credit) == 1}
    at_home: dict[str, str] = {}  # a solo artist's songs are in one split
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for number, (split, _) in enumerate(songs):
        track = str(number)
        splits[at_home.setdefault(*names[track], split) if track in solo else split].append(track)
    before = {name: list(tracks) for name, tracks in splits.items()}
    try:
        dropped = drop_joint_credits(splits, names)
    except UserError:  # too many
        return
    assert not set(dropped) & solo
    assert {name: [track for track in tracks if track not in dropped] for name, tracks in before.items()} == splits
    inside = set().union(*(names[track] for track in splits["test"]))
    outside = set().union(*(names[track] for track in splits["train"] + splits["val"]))
    assert not inside & outside


def test_a_joint_credit_gives_way_to_solo_songs_only() -> None:
    names = {"1": {"a"}, "2": {"b&c", "b", "c"}, "3": {"d"}, "T": {"a&b", "a", "b"}, "U": {"e"}}
    splits = {"train": ["1", "3"], "val": ["2"], "test": ["T", "U"]}
    assert drop_joint_credits(splits, names) == ["T"]
    splits = {"train": ["3"], "val": ["2", "1"], "test": ["V", "U"]}
    assert drop_joint_credits(splits, names | {"V": {"b&x", "b", "x"}}) == ["2"]
    with pytest.raises(UserError, match="1 of 4 songs share an artist"):
        drop_joint_credits({"train": ["1"], "val": ["2", "3"], "test": ["T"]}, names)


def test_artists_of_a_joint_credit() -> None:
    assert artist_names("A One, B  Two & C. Three") == {"a one, b two & c. three", "a one", "b two", "c. three"}
    assert artist_names("Andy Withers") == {"andy withers"}
    assert artist_names("A, and B (feat. C)") == {"a, and b (feat. c)", "a", "b", "c"}
    assert artist_names("") == set()


def test_test_songs_outlast_their_repeats() -> None:
    splits = {"train": ["a", "b", "c"], "val": ["d", "e"], "test": ["f"]}
    dropped = drop_crossing_repeats(splits, {"a": 1, "b": 2, "c": 3, "d": 2, "e": 1, "f": 1})
    assert splits == {"train": ["c"], "val": ["d"], "test": ["f"]}
    assert sorted(dropped) == ["a", "b", "e"]
