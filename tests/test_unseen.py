"""Networks are tested on whatever songs they have not seen, whichever split those are in."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers import copy_data, edit_metadata, one_line, predictions
from hypothesis import given
from hypothesis import strategies as st

import evaluate
from catalogue import Catalogue, Song, read_catalogue
from checkpoints import load_checkpoint
from common import UserError
from files import file_sha256
from unseen import read_seen, unseen_songs


@pytest.fixture
def other_split(pipeline, tmp_path) -> tuple[Path, list[Path]]:
    """The songs of the pipeline under another split, and the lists of what its networks have seen."""
    lists = [shutil.copy(pipeline.data / "processed" / f"{split}_files.txt", tmp_path) for split in ("train", "val")]
    data = copy_data(pipeline, tmp_path)
    edit_metadata(data, lambda value: value["split"].update(seed=99))
    return data, [Path(path) for path in lists]


def arguments(pipeline, data: Path, results: Path, *options: object) -> list[str]:
    where = ("--data", data, "--models", pipeline.models, "--results", results)
    return [str(part) for part in (*where, *options)]


def test_unseen_songs_are_scored_as_the_test_songs_are(pipeline, other_split, tmp_path, capsys):
    data, lists = other_split
    results = tmp_path / "results"
    assert evaluate.main(arguments(pipeline, data, results)) == 1
    assert "--seen" in one_line(capsys)
    index = pipeline.source / "artists.txt"
    assert evaluate.main(arguments(pipeline, data, results, "--seen", *lists, "--artist-index", index)) == 0
    splits, said = read_catalogue(pipeline.data).splits, capsys.readouterr().out
    listed = len(splits["train"]) + len(splits["val"])
    assert (
        f"{len(splits['test'])} songs that the networks have not seen; left out are {listed} that they have, 0" in said
    )
    assert "can't be told" not in said
    assert "validation, %" not in said
    assert [path.name for path in results.iterdir()] == ["unseen"], "the results of the split stay as they are"
    results /= "unseen"
    assert predictions(results) == predictions(pipeline.results)
    before, after = (json.loads((folder / "evaluation.json").read_text()) for folder in (pipeline.results, results))
    assert {name: scores["test"] for name, scores in before["models"].items()} == {
        name: scores["test"] for name, scores in after["models"].items()
    }
    assert after["split"] == before["split"], "that of the networks"
    counted = {"listed": listed, "absent": 0, "artist": 0, "repeat": 0}
    assert after["unseen"] == counted | {"artist_index": file_sha256(index)}


def test_what_was_heard_or_cannot_be_read_is_left_out(pipeline, other_split, tmp_path, capsys):
    data, lists = other_split
    splits = read_catalogue(pipeline.data).splits
    joint, repeat, changed, *rest = splits["test"]
    absent, heard = splits["train"][:2]

    def change(value: dict) -> None:
        value["repeats"].append({"tracks": [repeat, splits["val"][0]]})
        value["songs"] = [song for song in value["songs"] if song["track"] != absent]
        for song in value["songs"]:
            song["artist"] = ""  # the index alone knows
            if song["track"] == changed:
                song["sha256"] = "0" * 64

    edit_metadata(data, change)
    for split, tracks in splits.items():  # another split has other lists
        kept = [f"{track.partition('.')[0]}/{track}.wav\n" for track in tracks if track != absent]
        (data / "processed" / f"{split}_files.txt").write_text("".join(kept))
        digest = hashlib.sha256("".join(kept).encode()).hexdigest()
        edit_metadata(data, lambda value, split=split, digest=digest: value["split"]["sha256"].update({split: digest}))
    index = tmp_path / "index.txt"
    lines = [f"{heard}.au ::: Ann ::: Alone", f"{joint}.au ::: Bob & ann ::: Together"]
    index.write_text("\n".join([*lines, *(f"{track}.au ::: Cleo ::: Known" for track in rest[2:])]))
    results = tmp_path / "results"
    assert evaluate.main(arguments(pipeline, data, results, "--seen", *lists, "--artist-index", index)) == 0
    out, err = capsys.readouterr()
    assert f"{changed}.wav is not the file that prepare_gtzan_data.py saw" in err
    assert f"{len(rest)} songs that the networks have not seen; " in out
    assert ", 1 by artists of these, 1 that repeat one of them; repeats of 1 that they have seen can't be told" in out
    assert "; 1 more can't be read" in out
    assert " 2 answers are about songs by unknown artists, some of whom may be on both sides" in out
    fusion = json.loads((results / "unseen" / "evaluation.json").read_text())["models"]["fusion"]["test"]
    answers = [row for row in predictions(results / "unseen") if row["track"] in rest[2:]]
    right = sum(row["fusion"] == row["genre"] for row in answers)
    assert fusion["named_artists"] == {"answers": len(rest) - 2, "right": right}
    assert [row["track"] for row in predictions(results / "unseen")] == rest
    index.write_text("x.wav ::: nobody ::: nothing\n")
    assert evaluate.main(arguments(pipeline, data, results, "--seen", *lists, "--artist-index", index)) == 1
    assert "names no artist of the songs that the networks have seen" in one_line(capsys)
    assert evaluate.main(arguments(pipeline, data, results, "--seen", *lists)) == 0
    assert "artists are not known and may be those that they have heard" in capsys.readouterr().out


@pytest.mark.parametrize("repeats", [5, [1], [{"tracks": ["blues.00000"]}], [{"tracks": ["blues.00000", "none"]}]])
def test_damaged_repeats_are_refused(pipeline, other_split, tmp_path, capsys, repeats):
    data, lists = other_split
    edit_metadata(data, lambda value: value.update(repeats=repeats))
    assert evaluate.main(arguments(pipeline, data, tmp_path / "results", "--seen", *lists)) == 1
    assert "metadata.json are damaged" in one_line(capsys)


def test_lists_of_other_networks_are_refused(pipeline, other_split, tmp_path, capsys):
    data, (train, val) = other_split
    assert evaluate.main(arguments(pipeline, data, tmp_path / "results", "--seen", train)) == 1
    assert "is the list of the networks' val songs" in one_line(capsys)
    train.write_text("".join(line + "\n" for line in train.read_text().splitlines()[1:]))
    assert evaluate.main(arguments(pipeline, data, tmp_path / "results", "--seen", train, val)) == 1
    assert "is the list of the networks' train songs" in one_line(capsys)
    assert not (tmp_path / "results").exists()


def test_line_ends_of_another_system_are_no_other_list(pipeline, other_split):
    _, lists = other_split
    sums = read_catalogue(pipeline.data).split["sha256"]
    seen = read_seen(lists, sums)
    for path in lists:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_seen(lists, sums) == seen


def test_the_released_lists_are_those_of_the_released_networks(models):
    for path in models.glob("*/model.safetensors"):
        _, meta = load_checkpoint(path, "its script")
        assert meta["split"]["sha256"] == {
            split: file_sha256(models / "split" / f"{split}.txt") for split in ("train", "val", "test")
        }


ARTISTS = ("", "", "A", "B", "C", "A & B", "b, c")


@given(
    st.lists(st.tuples(st.sampled_from(ARTISTS), st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.sets(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4),
)
def test_no_song_is_left_that_shares_anything_with_a_seen_one(drawn, pairs):
    songs = {
        f"g.{i}": Song(f"g.{i}", f"g/{i}.wav", "", "g", "", 1.0, 22050, "", "ok" if usable else "silent")
        for i, (_, _, usable) in enumerate(drawn)
    }
    artists = {f"g.{i}": artist for i, (artist, _, _) in enumerate(drawn)}
    seen = {f"g.{i}" for i, (_, was, _) in enumerate(drawn) if was}
    good = {track for track, song in songs.items() if song.verdict == "ok"}
    repeats = [(a, b) for a, b in ((f"g.{a}", f"g.{b}") for a, b in pairs) if {a, b} <= good]

    def shares_artist(track: str, other: str) -> bool:
        names = {*artists[track].upper().replace(",", "&").replace(" ", "").split("&")} - {""}
        return any(name in artists[other].upper() for name in names)

    lost = {track for track in good if any(track == other or shares_artist(track, other) for other in seen)}
    for _ in repeats:  # a repeat of a repeat is one
        lost |= {track for pair in repeats if lost & {*pair} for track in pair}
    expected = sorted(good - lost)
    catalogue = Catalogue(["g"], songs, {"train": [], "val": [], "test": sorted(songs)}, {}, Path())
    try:
        found, count = unseen_songs(catalogue, seen, artists, repeats)
    except UserError:
        assert not expected
        return
    assert found.splits == {"train": [], "val": [], "test": expected}
    assert len(expected) + count["listed"] + (count["artist"] or 0) + count["repeat"] == len(good)
    assert count["absent"] == len(seen - good)
