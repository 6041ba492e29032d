"""Tell noise, tones, silence and speech from music, by a song's log-mel alone: no network has a say in it.

Noise and speech get one measured rule each. ``benchmarks/speech_rule.py`` made the numbers of the second.
"""

from __future__ import annotations

import numpy as np

from extract_features import FRAMES_PER_SECOND

# Frame correlation below which a sound is no music. Measured on the 558 training and validation songs: 0.71 or more;
# of their 8,370 parts of 2 s, 11 have less than 0.55. White, pink and brown noise, swelling, fading or with pauses too,
# hum, steady sines and silence have 0.52 or less, speech 0.66 or more.
STEADY_BELOW = 0.55
LEAST_SECONDS = 2.0  # of less than this only silence is told from music
LEAST_FRAMES = round(LEAST_SECONDS * FRAMES_PER_SECOND)

BLOCK = 430  # frames, 10 s: the longest piece that is looked at at once
BASS, LOW, VOICE = slice(0, 3), slice(0, 12), slice(4, 86)  # bands to 90 Hz, to 330 Hz, 130 to 3600 Hz
HOLD = 16  # frames: 0.37 s
BEATS = slice(round(0.25 * FRAMES_PER_SECOND), round(2 * FRAMES_PER_SECOND))  # lags in frames

# Made by benchmarks/speech_rule.py: a weight for each of the descriptors, and what is added to their sum. Of 558 songs
# 2 (hiphop) were called speech by fits that had not seen them; of 137 talks in 30 other voices none was missed.
WEIGHTS = (10.16, -10.94, -11.13, -17.60, -6.68, -4.23)
OFFSET = 7.66


def sounds_like(log_mel: np.ndarray, seconds: float) -> str | None:
    """What a song (a normalised log-mel (128, frames)) is if no music: "noise" (also a tone or silence) or "speech".

    Speech over music counts as music.
    """
    correlation = frame_correlation(log_mel)
    if correlation == 0 or (correlation < STEADY_BELOW and seconds >= LEAST_SECONDS):
        return "noise"
    sound = trimmed(log_mel)
    return "speech" if sound.shape[1] >= LEAST_FRAMES and speech_score(sound) > 0 else None


def frame_correlation(log_mel: np.ndarray) -> float:
    """Correlation of neighbouring frames of a normalised log-mel (128, frames), over all bands; 0 for silence.

    Of noise it is 0.50, because frames overlap by three quarters; what lasts or returns makes it larger. It is the
    lesser of two: that of the whole, and that of the spectrum's shape, without each frame's level, where it is loud. In
    the second, noise that fades, swells or pauses is noise.
    """
    level = log_mel.mean(axis=0, dtype=np.float32)
    loud = log_mel[VOICE].mean(axis=0, dtype=np.float32) >= 0
    pairs = loud[1:] & loud[:-1]
    lasts = pairs.any()
    whole, shape = np.zeros(2), np.zeros(2)
    for band in log_mel:  # one at a time: a long song in single precision is large
        values = band.astype(np.float32)
        whole += values[1:] @ values[:-1], values @ values
        if lasts:
            values -= level
            values -= values[loud].mean()
            shape += (values[1:] * values[:-1])[pairs].mean(), np.square(values[loud]).mean()
    return float(min((products / squares for products, squares in (whole, shape) if squares), default=0.0))


def trimmed(log_mel: np.ndarray) -> np.ndarray:
    """A log-mel (128, frames) without the quiet before and after the sound."""
    loudness = log_mel[VOICE].mean(axis=0, dtype=np.float32)
    loud = np.flatnonzero(loudness >= (loudness.min() + loudness.max()) / 2)
    return log_mel[:, loud[0] : loud[-1] + 1]


def speech_score(log_mel: np.ndarray) -> float:
    """Above 0 for speech, below for music: a weighted sum of descriptors, each the mean over blocks of 10 s.

    ``log_mel`` is normalised, (128, frames), what ``trimmed`` leaves: at least LEAST_FRAMES.
    """
    return float(song_descriptors(log_mel) @ WEIGHTS) + OFFSET


def song_descriptors(log_mel: np.ndarray) -> np.ndarray:
    """Mean of ``descriptors``, float64 (6,), over the blocks that a normalised log-mel (128, frames) is cut into.

    Blocks are spread evenly and overlap a little; those quieter throughout than the song's mean are left out.
    """
    last = max(0, log_mel.shape[1] - BLOCK)
    starts = np.linspace(0, last, 1 + -(-last // BLOCK)).round().astype(int)
    blocks = (log_mel[:, start : start + BLOCK].astype(np.float32) for start in starts)
    return np.mean([descriptors(block) for block in blocks if block[VOICE].mean(axis=0).max() >= 0], axis=0)


def descriptors(block: np.ndarray) -> np.ndarray:
    """What tells speech from music in a piece of sound (log-mel float32 (128, frames)), float64 (6,).

    0  abrupt ends: variation of how much the bands fall from frame to frame. Syllables break off, notes fade.
    1  beat: the highest autocorrelation of the onsets at lags of 0.25 to 2 s (Foote & Uchihashi, ICME 2001)
    2  the same of the onsets below 330 Hz
    3  hold: correlation of frames 0.37 s apart
    4  peaks: how far the loudest twentieth stands out. Speech is about equally loud between its pauses, a variant of
       Scheirer and Slaney's share of quiet frames (ICASSP 1997).
    5  bass: logarithm of how much the sound below 90 Hz, where there is no voice, varies
    """
    block = block - block.mean(axis=1, keepdims=True)
    block /= max(float(np.sqrt(np.square(block[VOICE]).mean())), 1e-3)
    voice, change = block[VOICE], np.diff(block, axis=1)
    fall = np.maximum(-change[VOICE], 0).mean(axis=0)
    loudness = voice.mean(axis=0)
    return np.array(
        [
            fall.std() / max(fall.mean(), 1e-6),
            _beat(np.maximum(change[VOICE], 0).mean(axis=0)),
            _beat(np.maximum(change[LOW], 0).mean(axis=0)),
            (voice[:, :-HOLD] * voice[:, HOLD:]).mean(),
            np.percentile(loudness, 95) / max(loudness.std(), 1e-6),
            np.log(block[BASS].mean(axis=0).std() + 0.05),
        ],
        dtype=np.float64,
    )


def _beat(onsets: np.ndarray) -> float:
    """Highest autocorrelation of a curve (frames,) at the lags of a beat, 0.25 s to 2 s or half the curve."""
    curve, size = onsets - onsets.mean(), len(onsets)
    products = np.fft.irfft(np.abs(np.fft.rfft(curve, 2 * size)) ** 2, 2 * size)[:size]
    return float((products / (size - np.arange(size)))[: size // 2][BEATS].max() * size / max(products[0], 1e-9))
