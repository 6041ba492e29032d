"""Preparing the data: whatever lies there, the lists are of songs that work and nothing leaks between them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_gtzan_data as prepare
from catalogue import SPLITS, Catalogue, Song, artist_key, read_catalogue
from common import UserError, one_line
from repeats import DEFAULT_THRESHOLD, find_repeats, fingerprints, sound_digest
from song_lists import artist_of, read_artists, read_split_lists

RATE = 22_050
RunScript = Callable[..., subprocess.CompletedProcess[str]]


def melody(seed: int, seconds: float = 12.0) -> np.ndarray:
    """A made-up tune: eight random plucked notes a second; float32, full scale."""
    rng = np.random.default_rng(seed)
    song = np.zeros(round(seconds * RATE))
    times = np.arange(RATE // 4) / RATE
    for start in range(0, len(song) - len(times), RATE // 8):
        pitch = 110 * 2 ** (rng.integers(48) / 12)
        overtones = sum(np.sin(2 * np.pi * pitch * k * times) / k for k in range(1, 6))
        song[start : start + len(times)] += overtones * np.exp(-times * rng.uniform(5, 30)) * rng.uniform(0.2, 1)
    return (song / np.abs(song).max()).astype(np.float32)


def write_songs(root: Path, genres: dict[str, int], seconds: float = 1.2, suffix: str = "wav") -> Path:
    """Folders of distinct short songs, named as in GTZAN."""
    for number, (genre, count) in enumerate(genres.items()):
        (root / genre).mkdir(parents=True)
        for index in range(count):
            song = melody(1000 * number + index, seconds)
            soundfile.write(root / genre / f"{genre}.{index:05d}.{suffix}", song, RATE)
    return root


def run(data: Path, *args: object) -> Catalogue:
    """Run the script in this process, which must succeed; what it wrote."""
    assert prepare.main(["--data", str(data), "--workers", "1", *map(str, args)]) == 0
    return read_catalogue(data)


def metadata(data: Path) -> dict:
    return json.loads((data / "metadata.json").read_text())


def written(data: Path) -> dict[str, bytes]:
    return {str(p.relative_to(data)): p.read_bytes() for p in data.rglob("*") if p.suffix in {".json", ".txt"}}


def split_of(catalogue: Catalogue) -> dict[str, str]:
    return {track: name for name in SPLITS for track in catalogue.splits[name]}


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three genres of six short songs; read-only."""
    return write_songs(tmp_path_factory.mktemp("songs") / "genres", {"polka": 6, "samba": 6, "waltz": 6})


# ---------------------------------------------------------------- sources


def test_kaggle_zip(tmp_path: Path, songs: Path, run_script: RunScript) -> None:
    (tmp_path / "data" / "raw").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "data" / "raw" / "archive.zip", "w") as bundle:
        bundle.writestr("Data/features_30_sec.csv", "filename,label\n")
        for path in songs.rglob("*.wav"):
            bundle.write(path, f"Data/genres_original/{path.parent.name}/{path.name}")
            bundle.writestr(f"Data/images_original/{path.parent.name}/{path.stem}.png", "a picture")
    result = run_script("prepare_gtzan_data.py", cwd=tmp_path)
    assert "18 songs of 3 genres" in result.stdout
    assert "next: extract_features.py" in result.stdout
    catalogue = read_catalogue(tmp_path / "data")
    assert catalogue.genres == ["polka", "samba", "waltz"]
    assert sorted(split_of(catalogue)) == sorted(path.stem for path in songs.rglob("*.wav"))
    song = catalogue.songs["polka.00003"]
    assert (song.file, song.path) == ("polka/polka.00003.wav", "raw/genres/polka/polka.00003.wav")
    assert catalogue.audio_path("polka.00003").read_bytes() == (songs / song.file).read_bytes()
    before = written(tmp_path / "data")
    run_script("prepare_gtzan_data.py", "--workers", 1, cwd=tmp_path)
    assert written(tmp_path / "data") == before


def test_original_tar_of_au_files(tmp_path: Path) -> None:
    write_songs(tmp_path / "genres", {"blues": 3, "rock": 3}, suffix="au")
    with tarfile.open(tmp_path / "genres.tar.gz", "w:gz") as bundle:
        bundle.add(tmp_path / "genres", "genres")
    catalogue = run(tmp_path / "data", "--source", tmp_path / "genres.tar.gz")
    assert catalogue.songs["rock.00002"].path == "raw/genres/rock/rock.00002.au"
    assert Counter(split_of(catalogue).values()) == {"train": 2, "val": 2, "test": 2}


@pytest.mark.parametrize("nested", ["genres", "genres_original", "Data/genres_original"])
def test_nested_folder_is_used_where_it_lies(tmp_path: Path, songs: Path, nested: str) -> None:
    shutil.copytree(songs, tmp_path / "set" / nested)
    root = prepare.find_genre_folders(tmp_path / "set", tmp_path / "data", None)
    assert root == tmp_path / "set" / nested
    listed = prepare.list_songs(root, tmp_path / "data")
    assert [Path(song.path) for song in listed] == sorted((tmp_path / "set" / nested).rglob("*.wav"))


def test_track_names_of_any_files(tmp_path: Path) -> None:
    for file in ("rock/rock.00001.wav", "rock/rock.00001.ogg", "rock/My Song.mp3", "rock/rock.my song.FLAC",
                 "rock/._x.wav", "rock/cover.jpg", "rock.x/y.wav", "rock/x.y.wav"):  # fmt: skip
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    tracks = {song.file: song.track for song in prepare.list_songs(tmp_path, tmp_path / "data")}
    assert tracks == {
        "rock/My Song.mp3": "rock.My Song",
        "rock/rock.00001.ogg": "rock.00001",
        "rock/rock.00001.wav": "rock.00001.wav",
        "rock/rock.my song.FLAC": "rock.my song.FLAC",  # "rock.My Song" on a disk that ignores case
        "rock/x.y.wav": "rock.x.y",
        "rock.x/y.wav": "rock.x.y.wav",
    }


def test_missing_source_says_what_was_expected(tmp_path: Path, run_script: RunScript) -> None:
    (tmp_path / "notes.txt").touch()
    result = run_script("prepare_gtzan_data.py", "--source", tmp_path, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "notes.txt" in result.stderr
    assert "expected genre folders" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_workers_need_no_stderr(tmp_path: Path, songs: Path, repo: Path) -> None:
    words = [sys.executable, repo / "prepare_gtzan_data.py", "--workers", 2, "--source", songs, "--data", tmp_path]
    done = subprocess.run(["bash", "-c", f"{shlex.join(map(str, words))} 2>&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_one_genre_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path / "set", {"polka": 3})
    assert prepare.main(["--data", str(tmp_path / "data"), "--source", str(tmp_path / "set")]) == 1
    assert "at least two genre folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    ["--split artist", "--split fault_filtered", "--folds 3", "--folds 3 --fold 4", "--val-fraction 0",
     "--split-lists x", "--folds 3 --fold 1 --test-fraction 0.2", "--split fault_filtered --split-lists x "
     "--val-fraction 0.2",
     "--split fault_filtered --split-lists x --folds 3 --fold 1", "--val-fraction 0.5 --test-fraction 0.5",
     "--repeat-threshold 2", "--workers 0", "--min-seconds nan", "--min-seconds -5", "--min-seconds inf"],
)  # fmt: skip
def test_bad_usage(args: str) -> None:
    with pytest.raises(SystemExit) as left:
        prepare.main(args.split())
    assert left.value.code == 2


# ---------------------------------------------------------------- checking


def test_unusable_songs_are_named_and_left_out(
    tmp_path: Path, songs: Path, render_tone: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(songs, tmp_path / "set")
    reasons = {"samba/short.wav": "only 0.50 s", "samba/silent.wav": "silent", "samba/nan.wav": "NaN",
               "samba/text.wav": "can't be decoded", "samba/empty.wav": "can't be decoded",
               "samba/line\nbreak.wav": "line break"}  # fmt: skip
    render_tone(source / "samba" / "short.wav", seconds=0.5)
    render_tone(source / "samba" / "silent.wav", level=0)
    render_tone(source / "samba" / "nan.wav", bad=float("nan"), subtype="FLOAT")
    render_tone(source / "samba" / "line\nbreak.wav")
    (source / "samba" / "text.wav").write_text("not a sound")
    (source / "samba" / "empty.wav").touch()
    catalogue = run(tmp_path / "data", "--source", source)
    assert {song.file for song in catalogue.songs.values() if song.verdict != "ok"} == set(reasons)
    lines = capsys.readouterr().err.splitlines()
    for file, reason in reasons.items():
        assert reason in next(song.verdict for song in catalogue.songs.values() if song.file == file)
        assert len([line for line in lines if one_line(file) in line and reason in line]) == 1
    assert metadata(tmp_path / "data")["left_out"] == len(reasons)
    assert not {song.track for song in catalogue.songs.values() if song.verdict != "ok"} & set(split_of(catalogue))
    assert len(split_of(catalogue)) == 18


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are always valid text")
def test_names_are_in_any_script_but_valid_text(
    tmp_path: Path, songs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(songs, tmp_path / "set")
    joined = ["\u0645\u06cc\u200c\u062e\u0648", "\U0001f469\u200d\U0001f3a4"]  # with zero-width joiners
    for name, number in zip([*joined, "\u202eturned"], range(3), strict=True):
        (source / "samba" / f"samba.{number:05d}.wav").rename(source / "samba" / f"{name}.wav")
    os.rename(source / "waltz", os.fsencode(source) + b"/wal\xfftz")
    catalogue = run(tmp_path / "data", "--source", source)
    assert catalogue.genres == ["polka", "samba"]
    assert {f"samba.{name}" for name in joined} < set(split_of(catalogue))
    assert len(split_of(catalogue)) == 11
    told = capsys.readouterr().err
    assert "\\u202eturned.wav: its name holds" in told
    assert "udcfftz: none of its songs can be used" in told


def test_recorded_facts_are_those_of_the_file(tmp_path: Path) -> None:
    source = write_songs(tmp_path / "set", {"polka": 3, "waltz": 3})
    soundfile.write(source / "polka" / "other rate.flac", np.stack([melody(7, 3.0)] * 2, axis=1), 44_100)
    song = run(tmp_path / "data", "--source", source).songs["polka.other rate"]
    assert (song.seconds, song.rate, song.verdict) == (1.5, 44_100, "ok")
    assert song.sha256 == prepare.file_sha256(source / "polka" / "other rate.flac")


def test_one_genre_of_usable_songs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_songs(tmp_path / "set", {"polka": 3})
    (tmp_path / "set" / "waltz").mkdir()
    (tmp_path / "set" / "waltz" / "x.wav").touch()
    assert prepare.main(["--data", str(tmp_path / "data"), "--source", str(tmp_path / "set"), "--workers", "1"]) == 1
    assert "only polka has songs that can be used" in capsys.readouterr().err
    assert not (tmp_path / "data" / "metadata.json").exists()


def test_a_genre_without_usable_songs_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_songs(tmp_path / "set", {"polka": 3, "waltz": 3})
    (root / "clips").mkdir()
    (root / "clips" / "film.mp4").write_bytes(b"no sound")
    catalogue = run(tmp_path / "data", "--source", root)
    assert catalogue.genres == ["polka", "waltz"]
    assert catalogue.songs["clips.film"].verdict != "ok"
    assert "clips: none of its songs can be used, so it is no genre here" in capsys.readouterr().err


def test_what_is_passed_over_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_songs(tmp_path / "set", {"polka": 3, "waltz": 3})
    (root / "waltz" / "slow").mkdir()
    for name in ("a.ogg", "b.ogg"):
        (root / "waltz" / "slow" / name).touch()
    (root / "tango").mkdir()
    (root / "tango" / "x.wma").touch()
    (root / "tango" / "cover.jpg").touch()
    (root / "loose.mp3").touch()
    assert [song.file for song in prepare.list_songs(root, tmp_path)][3:-3] == ["tango/x.wma"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"{root}: sound files in no genre folder are not used, 1 here",
        f"{root / 'waltz'}: sound files in subfolders are not used, 2 here",
    ]


def test_no_usable_song(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for genre in ("polka", "waltz"):
        (tmp_path / "set" / genre).mkdir(parents=True)
        (tmp_path / "set" / genre / "x.wav").touch()
    assert prepare.main(["--data", str(tmp_path / "data"), "--source", str(tmp_path / "set"), "--workers", "1"]) == 1
    assert "none of the 2 songs" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------- repeats


def test_what_counts_as_a_repeat() -> None:
    song, rng = melody(1), np.random.default_rng(0)
    lowpassed = np.convolve(song, np.hanning(9) / 4, mode="same")
    noisy_cut = 0.2 * song[round(3.3 * RATE) :] + rng.normal(0, 0.01, len(song) - round(3.3 * RATE))
    sounds = [song, melody(2), lowpassed, melody(3), noisy_cut, song.copy()]
    sounds = [np.asarray(sound, dtype=np.float32) for sound in sounds]
    digests, prints = [sound_digest(sound) for sound in sounds], [fingerprints(sound) for sound in sounds]
    pairs = {(pair.first, pair.second): pair.exact for pair in find_repeats(digests, prints, DEFAULT_THRESHOLD)}
    assert pairs == {(0, 2): False, (0, 4): False, (0, 5): True, (2, 4): False, (2, 5): False, (4, 5): False}
    assert [(pair.first, pair.second) for pair in find_repeats(digests, prints, 1.0)] == [(0, 5)]


def test_an_excerpt_of_any_part_of_a_long_song_is_a_repeat() -> None:
    long = np.concatenate([melody(seed, 65.0) for seed in (1, 2, 3, 4)])
    parts = [long[round(first * RATE) :][: 9 * RATE] for first in (0, 66, 82, 112, 126, 156, 251)]
    sounds = [long, *parts, melody(5, 20.0)]
    prints = [fingerprints(sound) for sound in sounds]
    assert [len(pieces) for pieces in prints] == [3, *[1] * 8]  # from 0, 70 and 140 s on
    pairs = find_repeats([sound_digest(sound) for sound in sounds], prints, DEFAULT_THRESHOLD)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, part) for part in range(1, 8)]


def test_digest_sees_through_the_container(tmp_path: Path) -> None:
    digests = set()
    for suffix in ("wav", "au", "flac", "aiff"):
        path = tmp_path / f"a.{suffix}"
        soundfile.write(path, np.rint(30_000 * melody(1, 2.0)).astype(np.int16), RATE)
        digests.add(prepare.check_song(path, path.name, 1.0).sound)
    assert len(digests) == 1
    assert digests != {""}


@pytest.mark.parametrize("seed", range(3))
def test_repeats_stay_in_one_split(tmp_path: Path, songs: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    source = shutil.copytree(songs, tmp_path / "set")
    song, rng = melody(99), np.random.default_rng(0)
    soundfile.write(source / "polka" / "a.wav", song, RATE)
    soundfile.write(source / "polka" / "b.flac", soundfile.read(source / "polka" / "a.wav")[0], RATE)
    soundfile.write(source / "waltz" / "c.ogg", 0.5 * song[RATE:] + rng.normal(0, 0.003, len(song) - RATE), RATE)
    splits = split_of(run(tmp_path / "data", "--source", source, "--seed", seed))
    assert splits["polka.a"] == splits["polka.b"] == splits["waltz.c"]
    kinds = {tuple(pair["tracks"]): pair["kind"] for pair in metadata(tmp_path / "data")["repeats"]}
    assert kinds == {
        ("polka.a", "polka.b"): "exact", ("polka.a", "waltz.c"): "near", ("polka.b", "waltz.c"): "near"
    }  # fmt: skip
    output = capsys.readouterr()
    assert "1 exact and 2 near" in output.out
    assert "polka.a and waltz.c are the same sound under two genres" in output.err


# ---------------------------------------------------------------- splits


def write_index(path: Path, artist_of: Callable[[str, int], str]) -> Path:
    lines = [
        f"{genre}.{n:05d}.wav ::: {artist_of(genre, n)} ::: Song" for genre in ("polka", "samba", "waltz")
        for n in range(6)
    ]  # fmt: skip
    path.write_text("## an index\n" + "\n".join(lines), encoding="utf-8")
    return path


def test_artist_split(tmp_path: Path, songs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spellings = ["The Band", "the  band ", "Solo", "SOLO", "", ""]
    index = write_index(tmp_path / "index.txt", lambda genre, n: f"{genre} {spellings[n]}" if spellings[n] else "")
    catalogue = run(tmp_path / "data", "--source", songs, "--split", "artist", "--artist-index", index)
    splits = split_of(catalogue)
    for genre in catalogue.genres:
        assert splits[f"{genre}.00000"] == splits[f"{genre}.00001"]
        assert splits[f"{genre}.00002"] == splits[f"{genre}.00003"]
        assert {splits[f"{genre}.{n:05d}"] for n in range(6)} == set(SPLITS)
    assert catalogue.songs["samba.00002"].artist == "samba Solo"
    assert catalogue.split["name"] == "artist"
    assert (tmp_path / "data" / "splits" / "artist" / "test.txt").exists()
    output = capsys.readouterr().out
    assert "6 songs have no known artist" in output
    assert "0 of 3 test songs have an artist who is in training" in output


def test_an_artist_split_is_without_joint_credits_across_it(tmp_path: Path, songs: Path) -> None:
    credits = ["A & B", "A", "A", "B", "", ""]
    index = write_index(tmp_path / "index.txt", lambda genre, n: credits[n] if n or genre == "polka" else "")
    dropped = []
    for seed in range(6):
        options = ("--split", "artist", "--artist-index", index, "--seed", seed)
        catalogue = run(tmp_path / "data", "--source", songs, *options)
        part = split_of(catalogue)
        dropped += metadata(tmp_path / "data")["dropped"]
        if "polka.00000" in part:
            assert len({part[track] == "test" for track in ("polka.00000", "polka.00001", "polka.00003")}) == 1
    assert set(dropped) == {"polka.00000"}


def test_joint_credits_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    artists = {"1": "A & B", "2": "C", "3": "b", "4": "D", "5": "E"}
    songs = {track: Song(track, "", "", "polka", artist, 1, 1, "", "ok") for track, artist in artists.items()}
    splits = {"train": ["1", "2"], "val": ["3", "4"], "test": ["5"]}
    prepare._report_splits(Catalogue(["polka"], songs, splits, {"method": "artist"}, Path()), 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines if "in training too, joint credits included" in line] == ["1 of 2", "0 of 1"]


def test_artist_folds_have_lists_of_their_own(tmp_path: Path, songs: Path) -> None:
    index = write_index(tmp_path / "index.txt", lambda genre, n: f"{genre} {n // 2}")
    tested: list[str] = []
    for fold in (1, 2, 3):
        catalogue = run(tmp_path / "data", "--source", songs, "--split", "artist", "--artist-index", index,
                        "--folds", 3, "--fold", fold)  # fmt: skip
        assert catalogue.split["fold"] == {"number": fold, "of": 3}
        tested += catalogue.splits["test"]
        artists = [{catalogue.songs[track].artist for track in catalogue.splits[name]} for name in SPLITS]
        assert not artists[0] & artists[1]
        assert not (artists[0] | artists[1]) & artists[2]
    assert sorted(tested) == sorted(catalogue.songs)
    assert len(list((tmp_path / "data" / "splits").iterdir())) == 3


def test_an_index_is_matched_by_extension_first_and_however_accents_are_coded(tmp_path: Path) -> None:
    index = tmp_path / "index.txt"
    lines = ["rock/song.ogg ::: Ann ::: 1", "rock/song.wav ::: Bob ::: 2", "caf\u00e9.1.wav ::: Beyonc\u00e9 ::: 3"]
    index.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")  # a byte order mark, as some editors put
    artists = read_artists(index)
    files = ("rock/song.ogg", "rock/song.wav", "rock/song.mp3", "cafe\u0301/cafe\u0301.1.au", "rock/other.wav")
    found = [artist_of(file, artists) for file in files]
    assert found == ["Ann", "Bob", "Ann", "Beyonc\u00e9", ""]
    assert artist_key("Beyonce\u0301") == artist_key("BEYONC\u00c9")


def test_index_of_another_data_set_is_refused(tmp_path: Path, songs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--data", str(tmp_path / "data"), "--source", str(songs), "--workers", "1", "--artist-index"]
    (tmp_path / "index.txt").write_text("tango.00000.wav ::: Someone ::: Song")
    assert prepare.main([*args, str(tmp_path / "index.txt")]) == 1
    assert "names the artist of none" in capsys.readouterr().err
    (tmp_path / "index.txt").write_text("no fields here")
    assert prepare.main([*args, str(tmp_path / "index.txt")]) == 1
    assert "has no line" in capsys.readouterr().err


def write_lists(folder: Path, train: str, valid: str, test: str) -> Path:
    folder.mkdir()
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{name}_filtered.txt").write_text("".join(f"{line}\n" for line in text.split()), encoding="utf-8")
    return folder


def test_published_lists_with_absent_songs(tmp_path: Path, songs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shutil.copytree(songs, tmp_path / "set")
    (source / "samba" / "samba.00000.wav").write_text("broken")
    repeat = melody(5)
    soundfile.write(source / "waltz" / "waltz.00000.wav", repeat, RATE)
    soundfile.write(source / "waltz" / "waltz.00001.wav", repeat, RATE)
    lists = write_lists(
        tmp_path / "lists",
        train="polka/polka.00000.au samba/samba.00000.wav waltz/waltz.00000.wav waltz/waltz.00099.wav",
        valid="polka/polka.00001.wav",
        test="polka/polka.00002.wav waltz/waltz.00001.wav",
    )
    catalogue = run(tmp_path / "data", "--source", source, "--split", "fault_filtered", "--split-lists", lists)
    assert catalogue.splits == {
        "train": ["polka.00000"], "val": ["polka.00001"], "test": ["polka.00002", "waltz.00001"]
    }  # fmt: skip
    errors = capsys.readouterr().err
    assert "lists 4 songs: 1 are not here, 1 can't be used, 2 remain" in errors
    assert "waltz.00000 is left out: it repeats a song of another list" in errors
    assert "val has no song of samba, waltz: none of its list is here" in errors
    assert metadata(tmp_path / "data")["dropped"] == ["waltz.00000"]


def test_overlapping_lists_are_refused(tmp_path: Path) -> None:
    found = prepare.list_songs(write_songs(tmp_path / "set", {"polka": 2}, seconds=0.3), tmp_path)
    lists = write_lists(tmp_path / "lists", "polka/polka.00000.wav", "polka/polka.00001.wav", "polka/polka.00000.au")
    with pytest.raises(UserError, match=r"polka\.00000 is in the lists of train and of test"):
        read_split_lists(lists, found)


def test_published_lists_may_code_accents_in_another_way(tmp_path: Path) -> None:
    songs = write_songs(tmp_path / "set", {"caf\u00e9": 3}, seconds=0.3)
    files = [f"cafe\u0301/cafe\u0301.0000{n}.au" for n in range(3)]
    assert read_split_lists(write_lists(tmp_path / "lists", *files), prepare.list_songs(songs, tmp_path)) == {
        split: [f"caf\u00e9.0000{n}"] for n, split in enumerate(SPLITS)
    }


# ---------------------------------------------------------------- the real thing


def test_real_songs(tmp_path: Path, gtzan_dir: Path) -> None:
    """Known repeats of GTZAN are found, other songs of the same artists aren't, and the corrupt file is named."""
    faulty = gtzan_dir.parent / "gtzan_faults" / "jazz.00054.wav"
    if not faulty.exists():
        pytest.skip(f"no corrupt file {faulty}")
    genres = {"jazz": (39, 65, 33, 91), "pop": (45, 46, 30, 31, 32), "hiphop": (48, 68, 46, 47)}
    for genre, numbers in genres.items():
        (tmp_path / "set" / genre).mkdir(parents=True)
        for number in numbers:
            found = next((gtzan_dir / "genres" / genre).glob(f"{genre}.{number:05d}.*"), None)
            if found is None:
                pytest.skip(f"{genre}.{number:05d} is not in {gtzan_dir}")
            shutil.copy(found, tmp_path / "set" / genre)
    shutil.copy(faulty, tmp_path / "set" / "jazz")
    catalogue = run(tmp_path / "data", "--source", tmp_path / "set")
    assert {song.track for song in catalogue.songs.values() if song.verdict != "ok"} == {"jazz.00054"}
    assert {tuple(pair["tracks"]) for pair in metadata(tmp_path / "data")["repeats"]} == {
        ("jazz.00039", "jazz.00065"), ("pop.00045", "pop.00046"), ("pop.00030", "pop.00031"),
        ("hiphop.00048", "hiphop.00068"),
    }  # fmt: skip
