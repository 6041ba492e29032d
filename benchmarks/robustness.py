"""Accuracy on validation songs as they are, and recoded, filtered, clipped, noisy: does gain or mastering decide?

Every copy is written as a file and goes through the detector's own path. Validation songs fitted temperatures and
steered the training's rules, so the first row is no held-out accuracy; what counts is how far the others fall.
Networks with a --refit, which were trained on these songs, are refused.

Reads   data/metadata.json, data/processed/val_files.txt, the songs, models/
Writes  benchmarks/results/robustness.csv    songs right, by condition and model, with seed and versions

Example
    python benchmarks/robustness.py --seed 0
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import write_rows

from catalogue import read_catalogue
from common import UserError, argument_parser, command, format_table, path_name, progress, versions_line
from decoding import SAMPLE_RATE, decode


@dataclass
class Copy:
    """How a changed song is stored."""

    sound: np.ndarray  # float32 (samples,) or (samples, channels)
    rate: int = SAMPLE_RATE  # Hz
    suffix: str = ".flac"
    options: dict[str, Any] = field(default_factory=dict)


def equalised(sound: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A sound filtered with a gain in dB by frequency in Hz."""
    spectrum = np.fft.rfft(sound)
    hertz = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
    return np.fft.irfft(spectrum * 10 ** (gain(np.maximum(hertz, 20)) / 20), len(sound)).astype(np.float32)


def resampled(sound: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    return soxr.resample(sound, SAMPLE_RATE, rate)


def tilt(decibels: float) -> Callable[[np.ndarray], np.ndarray]:
    """A gain that rises by so much from 100 Hz to 10 kHz."""
    return lambda hertz: decibels * np.clip(np.log10(hertz / 100) / 2, 0, 1) - decibels / 2


def noisy(sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White noise 20 dB below the song."""
    return sound + rng.normal(0, sound.std() / 10, len(sound)).astype(np.float32)


def faded(sound: np.ndarray) -> np.ndarray:
    """Five seconds in and five out."""
    ramp = np.minimum(1, np.arange(len(sound)) / (5 * SAMPLE_RATE)).astype(np.float32)
    return sound * ramp * ramp[::-1]


def wide(sound: np.ndarray) -> np.ndarray:
    """Two channels, the right one 10 ms late: their mean has notches."""
    late = SAMPLE_RATE // 100
    return np.stack([sound, np.concatenate([np.zeros(late, np.float32), sound[:-late]])], axis=1)


CONDITIONS: dict[str, Callable[[np.ndarray, np.random.Generator], Copy]] = {
    "as they are": lambda x, rng: Copy(x),
    "20 dB quieter": lambda x, rng: Copy(0.1 * x, options={"subtype": "PCM_24"}),
    "mp3, lowest quality": lambda x, rng: Copy(x, suffix=".mp3", options={"compression_level": 0.99}),
    "Vorbis, lowest quality": lambda x, rng: Copy(x, suffix=".ogg", options={"compression_level": 1.0}),
    "sampled at 16 kHz": lambda x, rng: Copy(resampled(x, 16_000), 16_000),
    "sampled at 8 kHz": lambda x, rng: Copy(resampled(x, 8_000), 8_000),
    "nothing below 200 Hz": lambda x, rng: Copy(equalised(x, lambda hertz: np.where(hertz < 200, -60, 0))),
    "treble 12 dB up": lambda x, rng: Copy(equalised(x, tilt(12))),
    "bass 12 dB up": lambda x, rng: Copy(equalised(x, tilt(-12))),
    "clipped 12 dB above full scale": lambda x, rng: Copy(np.clip(4 * x / np.abs(x).max(), -1, 1)),
    "noise 20 dB below": lambda x, rng: Copy(noisy(x, rng)),
    "faded in and out": lambda x, rng: Copy(faded(x)),
    "2 s of silence before and after": lambda x, rng: Copy(np.pad(x, 2 * SAMPLE_RATE)),
    "stereo, right 10 ms late": lambda x, rng: Copy(wide(x)),
    "4 % faster": lambda x, rng: Copy(resampled(x, round(SAMPLE_RATE / 1.04))),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data", "--models", "--seed", "--device", "--threads")
    parser.add_argument("--results", type=path_name, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args(argv)

    import soundfile
    import torch

    from genre_detector import GenreDetector

    torch.set_num_threads(args.threads)
    catalogue = read_catalogue(args.data)
    detector = GenreDetector(models=args.models, device=args.device)
    if "val" in detector.knows:
        raise UserError("the networks know the validation songs: name some from before a --refit with --models")
    tracks = catalogue.splits["val"]
    labels = catalogue.labels(tracks)
    right: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index in progress(range(len(tracks)), "validation songs"):
            sound = decode(catalogue.audio_path(tracks[index])).samples
            for number, (name, change) in enumerate(CONDITIONS.items()):
                copy = change(sound, np.random.default_rng([args.seed, index, number]))
                path = Path(folder) / f"song{copy.suffix}"
                soundfile.write(path, copy.sound, copy.rate, **copy.options)
                for model, outputs in detector.analyse(path).song.items():
                    counts = right.setdefault(name, {}).setdefault(model, 0)
                    right[name][model] = counts + int(outputs.argmax() == labels[index])
    models = list(right["as they are"])
    same = {"songs": str(len(tracks)), "seed": str(args.seed), "versions": versions_line()}
    table = [{"condition": name, **same, **{m: str(by[m]) for m in models}} for name, by in right.items()]
    write_rows(args.results / "robustness.csv", ["condition", "songs", *models, "seed", "versions"], table)
    rows = [[name, *(f"{100 * by[m] / len(tracks):.1f}" for m in models)] for name, by in right.items()]
    print(format_table((f"{len(tracks)} validation songs, accuracy in %", *models), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
