"""--write-tags: says what it would do, does it when told to, leaves the sound and, on any error, the file alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from checkpoints import load_checkpoint, save_checkpoint
from common import UserError
from decoding import decode
from detector_tags import read_genre, write_genre


@pytest.fixture
def mutagen():
    return pytest.importorskip("mutagen", reason="mutagen is not installed: pip install -r requirements-formats.txt")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3", "aiff"])
def test_a_genre_is_written_and_the_sound_stays(mutagen, render_tone, tmp_path, suffix):
    path = tmp_path / f"song.{suffix}"
    if suffix == "opus":
        render_tone(tmp_path / "song.ogg", rate=24_000, subtype="OPUS").rename(path)
    else:
        render_tone(path)
    before = decode(path).samples
    assert read_genre(path) == []
    for genre in ("rock", "hiphop"):
        write_genre(path, genre)
        assert read_genre(path) == [genre]
    np.testing.assert_array_equal(decode(path).samples, before)
    assert [*tmp_path.iterdir()] == [path]


def test_other_tags_stay(mutagen, render_tone, tmp_path):
    path = render_tone(tmp_path / "song.flac")
    audio = mutagen.File(path)
    audio["title"], audio["genre"] = ["Tone"], ["Pop", "Rock"]
    audio.save()
    assert read_genre(path) == ["Pop", "Rock"]
    write_genre(path, "jazz")
    assert dict(mutagen.File(path).tags.as_dict()) == {"title": ["Tone"], "genre": ["jazz"]}


def test_older_tags_of_an_mp3_stay_as_old_as_they_are(mutagen, render_tone, tmp_path):
    """ID3v2.3 has frames that 2.4 lacks; ID3v1 is at the end of the file, its last byte the genre."""
    from mutagen.id3 import ID3, TCON, TDAT, TIT2, TORY, TRDA, TSIZ, TYER

    path = render_tone(tmp_path / "song.mp3")
    tags = ID3()
    for frame in (TIT2, TYER, TDAT, TRDA, TSIZ, TORY):
        tags.add(frame(encoding=1, text=["1203"]))
    tags.add(TCON(encoding=0, text=["(17)"]))
    tags.save(path, v2_version=3)
    old = b"TAG" + b"x" * 124 + bytes([17])
    with path.open("ab") as stream:
        stream.write(old)
    kept = ID3(path, translate=False, load_v1=False)
    assert read_genre(path) == ["Rock"]
    write_genre(path, "metal")
    assert read_genre(path) == ["metal"]
    now = ID3(path, translate=False, load_v1=False)
    assert now.version == kept.version == (2, 3, 0)
    assert {*now} == {*kept} == {"TIT2", "TYER", "TDAT", "TRDA", "TSIZ", "TORY", "TCON"}
    assert all(now[key] == kept[key] for key in kept if key != "TCON")
    assert path.read_bytes()[-128:] == old[:-1] + bytes([TCON.GENRES.index("Metal")])


@pytest.mark.parametrize("version", [2, 3, 4])
def test_other_frames_of_an_mp3_stay(mutagen, render_tone, tmp_path, version):
    """Among them several values of one, and of 2.4 a frame that belongs to 2.3."""
    from mutagen.id3 import APIC, ID3, TCON, TIT2, TPE1, TSIZ

    path = render_tone(tmp_path / "song.mp3")
    if version == 2:

        def frame(name: bytes, content: bytes) -> bytes:
            return name + len(content).to_bytes(3, "big") + content

        frames = frame(b"TT2", b"\0Tone") + frame(b"PIC", b"\0JPG\3\0picture") + frame(b"TCO", b"\0(17)")
        size = bytes([0, 0, len(frames) >> 7, len(frames) & 127])
        path.write_bytes(b"ID3\2\0\0" + size + frames + path.read_bytes())
    else:
        tags = ID3()
        tags.add(TIT2(encoding=1, text=["Tone"]))
        tags.add(TPE1(encoding=1, text=["One", "Other"]))
        tags.add(TSIZ(encoding=1, text=["1"]))
        tags.add(TCON(encoding=1, text=["Rock", "Pop"]))
        tags.add(APIC(encoding=0, mime="image/png", type=3, desc="", data=b"picture"))
        tags.save(path, v2_version=version, v23_sep=None)
    before = ID3(path, translate=False)
    write_genre(path, "metal")
    after = ID3(path, translate=False)
    assert after.version[1] == max(3, version)
    assert {*after} == {*before}
    assert len(before) == (3 if version == 2 else 5)
    for key in before:
        if key not in ("TCON", "APIC:"):
            assert after[key].text == before[key].text
    picture = after["APIC:"]
    assert (picture.mime, picture.data) == ("image/jpeg" if version == 2 else "image/png", b"picture")
    assert after["TCON"].text == ["metal"]


def test_tags_at_the_end_of_an_mp3_become_newer_ones(mutagen, render_tone, tmp_path):
    from mutagen.id3 import ID3

    path = render_tone(tmp_path / "song.mp3")
    old = (b"TAG" + b"Tone".ljust(30, b"\0")).ljust(127, b"\0") + bytes([12])
    path.write_bytes(path.read_bytes() + old)
    assert read_genre(path) == ["Other"]
    write_genre(path, "tango")
    assert read_genre(path) == ["tango"]
    assert ID3(path, load_v1=False)["TIT2"].text == ["Tone"]
    assert path.read_bytes()[-128:] == old[:-1] + bytes([113])
    write_genre(path, "made up")
    assert path.read_bytes()[-1] == 255


def test_tags_that_would_not_all_survive_are_left_alone(mutagen, render_tone, tmp_path):
    """What no version of mutagen knows can't go from 2.2 to 2.3."""
    path = render_tone(tmp_path / "song.mp3")
    frames = b"XYZ" + bytes([0, 0, 5]) + b"\0Tone"
    path.write_bytes(b"ID3\2\0\0" + bytes([0, 0, 0, len(frames)]) + frames + path.read_bytes())
    before = path.read_bytes()
    with pytest.raises(UserError, match="without a change to others; the file is as it was"):
        write_genre(path, "rock")
    assert path.read_bytes() == before


def test_an_error_leaves_the_file_as_it_was(mutagen, render_tone, tmp_path, monkeypatch):
    path = render_tone(tmp_path / "song.flac")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        path.with_suffix(".seen").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mutagen.flac.FLAC, "save", fail)
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\); the file is as it was"):
        write_genre(path, "rock")
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["song.flac", "song.seen"]


def test_a_folder_that_can_not_be_written_to_costs_one_song(mutagen, detect, song, tmp_path, monkeypatch):
    other = shutil.copy(song, tmp_path / "other.flac")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    code, out, err = detect("--jsonl", "--write-tags", "--yes", "--min-confidence", 0, song, other)
    assert code == 1
    assert len(out.splitlines()) == 2
    for path, line in zip((song, other), err.splitlines(), strict=True):
        assert f"{path}: its tags can't be written (Read-only file system); the file is as it was" in line


@pytest.fixture
def song(repo: Path, tmp_path: Path) -> Path:
    path = tmp_path / "song.flac"
    soundfile.write(path, decode(repo / "examples" / "demo_song.ogg", 4, 1).samples, 22_050)
    return path


def test_nothing_is_written_without_yes_or_confidence(mutagen, detect, song):
    path = song
    before = path.read_bytes()
    code, out, err = detect("--json", "--write-tags", "--min-confidence", 0, path)
    genre = json.loads(out)[0]["genre"]
    assert code == 0
    assert err.rstrip().endswith(f"{path}: genre tag none -> {genre}; --yes would write it")
    code, _, err = detect("--json", "--write-tags", "--yes", "--min-confidence", 1, path)
    assert (code, err) == (0, "")
    assert path.read_bytes() == before


def test_a_genre_spelled_otherwise_stays(mutagen, detect, song):
    genre = json.loads(detect("--json", song)[1])[0]["genre"]
    for spelled in (genre.title(), f"{genre[:3]}-{genre[3:].upper()}"):
        write_genre(song, spelled)
        assert detect("--json", "--write-tags", "--yes", "--min-confidence", 0, song)[::2] == (0, "")
        assert read_genre(song) == [spelled]
    write_genre(song, f"alt {genre}")
    assert f"alt {genre} -> {genre}" in detect("--json", "--write-tags", "--min-confidence", 0, song)[2]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root can give files away")
def test_the_owner_of_a_song_stays(mutagen, song):
    os.chown(song, 12345, 23456)
    song.chmod(0o640)
    write_genre(song, "rock")
    assert (song.stat().st_uid, song.stat().st_gid, song.stat().st_mode & 0o777) == (12345, 23456, 0o640)


def test_networks_that_are_never_confident_say_that_no_tag_changes(mutagen, detect, models, song, tmp_path):
    copied = shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("latest.*", "best.*"))
    path = copied / "fusion_progressive" / "model.safetensors"
    tensors, meta = load_checkpoint(path, "")
    save_checkpoint(path, tensors, meta | {"min_confidence": 1.0})
    code, _, err = detect("--json", "--write-tags", "--models", copied, song)
    assert code == 0
    assert "no answer of these networks counts as confident" in err
    assert "no answer" not in detect("--json", "--write-tags", song)[2]


def test_yes_writes_and_resume_knows_the_file_again(mutagen, detect, song, tmp_path):
    path, target = song, tmp_path / "out.jsonl"
    args = ("--write-tags", "--yes", "--min-confidence", 0, "--jsonl", "--output", target, "--resume", path)
    assert detect(*args)[0] == 0
    [record] = [json.loads(line) for line in target.read_text().splitlines()]
    assert read_genre(path) == [record["genre"]]
    assert detect(*args) == (0, "", "")
    assert len(target.read_text().splitlines()) == 1


def test_yes_also_tags_songs_that_were_answered_without(mutagen, detect, song, tmp_path):
    target = tmp_path / "out.jsonl"
    args = ("--min-confidence", 0, "--jsonl", "--output", target, "--resume", song)
    assert detect(*args)[0] == 0
    [record] = [json.loads(line) for line in target.read_text().splitlines()]
    assert detect(*args, "--write-tags")[2].rstrip().endswith(f"-> {record['genre']}; --yes would write it")
    assert read_genre(song) == []
    code, out, err = detect(*args, "--write-tags", "--yes")
    assert (code, out) == (0, "")
    assert err.rstrip().endswith(f"genre tag none -> {record['genre']}")
    assert read_genre(song) == [record["genre"]]
    assert detect(*args, "--write-tags", "--yes") == (0, "", ""), "the changed file is known again"
    first, last = [json.loads(line) for line in target.read_text().splitlines()]
    assert {key for key in first if first[key] != last[key]} <= {"size", "mtime"}


def test_a_link_stays_a_link(mutagen, song, tmp_path):
    link = tmp_path / "folder" / "link.flac"
    link.parent.mkdir()
    link.symlink_to(song)
    write_genre(link, "rock")
    assert link.is_symlink()
    assert read_genre(song) == ["rock"]


def test_a_file_that_carries_no_tags_is_named_where_it_would_get_one(mutagen, detect, song, tmp_path):
    path = tmp_path / "song.au"
    soundfile.write(path, *soundfile.read(song))
    assert detect("--json", "--write-tags", "--min-confidence", 1, path)[::2] == (0, "")
    code, out, err = detect("--json", "--write-tags", "--min-confidence", 0, path)
    assert code == 1
    assert "genre" in json.loads(out)[0]
    assert "song.au: its format carries no tags" in err


def test_what_can_carry_no_tag_is_not_promised_one(mutagen, song, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-formats.txt")
    path = tmp_path / "song.aac"
    with av.open(str(path), "w", format="adts") as container:
        stream = container.add_stream("aac", rate=22_050, layout="mono")
        samples = np.zeros((1, 1024), dtype=np.float32)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate = 22_050
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="carries no tags"):
        read_genre(path)


def test_a_name_as_long_as_a_file_system_takes_is_tagged_and_reported(mutagen, detect, song, tmp_path):
    """255 bytes, of which a letter takes three."""
    path, page = song.rename(tmp_path / f"{'歌' * 83}.flac"), tmp_path / f"{'頁' * 83}.html"
    assert detect("--write-tags", "--yes", "--min-confidence", 0, "--report", page, path)[0] == 0
    assert len(read_genre(path)) == 1
    assert page.exists()


def test_without_mutagen_one_line_names_the_extra(detect, monkeypatch, render_tone, tmp_path):
    monkeypatch.setitem(sys.modules, "mutagen", None)  # as if it were not installed
    code, out, err = detect("--write-tags", shutil.copy(render_tone(tmp_path / "a.wav"), tmp_path / "b.wav"))
    assert (code, out) == (1, "")
    assert err.rstrip().endswith("--write-tags needs mutagen: pip install -r requirements-formats.txt")
