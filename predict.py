"""From features to probabilities: the one path of validation, evaluation and detection. Label-free throughout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn

INFERENCE_BATCH = 10  # windows: a song of 30 s has 9. More is hardly faster, and memory is mostly activations


def window_hop(window: int, overlap: float) -> int:
    """Frames between the starts of neighbouring windows, at least 1."""
    return max(1, round(window * (1 - overlap)))


def window_starts(frames: int, window: int, overlap: float, offset: int = 0) -> np.ndarray:
    """First frames of the windows of a song, int64 (windows,).

    A window every hop from ``offset`` on, and a last one flush with the end if the hops leave a rest. A song
    shorter than a window gives one start, 0.
    """
    last = max(0, frames - window)
    starts = np.arange(min(offset, last), last + 1, window_hop(window, overlap), dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def network_outputs(
    network: nn.Module, songs: Sequence[np.ndarray], window: int, overlap: float, limit: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What a network says of the windows of songs: the one path of validation, evaluation and detection.

    Parameters
    ----------
    songs : features, float16 (bins, frames) each
    window : frames; a shorter song is padded with zeros, the song's mean
    limit : at most so many windows a song, evenly spaced (None: all)

    Returns
    -------
    For each song log-probabilities float32 (windows, classes) and features float32 (windows, dimensions).
    """
    import torch

    device = next(network.parameters()).device
    network.eval()
    pieces, counts = [], []
    for song in songs:
        starts = window_starts(song.shape[1], window, overlap)
        if limit is not None and len(starts) > limit:
            starts = starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]
        padded = song if song.shape[1] >= window else np.pad(song, ((0, 0), (0, window - song.shape[1])))
        pieces += [padded[:, start : start + window] for start in starts]
        counts.append(len(starts))
    log_probabilities, features = [], []
    with torch.inference_mode():
        for first in range(0, len(pieces), INFERENCE_BATCH):
            batch = torch.from_numpy(np.stack(pieces[first : first + INFERENCE_BATCH])).to(device).float()
            logits, feature = network(batch)
            log_probabilities.append(logits.log_softmax(1).cpu().numpy())
            features.append(feature.cpu().numpy())
    ends = np.cumsum(counts)[:-1]
    both = (np.split(np.concatenate(arrays), ends) for arrays in (log_probabilities, features))
    return list(zip(*both, strict=True))


def log_softmax(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities from scores (..., classes) divided by a temperature (Guo et al., ICML 2017)."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


def is_confident(top: Any, threshold: float) -> Any:
    """Whether top probabilities reach a threshold. None reaches 1: that stands for "no answer is"."""
    return (top >= threshold) & (threshold < 1)
