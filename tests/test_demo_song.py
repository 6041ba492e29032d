"""The demo song is what its script renders, and its instruments sound at the pitch and time they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import render_demo_song as band


@pytest.fixture(scope="module")
def song() -> np.ndarray:
    return band.render_song(seed=0)


def test_song_is_half_a_minute_without_clipping_or_gaps(song):
    assert len(song) == 30 * band.RATE
    assert np.abs(song).max() == pytest.approx(band.PEAK)
    assert abs(song.mean()) < 0.01
    loudness = np.sqrt(np.mean(song.reshape(30, -1) ** 2, axis=1))
    assert loudness[:29].min() > 0.05


def test_committed_file_is_this_rendering(repo, song):
    decoded, rate = soundfile.read(repo / "examples" / "demo_song.ogg")
    assert rate == band.RATE
    assert decoded.shape == song.shape
    assert np.abs(decoded).max() < 1
    assert np.corrcoef(decoded, song)[0, 1] > 0.97, "render it again: python examples/render_demo_song.py"
    assert np.std(decoded) == pytest.approx(np.std(song), rel=0.05)
    assert (repo / "examples" / "demo_song.ogg").stat().st_size <= 300_000


def test_same_seed_same_song_other_seed_other_song(tmp_path, run_script, song):
    for seed in (0, 1):
        run_script("examples/render_demo_song.py", "--seed", seed, "--out", tmp_path / f"{seed}.flac", cwd=tmp_path)
    same, other = (soundfile.read(tmp_path / f"{seed}.flac")[0] for seed in (0, 1))
    np.testing.assert_allclose(same, song, atol=2**-14)  # 16 bits
    assert np.corrcoef(other, song)[0, 1] < 0.9


@pytest.mark.parametrize("name", ["song.txt", "song", "taken/song.ogg"])
def test_unusable_output_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(band, "render_song", lambda seed: np.zeros(100))
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert band.main(["--out", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@settings(max_examples=25)
@given(note=st.integers(30, 84), voice=st.sampled_from(["pluck", "tone", "bass"]))
def test_instruments_play_in_tune(note, voice):
    rate, hz, rng = band.STUDIO_RATE, band.hertz(note), np.random.default_rng(note)
    sound = {
        "pluck": lambda: band.pluck(hz, 1, rng, rate, 0.5, 3),
        "tone": lambda: band.tone(hz, 1, rate, [1, 0.5, 0.25]),
        "bass": lambda: band.bass(hz, 1, rate),
    }[voice]()
    assert len(sound) == rate
    # energy close to the overtones of the note against energy anywhere
    power = np.abs(np.fft.rfft(sound * np.hanning(rate))) ** 2
    order = np.fft.rfftfreq(rate, 1 / rate) / hz
    near = np.abs(order - np.maximum(1, np.round(order))) * hz < 4 + 0.01 * hz
    assert power[near].sum() > 0.98 * power.sum()


@given(start=st.floats(0, 2), length=st.integers(0, 300))
def test_place_adds_at_the_time_and_cuts_the_end(start, length):
    track = np.ones(200)
    band.place(track, np.ones(length), start, rate=100, gain=0.5)
    first = round(start * 100)
    expected = np.ones(200)
    expected[first : first + length] += 0.5
    np.testing.assert_array_equal(track, expected)


def test_mini_source_is_a_small_gtzan(mini_source):
    genres = sorted(folder.name for folder in mini_source.iterdir() if folder.is_dir())
    assert genres == ["blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock"]
    songs = sorted(path.name for path in mini_source.glob("*/*.wav"))
    assert len(songs) == 70
    index = [line.split(" ::: ") for line in (mini_source / "artists.txt").read_text().splitlines() if line[:2] != "##"]
    assert sorted(name for name, _, _ in index) == songs
    assert len({artist for _, artist, _ in index}) == 50
    for path in mini_source.glob("*/*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (22_050, 1)
        assert 5 <= info.duration <= 6
