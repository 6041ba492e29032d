"""Classify songs by genre with the trained networks.

Reads   the songs (wav, flac, ogg, opus, mp3, au, aiff), models/*/model.safetensors
Writes  nothing; text or, with --json, one JSON array on standard output

Probabilities are calibrated on validation songs and sum to 100 %. Exit code 0 when every song was classified,
1 when at least one couldn't be (each is named in one line on stderr), 2 for bad usage.

Examples
    python genre_detector.py song.mp3
    python genre_detector.py --model dpa_cnn --top-k 3 *.ogg
    python genre_detector.py --json album/*.flac > genres.json

From Python
    from genre_detector import GenreDetector
    detector = GenreDetector()
    print(detector.predict("song.mp3").genre)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, argument_parser, command, complain, file_sha256, positive_int
from extract_features import SoundReader, song_features

FUSION = "fusion"
MODELS = (FUSION, "dpa_cnn", "ecas_cnn", "cnn_bigru")
BAR_WIDTH = 32


@dataclass(frozen=True)
class Analysis:
    """What every loaded model says of one song: calibrated log-probabilities, float64."""

    seconds: float
    notes: list[str]  # what had to be mended to decode the song
    song: dict[str, np.ndarray]  # model -> (classes,)
    windows: dict[str, np.ndarray]  # model -> (windows, classes)


@dataclass(frozen=True)
class Prediction:
    """The answer for one song; ``probabilities`` sum to 1 and keep the order of the classes."""

    path: str
    duration_s: float
    windows: int
    genre: str
    probabilities: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "duration_s": round(self.duration_s, 3),
            "windows": self.windows,
            "genre": self.genre,
            "probabilities": self.probabilities,
            **({"notes": self.notes} if self.notes else {}),
        }


class GenreDetector:
    """The frozen networks, loaded once. ``predict`` sees no labels and keeps no state between songs.

    Parameters
    ----------
    model : "fusion", or the name of one network
    models : folder of checkpoints; by default the one beside this file
    device : "auto", "cpu", "cuda" or "mps"

    Raises
    ------
    UserError if a checkpoint is absent, broken, made with other feature settings, or not what the fusion was
    fitted on.
    """

    def __init__(self, model: str = FUSION, models: str | Path | None = None, device: str = "auto"):
        from extract_model_features import MEMBERS, load_members
        from train_fusion import load_fusion

        folder = Path(models) if models is not None else Path(__file__).resolve().parent / "models"
        if model not in (FUSION, *MEMBERS):
            raise UserError(f"no model {model!r}: choose from {', '.join((FUSION, *MEMBERS))}")
        self.model = model
        self._members = load_members(folder, MEMBERS if model == FUSION else [model], device)
        self._fusion = None
        if model == FUSION:
            self._fusion, meta = load_fusion(folder)
            for member in self._members:
                if meta["members"].get(member.name) != file_sha256(folder / member.name / "model.safetensors"):
                    raise UserError(f"the fusion was fitted on another {member.name}: run train_fusion.py again")
        self.meta = self._members[0].meta
        self.genres: list[str] = self._members[0].genres
        self.device = str(next(self._members[0].network.parameters()).device)

    def analyse(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> Analysis:
        """What every loaded model says of a song, and of each of its windows. Raises UserError as ``SoundReader``."""
        from extract_model_features import fusion_inputs

        sound = SoundReader(Path(path), start, duration)
        features = song_features(sound)
        outputs = [member.outputs([features])[0] for member in self._members]
        windows = {member.name: rows for member, (rows, _) in zip(self._members, outputs, strict=True)}
        song = {name: rows.mean(axis=0) for name, rows in windows.items()}
        song = {name: row - np.logaddexp.reduce(row) for name, row in song.items()}
        if self._fusion is not None:
            rows, vectors = fusion_inputs(outputs)
            windows[FUSION] = self._fusion(rows, vectors)
            song[FUSION] = self._fusion(rows.mean(axis=0)[None], vectors.mean(axis=0)[None])[0]
        return Analysis(sound.seconds, sound.notes, song, windows)

    def predict(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> Prediction:
        """The genre of a song, or of a part of it (seconds). Raises UserError as ``SoundReader``."""
        analysis = self.analyse(path, start, duration)
        log_probabilities = analysis.song[self.model]
        probabilities = np.exp(log_probabilities)
        probabilities /= probabilities.sum()
        return Prediction(
            str(path),
            analysis.seconds,
            len(analysis.windows[self.model]),
            self.genres[int(log_probabilities.argmax())],
            dict(zip(self.genres, probabilities.tolist(), strict=True)),
            analysis.notes,
        )


def predictions(detector: GenreDetector, songs: Sequence[str]) -> Iterator[tuple[str, Prediction | str]]:
    """Each song's prediction, or the reason why there is none."""
    for song in songs:
        try:
            yield song, detector.predict(song)
        except UserError as error:
            yield song, str(error)


def as_text(prediction: Prediction, top_k: int) -> str:
    """The answer for people: file, duration, the likeliest genres with bars."""
    ranked = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:top_k]
    width = max(len(genre) for genre, _ in ranked)
    minutes, seconds = divmod(prediction.duration_s, 60)
    lines = [
        f"File:      {prediction.path}",
        f"Duration:  {int(minutes)}:{seconds:04.1f}  ({prediction.windows} windows)",
        *(f"Note:      {note}" for note in prediction.notes),
        f"Genre:     {prediction.genre}",
        "",
        *(f"  {genre:{width}}  {100 * p:5.1f} %  {'#' * round(BAR_WIDTH * p)}".rstrip() for genre, p in ranked),
        "",
    ]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _parser() -> argparse.ArgumentParser:
    parser = argument_parser(__doc__, "--device", "--threads", "--json")
    parser.add_argument("songs", nargs="+", metavar="SONG", help="sound file")
    parser.add_argument("--model", choices=MODELS, default=FUSION, help="which model answers")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of checkpoints; if not given, the one here")
    parser.add_argument("--top-k", type=positive_int, default=5, metavar="K", help="genres shown a song")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    import torch

    torch.set_num_threads(args.threads)
    detector = GenreDetector(args.model, args.models, args.device)
    if not args.json:
        print(f"Music genre detection with {args.model} on {detector.device}")
        print("=" * 64)
    records: list[dict[str, Any]] = []
    failed = 0
    for song, answer in predictions(detector, args.songs):
        if isinstance(answer, str):
            failed += 1
            complain(answer)
            records.append({"path": song, "error": answer})
        elif args.json:
            records.append(answer.as_json())
        else:
            print(as_text(answer, args.top_k), flush=True)
    if args.json:
        print(json.dumps(records, indent=1))
    elif len(args.songs) > 1:
        print(f"{len(args.songs) - failed} of {len(args.songs)} songs classified")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
