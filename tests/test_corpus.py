"""Bad and odd files: every one gets its answer or one line, whatever script meets it, and the rest goes on."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpus.make_corpus import (
    ANSWERED,
    NOTED,
    REFUSED,
    Case,
    av_encoded,
    encoded,
    make,
    music,
    name_cases,
    without_xing,
)
from corpus.peak import peak_of

import genre_detector
import sound_faults
from catalogue import read_catalogue
from common import one_line
from decoding import SAMPLE_RATE, SoundReader, decode
from mp3_frames import survey
from sound_faults import has_several_streams


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The cases by path."""
    return make(tmp_path_factory.mktemp("corpus") / "corpus")


@dataclass(frozen=True)
class Run:
    code: int
    records: list[dict]
    errors: list[str]
    megabytes: float


@pytest.fixture(scope="module")
def detected(corpus: dict[str, Case], repo: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All files in one call."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--models", str(models), "--model", "cnn_bigru", "--device", "cpu", "--threads", "1", "--jsonl"]
    command = [sys.executable, str(repo / "genre_detector.py"), *options, *corpus]
    code, megabytes = peak_of(command, folder / "out", folder / "err")
    records = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    errors = (folder / "err").read_text().split("\n")[:-1]
    return Run(code, records, errors, megabytes)


def outcome(record: dict) -> str:
    return REFUSED if "error" in record else NOTED if record["notes"] else ANSWERED


def test_the_corpus_is_large(corpus):
    for kind in (ANSWERED, NOTED, REFUSED):
        assert sum(case.outcome == kind for case in corpus.values()) >= 20


def test_every_file_becomes_of_what_it_should(corpus, detected):
    assert [record["path"] for record in detected.records] == [*corpus]
    wrong = [
        (case.what, outcome(record), record.get("error") or record["notes"])
        for case, record in zip(corpus.values(), detected.records, strict=True)
        if outcome(record) != case.outcome
    ]
    assert not wrong
    for record in detected.records:
        if "error" not in record:
            assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)


def test_each_bad_file_is_named_once_in_one_line(corpus, detected):
    assert detected.code == 1
    bad = [one_line(path) for path, case in corpus.items() if case.outcome == REFUSED]
    assert len(detected.errors) == len(bad)
    for path, line in zip(bad, detected.errors, strict=True):
        assert line.startswith(f"genre_detector.py: {path}: ")
        assert line.count(Path(path).name) == 1
        assert line == one_line(line)


def test_memory_stays_bounded(detected):
    assert detected.megabytes < 1000


def test_names_survive_every_output_form(corpus, models, capsys):
    songs = [path for path, case in corpus.items() if case.name in {case.name for case in name_cases()}]
    options = ["--models", str(models), "--model", "cnn_bigru", "--device", "cpu", "--duration", "1"]
    assert genre_detector.main([*options, "--csv", *songs]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == [path.encode("utf-8", "backslashreplace").decode() for path in songs]
    assert genre_detector.main([*options, "--json", *songs]) == 0
    assert [record["path"] for record in json.loads(capsys.readouterr().out)] == songs
    assert genre_detector.main([*options, *songs]) == 0
    text = capsys.readouterr().out
    assert [line[11:] for line in text.split("\n") if line.startswith("File:")] == [one_line(path) for path in songs]
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_preparation_and_extraction_name_what_they_leave_out(corpus, mini_source, run_script, tmp_path):
    source, data = tmp_path / "genres", tmp_path / "data"
    shutil.copytree(mini_source / "jazz", source / "jazz")
    (source / "odd").mkdir()
    for path, case in corpus.items():
        link = source / "odd" / case.name
        link.symlink_to(link.name if case.name == "loop.wav" else path)
    run = run_script("prepare_gtzan_data.py", "--source", source, "--data", data, "--workers", 2)
    songs = {song.file: song for song in read_catalogue(data).songs.values() if song.genre == "odd"}
    lines = [line.split(": ", 1)[1] for line in run.stderr.split("\n") if line.endswith("; left out")]
    assert len(songs) == len(corpus)
    for case in corpus.values():
        file = f"odd/{case.name}"
        song = songs[file.encode("utf-8", "backslashreplace").decode()]
        told = [line for line in lines if line.startswith(f"{one_line(file)}: ")]
        assert len(told) == (song.verdict != "ok"), (case.what, told)
        if case.outcome == REFUSED or case.name.startswith("half."):
            assert song.verdict != "ok", case.what
    kept = {song.file for song in songs.values() if song.verdict == "ok"}
    assert {"odd/whole.mp3", "odd/192khz.flac", "odd/-dash.flac", "odd/no length.mp3"} <= kept
    run_script("extract_features.py", "--data", data, "--workers", 2)
    assert len(list((data / "processed" / "mfcc").glob("odd.*.npy"))) == len(kept)


# ---------------------------------------------------------------- what the corpus brought to light


def test_an_mp3_without_a_length_is_heard_to_its_end(tmp_path):
    whole, bare = tmp_path / "whole.mp3", tmp_path / "bare.mp3"
    whole.write_bytes(encoded("mp3"))
    bare.write_bytes(without_xing(whole.read_bytes()))
    assert survey(whole).announced == survey(whole).frames == survey(bare).frames
    sound, expected = decode(bare), decode(whole)
    assert sound.seconds == pytest.approx(expected.seconds, abs=0.1)
    assert sound.notes == []


@pytest.mark.parametrize("second", [(44_100, 2), (48_000, 1), (22_050, 1)], ids=["stereo", "48 kHz", "22 kHz"])
def test_joined_mp3s_that_are_not_heard_whole_say_so(tmp_path, second):
    import soundfile

    contents = []
    for rate, channels in ((44_100, 1), second):
        sound = np.random.default_rng(0).normal(0, 0.1, (4 * rate, channels))
        soundfile.write(tmp_path / "part.mp3", sound, rate)
        contents.append((tmp_path / "part.mp3").read_bytes())
    path = tmp_path / "joined.mp3"
    path.write_bytes(b"".join(contents))
    sound = decode(path)
    assert sound.seconds == pytest.approx(4, abs=0.2)
    [note] = sound.notes
    assert note.startswith("breaks off after 4.")


def test_joined_mp3s_of_a_kind_are_heard_whole(tmp_path):
    content = encoded("mp3")
    path = tmp_path / "joined.mp3"
    path.write_bytes(content + content)
    once = len(decode_bytes(tmp_path / "one.mp3", content)) / SAMPLE_RATE
    sound = decode(path)
    assert sound.seconds == pytest.approx(2 * once, abs=0.2)
    assert not any("breaks off" in note for note in sound.notes)


def test_an_mp3_has_no_seams_between_blocks(tmp_path):
    import soundfile

    path = tmp_path / "song.mp3"
    path.write_bytes(encoded("mp3", music(12)))
    at_once = soundfile.read(path, dtype="float32")[0]
    np.testing.assert_allclose(np.concatenate(list(SoundReader(path))), at_once, atol=1e-6)


def test_the_sound_around_a_broken_place_is_kept(tmp_path):
    path = tmp_path / "song.mp3"
    content = encoded("mp3", music(12))
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(5000) + content[middle + 5000 :])
    sound, whole = decode(path).samples, decode_bytes(tmp_path / "whole.mp3", content)
    assert len(whole) - 3 * SAMPLE_RATE < len(sound) < len(whole)
    # The end is the end: the best match of the last second is at the same distance from it
    last, before = whole[-2 * SAMPLE_RATE : -SAMPLE_RATE], sound[-3 * SAMPLE_RATE :]
    place = int(np.correlate(before, last, "valid").argmax())
    assert abs(place - SAMPLE_RATE) < 2400
    assert np.corrcoef(before[place : place + len(last)], last)[0, 1] > 0.95


def decode_bytes(path: Path, content: bytes) -> np.ndarray:
    path.write_bytes(content)
    return decode(path).samples


def test_marks_without_frames_cost_no_time(tmp_path):
    """Ten megabytes of them took five seconds, a gigabyte would have taken minutes."""
    path = tmp_path / "song.mp3"
    path.write_bytes(b"\xff\xfb" * 5_000_000)
    started = time.process_time()
    assert survey(path).frames == 0
    assert time.process_time() - started < 1.5
    frames = encoded("mp3")
    path.write_bytes(b"\xff\xfb" * 1000 + frames)
    assert survey(path).frames > 100


@pytest.mark.parametrize("suffix", ["ogg", "opus"])
def test_all_streams_of_a_recording_are_heard_or_said_not_to_be(tmp_path, monkeypatch, suffix):
    path, one = tmp_path / f"radio.{suffix}", encoded(suffix, music(3, 48_000), 48_000)
    path.write_bytes(one)
    alone = decode(path)
    assert alone.notes == []
    path.write_bytes(one * 2)
    both = decode(path)
    assert both.seconds == pytest.approx(2 * alone.seconds, abs=0.1)
    assert both.notes == ["several streams one after the other, whose damage can't be told"]
    path.write_bytes(one + b"between two recordings" + one)
    assert decode(path).seconds == pytest.approx(both.seconds, abs=0.1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no PyAV
    first = decode(path)
    assert first.seconds == alone.seconds
    assert "the others need requirements-formats.txt" in first.notes[0]


def test_streams_that_play_at_once_are_not_several_in_turn(tmp_path, monkeypatch):
    def page(flags: int, content: bytes = b"sound") -> bytes:
        return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([1, len(content)]) + content

    path = tmp_path / "film.ogg"
    path.write_bytes(page(2) + page(2) + page(0) * 3)
    assert not has_several_streams(path)
    path.write_bytes(page(2) + page(0) * 5 + page(2))
    assert has_several_streams(path)
    monkeypatch.setattr(sound_faults, "MOST_PAGES", 5)
    assert not has_several_streams(path), "it looked at more pages than it should"


def test_a_wav_that_can_not_be_searched_is_heard_from_its_start(tmp_path):
    soundfile.write(tmp_path / "phone.wav", 0.1 * np.sin(np.arange(16_000)), 8000, subtype="GSM610")
    assert decode(tmp_path / "phone.wav").seconds == pytest.approx(2, abs=0.05)


def test_flac_is_used_up_to_where_it_breaks_off(tmp_path):
    path = tmp_path / "song.flac"
    content = encoded("flac", music(2.5))  # less than one block
    whole = decode_bytes(path, content)
    sound = decode_bytes(path, content[: len(content) // 2])
    assert len(sound) > 0.3 * len(whole)
    np.testing.assert_array_equal(sound, whole[: len(sound)])


def test_days_of_silence_are_cut_with_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr("decoding.MAX_SECONDS", 5.0)
    path = tmp_path / "song.flac"
    sound = decode_bytes(path, encoded("flac", np.zeros((SAMPLE_RATE * 8, 1))))
    assert len(sound) == 5 * SAMPLE_RATE
    assert "the rest was left out" in decode(path).notes[0]
    assert decode(path, 4).notes == []


@pytest.mark.parametrize("suffix", ["wav", "mp3", "aac"])
def test_a_part_tells_of_a_cut_that_it_reaches_in_seconds_of_the_file(tmp_path, suffix):
    if suffix == "aac":
        pytest.importorskip("av", reason="PyAV is not installed: pip install -r requirements-formats.txt")
    content = av_encoded("adts", "aac", music(12)[:, 0]) if suffix == "aac" else encoded(suffix, music(12))
    path = tmp_path / f"song.{suffix}"
    path.write_bytes(content[: len(content) // 2])
    assert decode(path, 0, 2).notes == decode(path, 0, 5).notes == []
    if suffix == "wav":
        assert "breaks off after 6.0 s of the 12.0 s" in decode(path, 1).notes[0]
    for start in (0, 1, 4):
        assert re.search(r"breaks off after [56]\.\d s", decode(path, start).notes[0])
