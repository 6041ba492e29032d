"""The schedules that hyper-dynamic training is compared with: what differs in settings, and what each draws.

With the same recipe all of them share network, starting weights, optimiser, learning-rate cycle, augmentation and
averaging with it, and the loss weights of rare classes; what differs is which windows an epoch trains on, for how many
epochs, and in "published", as in hyper-dynamic, loss weights that follow the errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from predict import window_hop
from rules import ClassState, Schedule, Settings, draw_windows, training_window

if TYPE_CHECKING:
    import torch

# No class is treated apart from the others: none graduates, none struggles, the weights don't follow the errors.
ALIKE = {"graduate_at": 2.0, "struggle_below": 0.0, "weight_strength": 0.0}
PLAIN = ALIKE | {"share": 1.0, "short_windows": 0.0}
# A class is dropped for good at its first check of 85 % or more; no smoothing, no rehearsal, no consolidation.
PUBLISHED = {
    "share": 1.0,
    "short_windows": 0.0,
    "smoothing": 0.0,
    "rehearsal_rate": 0.0,
    "demote_margin": 1.0,
    "consolidation": 0.0,
    "check_every": 1,
}
CHECKS = 60  # looks at the validation songs in a long schedule whose rules don't need them

# In the order in which they are started
SCHEDULES = {
    "hyper-dynamic": "the recipe of the training script",
    "plain-300": "every window in every epoch of the long schedule",
    "published": "the same, but a graduated class is dropped for good, and struggling ones get more windows and weight",
    "infobatch": "plain-300, but every other window of less than average loss is left out (Qin et al., ICLR 2024)",
    "plain-short": "as many windows as hyper-dynamic, at random from all, over the short schedule",
    "random-drop": "hyper-dynamic's windows of each epoch, long or short, but at random from all songs",
}
AT_EQUAL_BUDGET = ("plain-short", "random-drop")  # spend what hyper-dynamic spent with the same seed, and wait for it
SHORT = ("hyper-dynamic", *AT_EQUAL_BUDGET)


def settings_of(schedule: str, script: Settings, epochs: int, recipe: dict[str, Any]) -> Settings:
    """The settings of a schedule.

    ``script`` are those of the training script and ``recipe`` what differs from them. ``epochs`` is the length of the
    long schedules, whatever the recipe says; the short ones have the script's, scaled by epochs / 300.
    """
    long = dataclasses.replace(script, **recipe | {"epochs": epochs})
    short = dataclasses.replace(script, **{"epochs": max(2, round(script.epochs * epochs / 300))} | recipe)
    rare_checks = {"check_every": max(1, epochs // CHECKS)}
    return {
        "hyper-dynamic": short,
        "plain-300": dataclasses.replace(long, **PLAIN, **rare_checks),
        "published": dataclasses.replace(long, **PUBLISHED),
        "infobatch": dataclasses.replace(long, **PLAIN, **rare_checks),
        "plain-short": dataclasses.replace(short, **PLAIN),
        "random-drop": dataclasses.replace(short, **ALIKE),
    }[schedule]


class Counted(Schedule):
    """A given number of windows in each epoch, at random from the windows of all songs alike."""

    def __init__(self, rules: Settings, counts: Sequence[int]):
        super().__init__(rules)
        self.counts = counts

    def draw(
        self,
        lengths: Sequence[int],
        labels: np.ndarray,
        classes: Sequence[ClassState],
        epoch: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, None]:
        count, drawn = self.counts[epoch], []
        while sum(len(song) for song, _ in drawn) < count:  # once, unless more are wanted than there are
            every = [self.rules.overlap] * len(lengths), [1.0] * len(lengths)
            drawn.append(draw_windows(lengths, *every, training_window(epoch, self.rules), rng))
        if not drawn:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), None
        song, start = (np.concatenate(arrays)[:count] for arrays in zip(*drawn, strict=True))
        return song, start, None


class InfoBatch(Schedule):
    """Leaves out a part of the windows whose last loss is below the mean; the others of them count for more.

    After Qin et al., InfoBatch, ICLR 2024, with its part and its end. A window is known by its place in its song, in
    hops from the start: the grid starts anew at random in every epoch, and the last window of a song may share its
    place with the one before. Its loss is that of training, unweighted; with mixup it is that of a mixture, so that
    what is easy is known less well than in the original.
    """

    def __init__(self, rules: Settings, part: float = 0.5, until: float = 0.875):
        super().__init__(rules)
        self.part, self.until = part, until
        self.losses: dict[tuple[int, int], float] = {}

    def _places(self, song: np.ndarray, start: np.ndarray) -> list[tuple[int, int]]:
        return list(
            zip(song.tolist(), (start // window_hop(self.rules.window, self.rules.overlap)).tolist(), strict=True)
        )

    def draw(
        self,
        lengths: Sequence[int],
        labels: np.ndarray,
        classes: Sequence[ClassState],
        epoch: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        song, start, _ = super().draw(lengths, labels, classes, epoch, rng)
        if not self.losses or epoch >= self.until * self.rules.epochs:
            return song, start, None
        mean = sum(self.losses.values()) / len(self.losses)
        easy = np.array([self.losses.get(place, mean) < mean for place in self._places(song, start)])
        kept = ~easy | (rng.random(len(song)) >= self.part)
        return song[kept], start[kept], np.where(easy, 1 / (1 - self.part), 1.0)[kept]

    def learn(self, song: np.ndarray, start: np.ndarray, losses: torch.Tensor) -> None:
        self.losses.update(zip(self._places(song, start), losses.tolist(), strict=True))


def schedule_of(schedule: str, settings: Settings, overlap: float, counts: Sequence[int]) -> Schedule:
    """What a schedule draws.

    ``overlap`` is that of the windows of the long schedules; a struggling class gets twice as many. ``counts`` are the
    windows of each epoch of hyper-dynamic's run of the same seed.
    """
    if schedule == "hyper-dynamic":
        return Schedule(settings)
    if schedule == "random-drop":
        return Counted(settings, counts)
    if schedule == "plain-short":
        ends = np.linspace(0, sum(counts), settings.epochs + 1).round().astype(int)
        return Counted(settings, np.diff(ends).tolist())
    rules = dataclasses.replace(settings, overlap=overlap, struggling_overlap=(1 + overlap) / 2)
    return InfoBatch(rules) if schedule == "infobatch" else Schedule(rules)
