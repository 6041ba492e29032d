"""Figures and pictures of what classifiers say: intervals, calibration, comparisons, confusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common import complain
from files import whole_file
from predict import log_softmax

RARE = 15  # songs: classes with fewer in the data set are also left out of a second figure
BOOTSTRAPS = 10_000
DRAWS = 1000
CALIBRATION_BINS = 10
RIGHT_WHEN_CONFIDENT = 0.9  # part of the confident answers to held-out songs
LEAST_DRAWN = 5  # songs in a bin of the reliability picture
LONGEST_LABEL = 40  # characters of a genre's name in a picture


def rare_genres(songs: Mapping[str, int]) -> list[str]:
    """Those of fewer than ``RARE`` songs in the data set, without which figures are given too; none if all are.

    A genre without any song is left out of nothing.
    """
    rare = [genre for genre, count in songs.items() if 0 < count < RARE]
    return rare if any(count >= RARE for count in songs.values()) else []


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[tuple[int, float, float]]:
    """For each of ten equal bins of top probability that has songs: how many, their mean top probability, part right.

    ``probabilities`` are (songs, classes), ``labels`` class numbers (songs,).
    """
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((top * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    masks = [which == number for number in np.unique(which)]
    return [(int(mask.sum()), float(top[mask].mean()), float(right[mask].mean())) for mask in masks]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error of the top probability, in ten equal bins, part of 1 (Guo et al., ICML 2017).

    ``probabilities`` are (songs, classes), ``labels`` class numbers (songs,).
    """
    return sum(count * abs(said - was) for count, said, was in reliability(probabilities, labels)) / len(labels)


def perfect_calibration_error(probabilities: np.ndarray, tracks: np.ndarray) -> tuple[float, float]:
    """The calibration error of labels drawn with these probabilities (answers, classes): its mean and 95 % quantile.

    That much of it is chance, and more the fewer songs there are (Broecker & Smith, Weather and Forecasting 2007).
    Answers about one of the ``tracks`` (answers,) are easy or hard together: one number a song, drawn from 0 to 1, is
    below the top probability of those that are right.
    """
    names, song = np.unique(tracks, return_inverse=True)
    rng, said, top = np.random.default_rng(0), probabilities.argmax(axis=1), probabilities.max(axis=1)
    draws = [np.where(rng.random(len(names))[song] < top, said, -1) for _ in range(DRAWS)]
    errors = [calibration_error(probabilities, labels) for labels in draws]
    return float(np.mean(errors)), float(np.quantile(errors, 0.95))


def fit_temperature(scores: np.ndarray, labels: np.ndarray, doubt: float | None = None) -> float:
    """The temperature at which songs' scores (songs, classes) have the least log-loss (Guo et al., ICML 2017).

    ``labels`` are class numbers (songs,). A doubt, by default one part in songs + 2 of each target, is spread over the
    other classes (Platt, 1999, "Probabilistic Outputs for Support Vector Machines"): a few songs, all of them right,
    are no certainty.
    """
    from scipy.optimize import minimize_scalar

    songs, classes = scores.shape
    doubt = 1 / (songs + 2) if doubt is None else doubt
    targets = np.full((songs, classes), doubt / (classes - 1))
    targets[np.arange(songs), labels] = 1 - doubt

    def loss(log_temperature: float) -> float:
        return -float((targets * log_softmax(scores, math.exp(log_temperature))).sum()) / songs

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def confidence_threshold(outputs: np.ndarray, labels: np.ndarray, wanted: float = RIGHT_WHEN_CONFIDENT) -> float:
    """The least top probability that counts as confident.

    Parameters
    ----------
    outputs : calibrated log-probabilities (songs, classes) of songs that the networks were not trained on
    labels : int (songs,)
    wanted : the songs whose top probability reaches the threshold are right at least this often, by the lower end of
        the 95 % interval: with few songs what they show may be luck (Geifman & El-Yaniv, NeurIPS 2017)

    Returns
    -------
    The lowest such threshold, or 1, which no answer reaches, where there is none.
    """
    top, right = np.exp(outputs).max(axis=1), outputs.argmax(axis=1) == labels
    counts = ((threshold, right[top >= threshold]) for threshold in np.unique(top))
    good = [threshold for threshold, answers in counts if wilson_interval(answers.sum(), len(answers))[0] >= wanted]
    return float(min(good, default=1.0))


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); of no songs 0 to 1."""
    from scipy.stats import binomtest

    if count == 0:
        return 0.0, 1.0
    low, high = binomtest(int(right), int(count)).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


def class_accuracies(right: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    """Part of each class's songs that are right; None for a class without songs."""
    return [float(right[labels == c].mean()) if (labels == c).any() else None for c in range(classes)]


def song_figures(
    probabilities: np.ndarray, labels: np.ndarray, genres: Sequence[str], tracks: np.ndarray | None = None
) -> dict[str, Any]:
    """Figures of one model over songs, all of them parts of 1.

    Parameters
    ----------
    probabilities : float (songs, classes)
    labels : int (songs,)
    tracks : names (songs,) where several answers are about one song
    """
    from sklearn.metrics import confusion_matrix, f1_score

    said = probabilities.argmax(axis=1)
    right = said == labels
    return {
        "songs": len(labels),
        "song_accuracy": float(right.mean()),
        "wilson_95": wilson_interval(int(right.sum()), len(right)),
        "macro_f1": float(f1_score(labels, said, average="macro", labels=np.unique(labels), zero_division=0)),
        "expected_calibration_error": calibration_error(probabilities, labels),
        "perfect_calibration_error": perfect_calibration_error(
            probabilities, np.arange(len(labels)) if tracks is None else tracks
        ),
        "recall": dict(zip(genres, class_accuracies(right, labels, len(genres)), strict=True)),
        "confusion": confusion_matrix(labels, said, labels=range(len(genres))).tolist(),
    }


def right_among(right: np.ndarray, among: np.ndarray) -> dict[str, int]:
    """How many answers are ``among`` those counted, and how many of these are right; both bool (songs,)."""
    return {"answers": int(among.sum()), "right": int((right & among).sum())}


def accuracy_without(confusion: Any, genres: Sequence[str], rare: Sequence[str]) -> float | None:
    """Accuracy over the songs of the other genres, if there are any, from a confusion matrix (true genres down)."""
    keep = np.flatnonzero([genre not in rare for genre in genres])
    matrix = np.asarray(confusion)[keep]
    return float(matrix[np.arange(len(keep)), keep].sum() / matrix.sum()) if matrix.sum() else None


def bootstrap_difference(first: np.ndarray, second: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two accuracies on the same songs (paired bootstrap, Efron 1979).

    ``first`` and ``second`` are bool (answers,); answers of one group, such as an artist, are drawn together. A single
    group says nothing of others: -1 to 1.
    """
    names, which = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return -1.0, 1.0
    gain = np.bincount(which, first.astype(float) - second, len(names))
    count = np.bincount(which, minlength=len(names))
    rng, gains = np.random.default_rng(0), []
    for _ in range(BOOTSTRAPS):  # one at a time: all at once, many groups need gigabytes
        drawn = rng.integers(len(names), size=len(names))
        gains.append(gain[drawn].sum() / count[drawn].sum())
    low, high = np.quantile(gains, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Two-sided exact p-value of two classifiers' being right equally often on the same songs (McNemar 1947)."""
    from scipy.stats import binomtest

    only = int((first & ~second).sum()), int((~first & second).sum())
    return float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0


# ---------------------------------------------------------------- pictures


@contextmanager
def picture(path: Path, *shape: int, mark: str = "music_genre_fusion", **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (``pyplot.subplots``), written to ``path`` as a PNG at the end of the block, whole.

    ``mark`` is in the file's first 200 bytes. Characters that the font lacks are boxes, which one line on stderr tells.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a genre's name is no formula
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield figure, axes
        with whole_file(path) as temporary, warnings.catch_warnings(record=True) as told:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": mark})
        if any("Glyph" in str(warning.message) for warning in told):
            complain(f"{path}: boxes stand for characters that the font lacks")
    finally:
        pyplot.close(figure)


def draw_confusion(matrix: np.ndarray, genres: list[str], title: str, path: Path, counted: str = "songs") -> None:
    """A picture of a confusion matrix: true genres down, predicted across, counts of ``counted`` in the cells."""
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [genre if len(genre) <= LONGEST_LABEL else genre[: LONGEST_LABEL - 1] + "…" for genre in genres]
    size = max(2.5 + 0.5 * len(names), 1 + 0.1 * len(title)) + 0.1 * max(0, max(map(len, names)) - 10)  # inches
    with picture(path, figsize=(size, size)) as (figure, axes):
        axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(
            range(len(names)), [f"{n} ({count})" for n, count in zip(names, matrix.sum(axis=1), strict=True)]
        )
        axes.set(xlabel="predicted", ylabel=f"true ({counted})")
        figure.suptitle(title)
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if parts[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour)


def draw_reliability(outputs: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    """A reliability picture: how often answers were right against how likely they were said to be, a line a model.

    ``outputs`` are probabilities (songs, classes) and labels (songs,) by model; dots grow with the songs in a bin,
    and bins of fewer than five are left out.
    """
    with picture(path, figsize=(5.5, 5.5)) as (_, axes):
        axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
        for name, (probabilities, labels) in outputs.items():
            full = np.array([row for row in reliability(probabilities, labels) if row[0] >= LEAST_DRAWN]).reshape(-1, 3)
            counts, said, was = full.T
            (line,) = axes.plot(said, was, label=f"{name} ({100 * calibration_error(probabilities, labels):.1f} %)")
            axes.scatter(said, was, 4 + 300 * counts / len(labels), color=line.get_color(), alpha=0.7, clip_on=False)
        axes.set(
            xlim=(0, 1), ylim=(0, 1), xlabel="top probability", ylabel="part of the songs that were right", title=title
        )
        axes.legend(title="calibration error", loc="lower right")
        axes.set_aspect("equal")
