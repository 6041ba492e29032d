"""Decoding and features: equal to librosa's, the same for every format, defined for any sound."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from common import UserError
from decoding import SAMPLE_RATE, decode
from extract_features import (
    FRAMES_PER_SECOND,
    HOP_LENGTH,
    N_FFT,
    N_MELS,
    N_MFCC,
    feature_path,
    is_sounding,
    mel_power,
    normalised_log_mel,
    song_features,
    timed_features,
)

GOLDEN = Path(__file__).with_name("golden_log_mel.npy")


def formula(seconds: float = 1.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """A rising tone, its trembling fifth and a click four times a second: float32, no random library."""
    t = np.arange(round(seconds * rate)) / rate
    rising = np.sin(2 * np.pi * (200 * t + 900 * t**2))
    fifth = np.sin(2 * np.pi * 1500 * t) * (1 + np.sin(2 * np.pi * 6 * t)) / 2
    clicks = np.exp(-200 * (4 * t % 1) / 4) * np.sin(2 * np.pi * 5000 * t)
    return (0.3 * rising + 0.2 * fifth + 0.3 * clicks).astype(np.float32)


def rough(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise under a tone, float32."""
    rng = np.random.default_rng(seed)
    count = round(seconds * SAMPLE_RATE)
    return (0.1 * rng.standard_normal(count) + 0.3 * np.sin(np.arange(count) / 20)).astype(np.float32)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("frames", [10, 127, 128, 309])
def test_mel_power_is_librosas(frames):
    import librosa

    samples = rough((frames - 1) * HOP_LENGTH / SAMPLE_RATE + 0.01)
    expected = librosa.feature.melspectrogram(
        y=samples, sr=SAMPLE_RATE, n_fft=N_FFT, hop_length=HOP_LENGTH, n_mels=N_MELS, pad_mode="constant"
    )
    found = mel_power(np.array_split(samples, 7))  # blocks as a decoder gives them
    assert found.shape == expected.shape == (N_MELS, frames)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7 * expected.max())


def test_log_mel_is_centred_by_band_with_one_scale():
    log_mel = normalised_log_mel(mel_power([rough(3)]))
    assert np.abs(log_mel.mean(axis=1)).max() < 1e-4
    assert log_mel.std() == pytest.approx(1, abs=1e-3)
    quiet = np.full((N_MELS, 50), 1e-30, dtype=np.float32)
    quiet[:, 7] = 1
    floored = normalised_log_mel(quiet.copy())  # it works in place
    assert floored[:, 7] == pytest.approx(floored.max())
    half_floor = np.where(quiet == 1, quiet, 1e-8).astype(np.float32)  # 80 dB down is as far as it goes
    np.testing.assert_allclose(normalised_log_mel(half_floor), floored, atol=1e-5)


@settings(max_examples=40)
@given(st.integers(round(0.1 * SAMPLE_RATE), 4 * SAMPLE_RATE), st.integers(0, 10**6), st.floats(1e-6, 1))
def test_features_have_their_form_at_any_length_and_level(count, seed, level):
    samples = (level * np.random.default_rng(seed).uniform(-1, 1, count)).astype(np.float32)
    features = song_features([samples])
    frames = 1 + count // HOP_LENGTH
    assert {name: (array.shape, array.dtype) for name, array in features.items()} == {
        "melspectrogram": ((N_MELS, frames), np.float16),
        "mfcc": ((N_MFCC, frames), np.float16),
    }
    assert all(np.isfinite(array).all() for array in features.values())


@pytest.mark.parametrize("value", [0.0, 1e-30], ids=["silence", "denormal"])
def test_silence_gives_zeros(value):
    for array in song_features([np.full(SAMPLE_RATE, value, dtype=np.float32)]).values():
        assert not array.any()


@pytest.mark.parametrize(
    ("frames", "kept"),  # of sound and silence in turn, beginning with sound
    [
        ([0, 9, 100], [0, 9, 100]),
        ([0, 10, 100], [0, 0, 100]),
        ([100, 42, 100], [100, 42, 100]),  # a pause
        ([100, 43, 100, 10], [100, 0, 100, 0]),
        ([0, 100, 9, 60, 100], [0, 0, 0, 0, 100]),  # a click
        ([0, 100, 10, 60, 100], [0, 0, 10, 0, 100]),
        ([9, 43, 100, 43, 5], [0, 0, 100, 0, 0]),
        ([100, 50, 5, 20, 100], [100, 0, 5, 20, 100]),
        ([0, 100, 42], [0, 100, 42]),  # too little would be left
        ([0, 100, 43, 100], [0, 0, 43, 0]),
        ([0, 300], [0, 300]),
        ([1], [1]),
    ],
)
def test_silence_is_left_out_and_pauses_stay(frames, kept):
    silent = np.repeat(np.arange(len(frames)) % 2, frames)[:, None]
    expected = np.concatenate([np.full(count, bool(left)) for count, left in zip(frames, kept, strict=True)])
    bands = np.linspace(0.5, 1, N_MELS, dtype=np.float32)
    np.testing.assert_array_equal(is_sounding(np.where(silent, 10**-5.1, 1) * bands), expected)
    assert is_sounding(np.where(silent, 10**-4.9, 1) * bands).all()


@pytest.mark.parametrize("level", [0.0, 1e-5], ids=["zeros", "hiss"])
def test_silence_around_a_song_and_within_changes_nothing_of_it(level):
    song = rough(6)
    quiet = level * np.random.default_rng(1).standard_normal(100 * HOP_LENGTH).astype(np.float32)
    features, sounding = timed_features([quiet, song[: 3 * SAMPLE_RATE], quiet, song[3 * SAMPLE_RATE :], quiet])
    edges = 12  # frames that hear an edge
    assert (~sounding).sum() == pytest.approx(300, abs=edges)
    assert sounding[110:200].all()
    assert not sounding[:90].any()
    assert not sounding[-90:].any()
    expected = song_features([song])

    def changes(array: np.ndarray) -> np.ndarray:
        """From frame to frame: without the level of each band, in which the edges have a say."""
        return np.diff(array.astype(float)).ravel()

    for kind, found in features.items():
        assert found.shape[1] == sounding.sum() == pytest.approx(expected[kind].shape[1], abs=edges)
        song_alone = changes(expected[kind][:, 20:100])
        alike = [np.corrcoef(changes(found[:, first : first + 80]), song_alone)[0, 1] for first in range(10, 30)]
        assert max(alike) > 0.99


def test_extraction_leaves_silence_out_and_says_so(tmp_path, run_script):
    songs = [tmp_path / genre / f"{genre}.{n}.wav" for genre in ("polka", "waltz") for n in range(3)]
    for seed, song in enumerate(songs):
        song.parent.mkdir(exist_ok=True)
        soundfile.write(song, np.pad(rough(5, seed), (3 * SAMPLE_RATE, 0)), SAMPLE_RATE)
    run_script("prepare_gtzan_data.py", "--source", tmp_path, "--data", tmp_path / "data")
    said = run_script("extract_features.py", "--data", tmp_path / "data", "--workers", 2).stderr
    for song in songs:
        assert f"{song}: 3.0 s left out as silence (50 dB below the loudest)\n" in said
        made = np.load(feature_path(tmp_path / "data", "mfcc", song.stem))
        assert made.shape == (N_MFCC, pytest.approx(5 * FRAMES_PER_SECOND, abs=3))


@settings(max_examples=25)
@given(st.floats(-20, 6), st.integers(0, 20))
def test_gain_changes_nothing(gain, seed):
    samples = rough(1.5, seed)
    louder = (samples * 10 ** (gain / 20)).astype(np.float32)
    for kind, array in song_features([samples]).items():
        found = song_features([louder])[kind].astype(float)
        np.testing.assert_allclose(found, array.astype(float), rtol=2e-3, atol=4e-3)


def test_features_do_depend_on_the_sound():
    one, two = (song_features([rough(1, seed)])["melspectrogram"].astype(float) for seed in (0, 1))
    assert np.abs(one - two).max() > 0.5


def test_mfcc_is_the_dct_of_the_log_mel():
    features = song_features([formula(2)])
    expected = dct(features["melspectrogram"].astype(np.float64), norm="ortho", axis=0)[:N_MFCC]
    np.testing.assert_allclose(features["mfcc"].astype(np.float64), expected, rtol=2e-3, atol=2e-2)


def test_golden_log_mel():
    """A change here is a change of every checkpoint's input: raise FEATURE_SETTINGS["version"] and train again."""
    found = song_features([formula()])["melspectrogram"].astype(float)
    golden = np.load(GOLDEN, allow_pickle=False).astype(float)
    assert found.shape == golden.shape == (128, 44)
    np.testing.assert_allclose(found, golden, atol=5e-3)


# ---------------------------------------------------------------- decoding


def test_wav_and_flac_decode_alike(tmp_path):
    sounds = []
    whole_numbers = (rough(2.5) * 32_768).astype(np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"song.{suffix}", whole_numbers, SAMPLE_RATE)
        sounds.append(decode(tmp_path / f"song.{suffix}"))
    np.testing.assert_array_equal(sounds[0].samples, sounds[1].samples)
    assert sounds[0].samples.dtype == np.float32
    assert sounds[0].notes == []
    np.testing.assert_array_equal(sounds[0].samples, whole_numbers / np.float32(32_768))


@pytest.mark.parametrize("suffix", ["ogg", "mp3", "aiff", "au"])
def test_other_formats_decode_to_much_the_same(tmp_path, suffix):
    samples = formula(3)
    soundfile.write(tmp_path / f"song.{suffix}", samples, SAMPLE_RATE)
    sound = decode(tmp_path / f"song.{suffix}")
    assert sound.seconds == pytest.approx(3, abs=0.1)
    assert np.corrcoef(sound.samples[:60_000], samples[:60_000])[0, 1] > 0.97


def test_stereo_is_the_mean_of_its_channels(tmp_path):
    left, right = formula(1.5), rough(1.5)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", (left + right) / 2, SAMPLE_RATE, subtype="FLOAT")
    stereo, mono = (decode(tmp_path / f"{name}.wav").samples for name in ("stereo", "mono"))
    np.testing.assert_allclose(stereo, mono, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 44_100, 96_000])
def test_any_rate_becomes_22050(tmp_path, rate):
    soundfile.write(tmp_path / "song.wav", formula(5, rate), rate, subtype="FLOAT")
    sound = decode(tmp_path / "song.wav")
    assert sound.rate == rate
    assert abs(len(sound.samples) - 5 * SAMPLE_RATE) <= 2
    if rate > SAMPLE_RATE:
        inner = slice(1000, -1000)
        assert np.corrcoef(sound.samples[inner], formula(5)[: len(sound.samples)][inner])[0, 1] > 0.99


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_part_of_a_song(tmp_path, suffix):
    soundfile.write(tmp_path / f"song.{suffix}", formula(6), SAMPLE_RATE)
    path = tmp_path / f"song.{suffix}"
    whole = decode(path).samples
    np.testing.assert_allclose(decode(path, 1, 2.5).samples, whole[SAMPLE_RATE : 3 * SAMPLE_RATE + SAMPLE_RATE // 2])
    np.testing.assert_allclose(decode(path, 5).samples, whole[5 * SAMPLE_RATE :])
    assert len(decode(path, 5, 100).samples) == SAMPLE_RATE
    with pytest.raises(UserError, match=f"{path.name}.*at least 0.1 s"):
        decode(path, 6.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_become_silence_with_a_note(tmp_path, render_tone, bad):
    path = render_tone(tmp_path / "bad.wav", seconds=1, bad=bad, subtype="FLOAT")
    sound = decode(path)
    assert np.isfinite(sound.samples).all()
    assert "1 samples" in sound.notes[0]
    good = decode(render_tone(tmp_path / "good.wav", seconds=1, subtype="FLOAT")).samples
    assert np.abs(sound.samples - good).max() < 0.6
    assert (np.abs(sound.samples - good) > 1e-4).sum() < 200


def test_nothing_but_nan_is_refused(tmp_path):
    soundfile.write(tmp_path / "nan.wav", np.full(SAMPLE_RATE, np.nan), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(UserError, match=r"nan\.wav.*NaN"):
        decode(tmp_path / "nan.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "aiff", "au"])
def test_a_truncated_file_is_used_as_far_as_it_goes(tmp_path, suffix):
    path = tmp_path / f"song.{suffix}"
    soundfile.write(path, rough(20), SAMPLE_RATE)
    whole = decode(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sound = decode(path)
    assert 6 < sound.seconds < 11
    if suffix == "flac":  # libsndfile mends the others' lengths without a word
        assert "breaks off after" in sound.notes[0]
    assert np.corrcoef(sound.samples[:44_100], whole.samples[:44_100])[0, 1] > 0.99


def unusable(folder: Path, what: str) -> Path:
    path = folder / f"{what} song.wav"
    content = {"empty": b"", "text": b"These are words, not music.\n" * 50, "header": b"RIFF\x00\x00"}
    if what in content:
        path.write_bytes(content[what])
    elif what == "folder":
        path.mkdir()
    elif what == "short":
        soundfile.write(path, formula(0.01), SAMPLE_RATE)
    elif what == "no samples":
        soundfile.write(path, formula(0), SAMPLE_RATE)
    return path


@pytest.mark.parametrize("what", ["missing", "empty", "text", "header", "folder", "short", "no samples"])
def test_what_is_no_song_is_refused_in_one_line(tmp_path, what):
    path = unusable(tmp_path, what)
    with pytest.raises(UserError) as caught:
        decode(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.count(str(path)) == 1
    assert len(message.splitlines()) == 1
