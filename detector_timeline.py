"""Which part of a song is what: sections from the answers to its windows, and a picture of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from decoding import SAMPLE_RATE
from extract_features import FRAMES_PER_SECOND
from figures import picture
from predict import log_softmax

MARK = "music_genre_fusion timeline"  # by which its pictures are known again
SMOOTHING = np.array([1, 2, 3, 2, 1]) / 9  # of neighbouring windows: 3 s apart, so about 15 s decide
DARKEST = -2  # level in a picture
PICTURE_COLUMNS = 2000  # of a log-mel in a picture; more frames are averaged


@dataclass(frozen=True)
class Section:
    """A part of a song in which one genre stays the likeliest; seconds from the start of the file."""

    start_s: float
    end_s: float
    genre: str
    probability: float  # of that genre, from the mean of the section's log-probabilities


def smoothed(log_probabilities: np.ndarray) -> np.ndarray:
    """Log-probabilities (windows, classes) of each window with its neighbours; the same shape, each row sums to 1."""
    padded = np.pad(log_probabilities, ((2, 2), (0, 0)), mode="edge")
    return log_softmax(np.lib.stride_tricks.sliding_window_view(padded, len(SMOOTHING), axis=0) @ SMOOTHING)


def window_borders(starts: np.ndarray, window: int, sounding: np.ndarray, start_s: float, seconds: float) -> np.ndarray:
    """Where each window's own time begins, and the end, in seconds of the file: float64 (windows + 1,).

    Overlapping windows part half-way between their middles, or where sound begins again after silence there.
    ``starts`` and ``window`` are in frames of the features, ``sounding`` says which frames of the sound these are, bool
    (frames of the sound,), ``start_s`` is where in the file its first frame lies, ``seconds`` the length that was read.
    """
    frames = np.flatnonzero(sounding)
    middles = starts + window / 2
    inner = np.interp((middles[1:] + middles[:-1]) / 2, np.arange(len(frames)), frames)
    for resumed in np.flatnonzero(np.diff(frames) > 1) + 1:
        place = int(np.searchsorted(middles, resumed))
        if 0 < place < len(middles):
            inner[place - 1] = frames[resumed]
    return start_s + np.concatenate([[0.0], np.minimum(inner / FRAMES_PER_SECOND, seconds), [seconds]])


def sections(log_probabilities: np.ndarray, borders: np.ndarray, genres: Sequence[str]) -> list[Section]:
    """The sections of a song, without gaps, from its windows' log-probabilities (windows, classes) and borders."""
    smooth = smoothed(log_probabilities)
    best = smooth.argmax(axis=1)
    firsts = np.flatnonzero(np.diff(best, prepend=-1))
    found = []
    for first, last in zip(firsts, [*firsts[1:], len(best)], strict=True):
        probability = float(np.exp(log_softmax(smooth[first:last].mean(axis=0))[best[first]]))
        found.append(Section(float(borders[first]), float(borders[last]), genres[best[first]], probability))
    return found


def draw(
    log_mel: np.ndarray,
    sounding: np.ndarray,
    log_probabilities: np.ndarray,
    borders: np.ndarray,
    genres: Sequence[str],
    path: Path,
) -> None:
    """Write a PNG: each genre's smoothed probability over time above the log-mel (128, frames) of the same time.

    ``sounding`` says which frames of the sound the log-mel has; the others are silence, and black.
    """
    if not sounding.all():
        full = np.full((len(log_mel), len(sounding)), DARKEST, dtype=log_mel.dtype)
        full[:, sounding] = log_mel
        log_mel = full
    probabilities = np.exp(smoothed(log_probabilities))
    order = probabilities.mean(axis=0).argsort()[::-1]  # the likeliest lies at the bottom
    factor = max(1, -(-log_mel.shape[1] // PICTURE_COLUMNS))
    edges = np.arange(0, log_mel.shape[1], factor)
    mels = np.add.reduceat(log_mel, edges, axis=1, dtype=np.float32) / np.diff(edges, append=log_mel.shape[1])
    minutes = borders[-1] - borders[0] > 180  # a long song counts in minutes
    times = borders / (60 if minutes else 1)

    with picture(path, 2, mark=MARK, figsize=(10, 6), sharex=True, height_ratios=(3, 2)) as (_, (upper, lower)):
        from matplotlib import colormaps

        colours = [colormaps["tab20"](index % 20) for index in range(len(genres))]
        steps = np.repeat(probabilities[:, order], 2, axis=0).T
        upper.stackplot(
            np.repeat(times, 2)[1:-1], steps, labels=[genres[i] for i in order], colors=[colours[i] for i in order]
        )
        upper.set_ylim(0, 1)
        upper.set_ylabel("probability")
        upper.legend(loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, frameon=False)
        lower.imshow(
            mels,
            origin="lower",
            aspect="auto",
            extent=(times[0], times[-1], 0, len(log_mel)),
            cmap="magma",
            vmin=DARKEST,
            vmax=3,
        )
        lower.set_yticks([0, 64, 128], ["0", "2 kHz", f"{SAMPLE_RATE / 2000:.0f} kHz"])
        lower.set_ylabel("mel band")
        lower.set_xlabel("time, min" if minutes else "time, s")
        lower.set_xlim(times[0], times[-1])
