"""A data folder of made-up features, for what needs a training but no sound."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from catalogue import SPLITS, Catalogue, Song, split_sums, write_catalogue
from extract_features import BINS, STORED_SETTINGS, feature_path
from files import write_array, write_json


def write_tiny_data(data: Path, songs: Mapping[str, tuple[int, int, int]], frames: int = 80) -> Path:
    """Write a data folder; ``songs`` are each genre's numbers of training, validation and test songs."""
    rng = np.random.default_rng(0)
    entries: dict[str, Song] = {}
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for genre, counts in songs.items():
        shape = {kind: rng.normal(0, 1, (bins, 1)) for kind, bins in BINS.items()}  # what its songs have in common
        for split, count in zip(SPLITS, counts, strict=True):
            for number in range(count):
                track = f"{genre}.{split}{number}"
                digest = hashlib.sha256(track.encode()).hexdigest()
                file = f"{genre}/{track}.wav"
                entries[track] = Song(track, file, f"raw/genres/{file}", genre, "", frames / 43, 22_050, digest, "ok")
                splits[split].append(track)
                for kind, bins in BINS.items():
                    feature = shape[kind] + rng.normal(0, 1, (bins, frames))
                    write_array(feature_path(data, kind, track), feature.astype(np.float16))
    split = {"name": "made_up", "method": "random", "seed": 0, "fold": None, "sha256": split_sums(entries, splits)}
    write_catalogue(Catalogue(sorted(songs), entries, splits, split, data), {})
    index = {"settings": STORED_SETTINGS, "songs": {track: song.sha256 for track, song in entries.items()}}
    write_json(data / "processed" / "features.json", index)
    return data
