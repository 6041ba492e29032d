"""The hyper-dynamic rules as pure functions: settings, windows of an epoch, graduation, weights, rates.

Nothing here knows of networks or files; ``hyper_dynamic.Trainer`` applies the rules.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from common import number
from predict import window_hop, window_starts

if TYPE_CHECKING:
    import torch

# ---------------------------------------------------------------- settings

MAX_WINDOW = 10_000  # frames, four minutes: what a checkpoint may ask for
MAX_EPOCHS = 1_000_000


def setting(default: Any, text: str, low: float = 0, high: float = math.inf) -> Any:
    """A field that is an option of the training scripts, refused outside its range."""
    return field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run; every field but the first two is an option of the script.

    Label smoothing is that of Szegedy et al. (CVPR 2016), weight decay that of AdamW (Loshchilov & Hutter, ICLR 2019).
    """

    name: str  # of the folder below models/
    features: str  # "melspectrogram" or "mfcc"
    epochs: int = setting(70, "length of the schedule; there is no early stopping", 1, MAX_EPOCHS)
    batch_size: int = setting(16, "windows a step", low=2)
    learning_rate: float = setting(2e-3, "highest learning rate")
    final_rate: float = setting(1.0, "part of the highest learning rate that it ends at; 1: it stays there", high=1)
    average: float = setting(0.998, "decay a step of the running average of the weights", high=0.9999)
    weight_decay: float = setting(0.2, "AdamW's weight decay, on weight matrices only")
    window: int = setting(260, "frames a window, 43 a second; the published method has 130", 1, MAX_WINDOW)
    short_windows: float = setting(0.0, "first part of the schedule, trained on windows of half the length", high=1)
    overlap: float = setting(0.5, "overlap of neighbouring windows, as part of a window", high=0.95)
    share: float = setting(0.25, "part of all windows an epoch draws; the published method has 1", low=0.001, high=1)
    label_smoothing: float = setting(0.1, "part of each target spread over all classes", high=1)
    mixup: float = setting(0.3, "alpha of mixup; 0 switches it off", high=100)
    last: int = setting(1, "1: release the weights of the schedule's end; 0: of the check with the least loss", high=1)
    fast: int = setting(1, "1: train convolutions in the fastest way known for the processor, such as bfloat16", high=1)
    width: float = setting(1.0, "factor on the channels of the network", 0.01, 10)
    rhythm: int = setting(0, "1: the network also hears each window's tempogram", high=1)
    graduate_at: float = setting(0.85, "smoothed validation accuracy at which a class graduates")
    demote_margin: float = setting(0.10, "a graduate this far below --graduate-at trains in full again", high=1)
    smoothing: float = setting(0.6, "weight of the past in the smoothed accuracy", high=1)
    rehearsal_rate: float = setting(0.25, "part of its windows that a graduated class still trains on", 0.01, 1)
    struggle_below: float = setting(0.5, "smoothed accuracy below which a class struggles", high=1)
    struggle_after: float = setting(0.17, "part of the schedule before a class can struggle", high=1)
    struggling_overlap: float = setting(0.75, "overlap of training windows of a struggling class", high=0.95)
    weight_strength: float = setting(1.0, "how far class weights follow the classes' errors; 0: not at all", high=20)
    consolidation: float = setting(0.2, "last part of the schedule, in which every class trains in full", high=1)
    check_every: int = setting(3, "epochs between two looks at the validation songs", low=1)


ADDED = {"rhythm": 0}  # settings that checkpoints of older versions don't name, as these had them
OPTIONS = {option.name: option for option in fields(Settings) if option.metadata}


def flag(name: str) -> str:
    """The option of a setting: ``--batch-size``."""
    return "--" + name.replace("_", "-")


def option_type(name: str) -> Callable[[str], Any]:
    """The argparse type of a setting, which refuses what is outside its range."""
    return number(type(OPTIONS[name].default), OPTIONS[name].metadata["low"], OPTIONS[name].metadata["high"])


def add_option(parser: ArgumentParser, name: str, default: Any) -> None:
    """Give a command line the option of a setting, refused outside its range."""
    text = OPTIONS[name].metadata["help"]
    parser.add_argument(flag(name), type=option_type(name), default=default, metavar="N", help=text)


# ---------------------------------------------------------------- windows of an epoch


def draw_windows(
    lengths: Sequence[int],
    overlaps: Sequence[float],
    rates: Sequence[float],
    window: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of one epoch, shuffled.

    Each song's windows lie on a grid of its own overlap that starts at a random frame of the first hop; ``rate`` of
    them are drawn without replacement, rounded at random so that the mean is exact. A window flush with the end is
    always among those to draw from, one flush with the start seldom: the first hop of a song is heard less often.

    Returns
    -------
    song, start : int64 (windows,)
    """
    song, start = [], []
    for index, (frames, overlap, rate) in enumerate(zip(lengths, overlaps, rates, strict=True)):
        starts = window_starts(frames, window, overlap, int(rng.integers(window_hop(window, overlap))))
        count = min(len(starts), int(rate * len(starts) + rng.random()))
        song.append(np.full(count, index, dtype=np.int64))
        start.append(rng.choice(starts, count, replace=False))
    order = rng.permutation(sum(map(len, song)))
    return np.concatenate(song)[order], np.concatenate(start)[order]


# ---------------------------------------------------------------- the rules


@dataclass(frozen=True)
class ClassState:
    """What the loop knows of one class."""

    accuracy: float | None = None  # smoothed over checks; None before the first, or without validation songs
    graduated: bool = False
    struggling: bool = False
    weight: float = 1.0  # of the class in the loss


def smooth(past: float | None, measured: float | None, smoothing: float) -> float | None:
    """Exponential mean from 0 on, so that neither one lucky check nor the noise of 15 songs decides.

    None is no measurement: a class without validation songs.
    """
    return past if measured is None else smoothing * (past or 0.0) + (1 - smoothing) * measured


def is_graduated(accuracy: float | None, graduated: bool, rules: Settings) -> bool:
    """A class graduates at the threshold and is demoted once it is below the threshold less the margin."""
    return accuracy is not None and accuracy >= rules.graduate_at - (rules.demote_margin if graduated else 0.0)


def is_struggling(accuracy: float | None, epoch: int, rules: Settings) -> bool:
    """Below the threshold, once the schedule is far enough on for that to mean something."""
    return accuracy is not None and accuracy < rules.struggle_below and epoch >= rules.struggle_after * rules.epochs


def class_weights(accuracies: Sequence[float | None], songs: Sequence[int], rules: Settings) -> list[float]:
    """Loss weights between 0.5 and 2 with mean 1, larger for classes with more errors and for rare classes.

    ``songs`` are the training songs of each class, not all 0. A class of unknown accuracy counts as average, one that
    has no training songs gets the weight 1 and no say in the others'.
    """
    trained = np.flatnonzero(songs)
    seen = [accuracies[index] for index in trained]
    known = [accuracy for accuracy in seen if accuracy is not None]
    average = sum(known) / max(1, len(known))
    lacks = np.array([0.0 if accuracy is None else average - accuracy for accuracy in seen])
    rarity = np.asarray(songs)[trained] ** -0.5
    raw = np.exp(rules.weight_strength * lacks) * rarity / rarity.mean()
    low, high = -raw.max(), 2.0  # the shift that makes the bounded weights' mean 1 lies between these
    for _ in range(60):
        shift = (low + high) / 2
        low, high = (shift, high) if np.clip(raw + shift, 0.5, 2).mean() < 1 else (low, shift)
    weights = np.ones(len(songs))
    weights[trained] = np.clip(raw + high, 0.5, 2)
    return weights.tolist()


def update_classes(
    states: Sequence[ClassState], measured: Sequence[float | None], songs: Sequence[int], epoch: int, rules: Settings
) -> list[ClassState]:
    """Every class's state after a check: per-class validation accuracy ``measured`` at ``epoch``.

    All sequences are as long as there are classes; ``songs`` are each class's training songs.
    """
    accuracies = [smooth(state.accuracy, now, rules.smoothing) for state, now in zip(states, measured, strict=True)]
    return [
        ClassState(
            accuracy,
            is_graduated(accuracy, state.graduated, rules),
            is_struggling(accuracy, epoch, rules),
            weight,
        )
        for state, accuracy, weight in zip(states, accuracies, class_weights(accuracies, songs, rules), strict=True)
    ]


def in_consolidation(epoch: int, rules: Settings) -> bool:
    return rules.consolidation > 0 and epoch >= rules.epochs * (1 - rules.consolidation)


def training_rate(state: ClassState, epoch: int, rules: Settings) -> float:
    """Part of its windows that a class trains on in an epoch."""
    rehearses = state.graduated and not in_consolidation(epoch, rules)
    return rules.share * (rules.rehearsal_rate if rehearses else 1.0)


def training_window(epoch: int, rules: Settings) -> int:
    """Frames: half the window early on, where twice as many short windows teach more for the same work."""
    return max(1, rules.window // 2) if epoch < rules.short_windows * rules.epochs else rules.window


def training_overlap(state: ClassState, rules: Settings) -> float:
    return rules.struggling_overlap if state.struggling else rules.overlap


def learning_rate(done: float, peak: float, final: float) -> float:
    """One cycle over the schedule (``done`` from 0 to 1): up linearly for 15 % of it, then on a half cosine down to
    ``final`` of the peak, where it stays (Smith & Topin 2018, with a final rate of choice).
    """
    done = min(done, 1.0)
    fall = (1 + math.cos(math.pi * (done - 0.15) / 0.85)) / 2
    return peak * (done / 0.15 if done < 0.15 else final + (1 - final) * fall)


# ---------------------------------------------------------------- what an epoch trains on


class Schedule:
    """Which windows an epoch trains on: here as the rules say; a rival in a benchmark overrides what differs.

    A run that was stopped goes on as it would have if ``draw`` follows from its arguments alone.
    """

    def __init__(self, rules: Settings):
        self.rules = rules

    def draw(
        self,
        lengths: Sequence[int],
        labels: np.ndarray,
        classes: Sequence[ClassState],
        epoch: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Song and first frame of each window, int64 (windows,), and the factor on its loss, float (windows,) or None.

        ``lengths`` are the frames of the training songs, ``labels`` their classes, int64 (songs,).
        """
        states = [classes[label] for label in labels]
        overlaps = [training_overlap(state, self.rules) for state in states]
        rates = [training_rate(state, epoch, self.rules) for state in states]
        return *draw_windows(lengths, overlaps, rates, training_window(epoch, self.rules), rng), None

    def learn(self, song: np.ndarray, start: np.ndarray, losses: torch.Tensor) -> None:
        """Hear of the windows of a step and their losses, float32 (windows,), without any factor."""
