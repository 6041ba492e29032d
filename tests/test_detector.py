"""The detector: what it prints, what it refuses, and that an answer depends on the sound alone."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import prediction
from hypothesis import given, settings
from hypothesis import strategies as st

import genre_detector
from common import UserError
from decoding import SoundReader, decode
from detector_output import as_text
from extract_features import song_features
from extract_model_features import MEMBERS
from genre_detector import FUSION, GenreDetector
from predict import network_outputs


@pytest.fixture(scope="session")
def demo(repo: Path) -> Path:
    return repo / "examples" / "demo_song.ogg"


@pytest.fixture(scope="session")
def song(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """Nine seconds of the demo song, 16 bits."""
    path = tmp_path_factory.mktemp("song") / "song.wav"
    soundfile.write(path, decode(demo, 2, 9).samples, 22_050, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def mixed(run_script, models: Path, demo: Path, song: Path) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """A run over two good songs and five that are none."""
    folder = song.parent
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("no music here\n" * 100)
    (folder / "header.wav").write_bytes(song.read_bytes()[:20])
    (folder / "folder.wav").mkdir()
    bad = ["missing.wav", "empty.wav", "text.mp3", "header.wav", "folder.wav"]
    songs = [str(demo), *(str(folder / name) for name in bad), str(song)]
    return songs, run_script("genre_detector.py", "--models", models, "--json", *songs, check=False)


# ---------------------------------------------------------------- what it prints


def test_text_for_the_demo_song(run_script, models, demo):
    output = run_script("genre_detector.py", "--models", models, "--top-k", 10, demo).stdout
    lines = output.splitlines()
    assert lines[0].startswith("Music genre detection with fusion on ")
    assert f"File:      {demo}" in lines
    assert re.search(r"^Duration:  0:30\.0  \(\d+ windows\)$", output, re.MULTILINE)
    rows = re.findall(r"^  (\S+) +(\d+\.\d) %(?:  (#+))?$", output, re.MULTILINE)
    parts = [float(part) for _, part, _ in rows]
    assert len({genre for genre, _, _ in rows}) == 10
    assert sum(parts) == pytest.approx(100, abs=0.5)
    assert parts == sorted(parts, reverse=True)
    assert [len(bar) for _, _, bar in rows] == pytest.approx([32 * part / 100 for part in parts], abs=0.52)
    assert f"Genre:     {rows[0][0]}" in lines


@settings(max_examples=30)
@given(st.integers(1, 12), st.floats(0.1, 1e5))
def test_text_shows_the_likeliest(top_k, seconds):
    probabilities = dict(zip("abcdefghij", np.linspace(0.01, 0.19, 10), strict=True))
    answer = prediction(path="x\udcff.mp3", duration_s=seconds, probabilities=probabilities, notes=["mended"])
    text = as_text(answer, top_k)
    assert re.findall(r"^  ([a-j]) ", text, re.MULTILINE) == list("jihgfedcba")[:top_k]
    assert "Note:      mended" in text
    assert "\\udcff" in text
    assert "  (3 windows)\n" in text
    minutes, rest = re.search(r"Duration:  (\d+):(\d\d\.\d)", text).groups()
    assert 60 * int(minutes) + float(rest) == pytest.approx(seconds, abs=0.051)
    assert float(rest) < 60


def test_json_is_one_array_with_the_documented_keys(mixed):
    songs, run = mixed
    records = json.loads(run.stdout)
    assert [record["path"] for record in records] == songs
    for record in (records[0], records[-1]):
        assert [*record] == ["path", "duration_s", "windows", "genre", "probabilities"]
        assert sum(record["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert record["genre"] == max(record["probabilities"], key=record["probabilities"].get)
    assert records[0]["duration_s"] == pytest.approx(30, abs=0.05)
    assert all([*record] == ["path", "error"] for record in records[1:-1])


def test_each_bad_song_is_named_in_one_line(mixed):
    songs, run = mixed
    assert run.returncode == 1
    lines = run.stderr.splitlines()  # and nothing of what libsndfile's mp3 decoder prints
    assert len(lines) == 5
    for song, line in zip(songs[1:-1], lines, strict=True):
        assert line.startswith(f"genre_detector.py: {song}: ")


def test_a_damaged_released_network_can_be_restored(models, tmp_path, monkeypatch):
    monkeypatch.setattr(genre_detector, "__file__", str(tmp_path / "genre_detector.py"))
    shutil.copytree(models, tmp_path / "models")
    (tmp_path / "models" / "ecas_cnn" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"or restore the released networks: git -C /.* checkout models$"):
        GenreDetector()
    with pytest.raises(UserError, match=r"run train_ecas_cnn\.py again$"):
        GenreDetector(models=tmp_path / "models")
    with pytest.raises(UserError, match=r"try --device auto$"):
        GenreDetector(device="abacus")


def test_bad_usage_leaves_with_two(capsys, demo):
    for args in (["--model", "knn", str(demo)], ["--top-k", "0", str(demo)], []):
        with pytest.raises(SystemExit) as caught:
            genre_detector.main(args)
        assert caught.value.code == 2
        assert capsys.readouterr().out == ""


def test_unknown_model_or_folder_from_python(tmp_path):
    with pytest.raises(UserError, match="min_confidence 5 is not between 0 and 1"):
        GenreDetector(min_confidence=5)
    with pytest.raises(UserError, match="--device cuda:0: no such device here"):
        GenreDetector(device="cuda:0")
    with pytest.raises(UserError, match="no model 'knn': choose from fusion"):
        GenreDetector("knn")
    with pytest.raises(UserError, match=r"run train_bigru_cnn\.py first"):
        GenreDetector("fusion", tmp_path)


def test_an_answer_needs_no_library_that_is_slow_to_load(repo, models, demo):
    code = "import sys; from genre_detector import GenreDetector as G; G('fusion', sys.argv[1]).predict(sys.argv[2]); "
    code += "print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, models, demo], cwd=repo, capture_output=True, text=True, check=True
    )
    slow = {"librosa", "matplotlib", "scipy", "sklearn", "sympy", "torch._dynamo"}
    assert not slow & {*run.stdout.split()}


# ---------------------------------------------------------------- what an answer depends on


def test_each_model_answers(models, detector, song):
    analysis = detector.analyse(song)
    for name in (FUSION, *MEMBERS):
        alone = GenreDetector(name, models, "cpu").predict(song)
        assert alone.probabilities == pytest.approx(
            dict(zip(detector.genres, np.exp(analysis.song[name]), strict=True)), abs=1e-9
        )


def test_names_and_folders_tell_nothing(detector, song, tmp_path):
    expected = detector.predict(song).probabilities
    for genre in detector.genres[:3]:
        path = tmp_path / genre / f"{genre}.00000.wav"
        path.parent.mkdir()
        shutil.copy(song, path)
        assert detector.predict(path).probabilities == expected


def test_silence_has_no_say(detector, demo, tmp_path):
    samples, rate = soundfile.read(demo, dtype="float32")
    silence = np.zeros((60 * rate, *samples.shape[1:]), dtype=np.float32)
    soundfile.write(tmp_path / "late.wav", np.concatenate([silence, samples, silence[: 5 * rate]]), rate)
    expected, found = detector.predict(demo), detector.predict(tmp_path / "late.wav")
    assert found.notes == ["65.0 s left out as silence (50 dB below the loudest)"]
    assert found.probabilities == pytest.approx(expected.probabilities, abs=0.05)
    assert (found.genre, found.sounds_like, found.sections[-1].end_s) == (expected.genre, None, found.duration_s)
    assert found.duration_s == pytest.approx(expected.duration_s + 65, abs=0.01)


def test_a_folder_is_scored_alike_with_and_without_silence_around_its_songs(run_script, models, song, tmp_path):
    for genre in ("jazz", "rock"):
        (tmp_path / "music" / genre).mkdir(parents=True)
        shutil.copy(song, tmp_path / "music" / genre / f"song{song.suffix}")
    args = ("benchmarks/score_folder.py", tmp_path / "music", "--models", models, "--device", "cpu")
    plain, amid = (run_script(*args, *more).stdout.splitlines() for more in ((), ("--silence", 2)))
    row = [line for line in plain if line.startswith("accuracy")]
    assert row == [line for line in amid if line.startswith("accuracy")]
    assert row[0].split()[2] == "2"


def test_wav_and_flac_sound_the_same(detector, song, tmp_path):
    samples, rate = soundfile.read(song, dtype="int16")
    soundfile.write(tmp_path / "song.flac", samples, rate)
    assert detector.predict(tmp_path / "song.flac").probabilities == detector.predict(song).probabilities


def test_a_song_does_not_depend_on_its_batch(detector, demo, song):
    features = [song_features(SoundReader(path)) for path in (demo, song)]
    for member in detector.members:
        kind = member.meta["settings"]["features"]
        songs = [feature[kind] for feature in features]
        together = network_outputs(member.network, songs, member.window, member.overlap)
        for piece, both in zip(songs, together, strict=True):
            alone = network_outputs(member.network, [piece], member.window, member.overlap)[0]
            np.testing.assert_allclose(alone[0], both[0], atol=1e-5)
            np.testing.assert_allclose(alone[1], both[1], atol=1e-4)
            first = network_outputs(member.network, [piece[:, : member.window]], member.window, member.overlap)[0]
            np.testing.assert_allclose(first[0][0], both[0][0], atol=1e-5)


def test_a_limit_takes_evenly_spaced_windows(detector, demo):
    member = detector.members[0]
    song = song_features(SoundReader(demo))[member.meta["settings"]["features"]]
    every, _ = network_outputs(member.network, [song], member.window, member.overlap)[0]
    some, _ = network_outputs(member.network, [song], member.window, member.overlap, limit=3)[0]
    np.testing.assert_allclose(some, every[[0, (len(every) - 1) // 2, -1]], atol=1e-5)


def test_the_released_networks_say_of_the_demo_song_what_they_said_when_released(detector, demo):
    """No other test notices code that has drifted from the weights. A new release has new figures."""
    said = detector.predict(demo).probabilities
    expected = {"metal": 0.797, "hiphop": 0.102, "rock": 0.047, "pop": 0.022}
    assert {genre: said[genre] for genre in expected} == pytest.approx(expected, abs=1e-3)


def test_order_and_repetition_change_nothing(detector, demo, song):
    expected = detector.predict(song)
    detector.predict(demo)
    assert detector.predict(song) == expected


def test_level_changes_hardly_anything(detector, song, tmp_path):
    samples, rate = soundfile.read(song)
    soundfile.write(tmp_path / "quiet.wav", samples / 4, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", samples, rate, subtype="FLOAT")
    quiet, loud = (detector.predict(tmp_path / f"{name}.wav").probabilities for name in ("quiet", "loud"))
    assert quiet == pytest.approx(loud, abs=5e-3)


@pytest.mark.parametrize("seconds", [0.1, 0.2, 1.0])
@pytest.mark.parametrize("level", [0.5, 0.0], ids=["tone", "silence"])
def test_short_and_silent_songs_are_answered(detector, render_tone, tmp_path, seconds, level):
    answer = detector.predict(
        render_tone(tmp_path / "short.wav", seconds=seconds, rate=44_100, channels=2, level=level)
    )
    assert answer.windows == 1
    assert answer.duration_s == pytest.approx(seconds, abs=1e-3)
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert np.isfinite(list(answer.probabilities.values())).all()


def test_a_part_of_a_song_is_that_part(detector, song, tmp_path):
    samples, rate = soundfile.read(song, dtype="int16")
    soundfile.write(tmp_path / "part.wav", samples[2 * rate : 7 * rate], rate)
    assert detector.predict(song, 2, 5).probabilities == detector.predict(tmp_path / "part.wav").probabilities


def test_threads_share_a_detector(detector, demo, song):
    songs = [song, demo, song, demo, song, demo]
    expected = [detector.predict(path).probabilities for path in songs[:2]]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(detector.predict, songs))
    for index, answer in enumerate(answers):
        assert answer.probabilities == pytest.approx(expected[index % 2], abs=1e-6)


def test_real_songs(detector, gtzan_dir):
    songs = [sorted((gtzan_dir / "genres" / genre).iterdir())[3] for genre in ("classical", "metal", "reggae")]
    answers = [detector.predict(path) for path in songs]
    for answer in answers:
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-9)
        assert 29 < answer.duration_s < 31
    assert answers[0].probabilities != answers[1].probabilities


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_is_kept_from_song_to_song(repo):
    """Else each song's tensors come from the system anew, 6,500 page faults a song, and take half as long again."""
    code = (
        "import resource, torch; from genre_detector import GenreDetector, listen; torch.set_num_threads(1);"
        "detector, heard = GenreDetector(device='cpu'), listen('examples/demo_song.ogg');"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt;"
        "counts = [detector.judge(heard) and faults() for _ in range(8)];"
        "print(sorted(after - before for before, after in zip(counts[2:], counts[3:]))[2])"  # of five, one may grow
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000
