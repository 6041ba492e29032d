"""Find songs that are in a data set twice: bit for bit, or as another coding, level or excerpt of one recording.

GTZAN holds about 50 exact repeats (Sturm 2013, arXiv 1306.1461). A song on both sides of a split is a leak, so
``prepare_gtzan_data.py`` keeps the repeats found here together.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common import progress
from decoding import SAMPLE_RATE
from extract_features import FRAMES_PER_SECOND, mel_power

POOL = 5  # mel frames a fingerprint frame
FRAME_RATE = FRAMES_PER_SECOND / POOL  # fingerprint frames a second: 8.6
BANDS = 32
RANGE_DB = 60.0  # what lies further below the song's loudest cell is noise
HIGH_PASS = 17  # frames (2 s): slower changes are the loudness curve, which unlike songs share
PIECE_SECONDS = 120.0  # a longer song is compared in pieces of that, which overlap
MIN_SECONDS = 5.0  # less common sound proves nothing
MIN_SHARE = 1 / 3  # of the shorter song that must overlap
FULL_SECONDS = 30.0  # of overlap that count in full
# On 656 songs of GTZAN the 32 pairs above 0.24 have one artist and title each (but for a typing error) in Sturm's
# index; the first pair of different songs follows at 0.20.
DEFAULT_THRESHOLD = 0.22
BLOCK_BYTES = 1 << 25


@dataclass(frozen=True)
class Repeat:
    """Two songs that hold the same sound; ``first`` and ``second`` number them in the order given."""

    first: int
    second: int
    exact: bool
    score: float


def sound_digest(samples: np.ndarray) -> str:
    """SHA-256 of mono float samples as 16-bit numbers, so that wav, au and flac of one sound agree."""
    return hashlib.sha256(np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2").tobytes()).hexdigest()


def fingerprints(samples: np.ndarray) -> list[np.ndarray]:
    """What of a song survives coding, level and equalisation: float32 (32, frames) for each of its pieces.

    8.6 frames a second of coarse log-mel bands, each without its slow changes and at one scale, less their common
    loudness; every frame has length 1 (or 0 in silence), so that the mean dot product of two aligned pieces is their
    mean cosine.

    Parameters
    ----------
    samples : float32 (n,), mono at 22,050 Hz
    """
    size = round(PIECE_SECONDS * SAMPLE_RATE)
    step = round((PIECE_SECONDS - FULL_SECONDS) * SAMPLE_RATE)  # at most: what lasts FULL_SECONDS is in one piece whole
    surplus = max(0, len(samples) - size)
    firsts = np.linspace(0, surplus, 1 + math.ceil(surplus / step), dtype=int)
    return [_fingerprint(samples[first : first + size]) for first in firsts]


def _fingerprint(samples: np.ndarray) -> np.ndarray:
    from scipy.ndimage import convolve1d, uniform_filter1d

    mel = mel_power([samples])
    bands = mel.reshape(BANDS, -1, mel.shape[1]).sum(axis=1)
    decibels = 10 * np.log10(np.maximum(bands, np.finfo(np.float32).tiny))
    np.maximum(decibels, decibels.max() - RANGE_DB, out=decibels)
    window = np.hanning(2 * POOL + 1)[1:-1]  # wider than the step: a shift of half a step still matches
    smooth = convolve1d(decibels, window / window.sum(), mode="constant", output=np.float64)[:, ::POOL]
    smooth -= uniform_filter1d(smooth, HIGH_PASS, axis=1, mode="nearest")
    smooth -= smooth.mean(axis=0)
    smooth /= smooth.std(axis=1, keepdims=True) + 1e-3
    return (smooth / (np.linalg.norm(smooth, axis=0) + 1e-3)).astype(np.float32)


def similarity(prints: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Best score of every pair of fingerprints over all time shifts, one block of rows at a time.

    The score is the mean cosine of the overlapping frames, times sqrt(overlap / 30 s) where less than 30 s overlap:
    so much more easily does a short stretch match by chance.

    Yields
    ------
    (row, scores): float32 (songs - row,), the scores of song ``row`` with itself and all songs after it; -inf
    where no overlap is long enough.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    lengths = np.array([song.shape[1] for song in prints])
    longest = int(lengths.max())
    size = next_fast_len(2 * longest, real=True)
    padded = np.zeros((len(prints), BANDS, longest), dtype=np.float32)
    for row, song in zip(padded, prints, strict=True):
        row[:, : song.shape[1]] = song
    spectra = np.ascontiguousarray(rfft(padded, size, axis=2).transpose(2, 0, 1))  # (frequency, song, band)
    lags = np.arange(size)
    lags = np.where(lags < longest, lags, lags - size).astype(np.float32)[:, None, None]
    block = max(1, BLOCK_BYTES // (4 * size * len(prints)))
    for first in range(0, len(prints), block):
        rows = slice(first, first + block)
        cross = irfft(spectra[:, rows].conj() @ spectra[:, first:].transpose(0, 2, 1), size, axis=0)
        one, other = lengths[rows, None].astype(np.float32), lengths[None, first:].astype(np.float32)
        overlap = np.minimum(one, other - lags) - np.maximum(0, -lags)
        cross[overlap < np.maximum(np.minimum(one, other) * MIN_SHARE, MIN_SECONDS * FRAME_RATE)] = -np.inf
        np.maximum(overlap, 1, out=overlap)
        cross /= np.maximum(overlap, np.sqrt(overlap * np.float32(FULL_SECONDS * FRAME_RATE)))
        for number, scores in enumerate(cross.max(axis=0)):
            yield first + number, scores[number:]


def find_repeats(digests: Sequence[str], prints: Sequence[Sequence[np.ndarray]], threshold: float) -> list[Repeat]:
    """All pairs of songs with the same sound digest, or with pieces whose fingerprints score at least ``threshold``.

    At a threshold of 1 only exact repeats are looked for.
    """
    found: list[Repeat] = []
    places: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        found += [Repeat(earlier, index, True, 1.0) for earlier in places.setdefault(digest, [])]
        places[digest].append(index)
    if threshold < 1 and prints:
        songs = [number for number, pieces in enumerate(prints) for _ in pieces]
        best: dict[tuple[int, int], float] = {}
        for piece, scores in progress(similarity([*itertools.chain(*prints)]), "comparing songs", len(songs)):
            for offset in np.flatnonzero(scores >= threshold):
                pair = songs[piece], songs[piece + offset]
                if digests[pair[0]] != digests[pair[1]]:
                    best[pair] = max(best.get(pair, threshold), float(scores[offset]))
        found += [Repeat(first, second, False, round(score, 3)) for (first, second), score in best.items()]
    return sorted(found, key=lambda pair: (pair.first, pair.second))
