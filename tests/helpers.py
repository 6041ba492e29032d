"""What several test files use: copies of the pipeline's folders, what scripts said and left, ways to stop them."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pipeline

from checkpoints import load_checkpoint
from files import write_json
from genre_detector import Prediction
from hyper_dynamic import Trainer

SIZES = {"cnn_bigru": 256, "dpa_cnn": 512, "ecas_cnn": 128}  # of the networks' features
GENRES = ["blues", "classical", "country", "disco", "hiphop", "jazz", "metal", "pop", "reggae", "rock"]


def predictions(results: Path) -> list[dict[str, str]]:
    """A row a test song: track, genre, and what each model said of it."""
    songs: dict[str, dict[str, str]] = {}
    with (results / "predictions.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            likely = {genre: float(row[f"p_{genre}"]) for genre in GENRES}
            assert sum(likely.values()) == pytest.approx(1, abs=1e-4)
            if row["split"] == "test":
                song = songs.setdefault(row["track"], {"track": row["track"], "genre": row["genre"]})
                song[row["model"]] = max(likely, key=lambda genre: likely[genre])
    return list(songs.values())


def copy_data(pipeline: Pipeline, target: Path, features: bool = False) -> Path:
    """A copy of the data folder that a test may change; without the per-song features unless asked for."""
    ignore = None if features else shutil.ignore_patterns("melspectrogram_normalized", "mfcc")
    return shutil.copytree(pipeline.data, target / "data", ignore=ignore)


def edit_metadata(data: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what metadata.json holds."""
    value = json.loads((data / "metadata.json").read_text())
    change(value)
    write_json(data / "metadata.json", value)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def weights(models: Path) -> dict[str, torch.Tensor]:
    """What a training of the ECAS-CNN released."""
    return load_checkpoint(models / "ecas_cnn" / "model.safetensors", "")[0]


def equal(one: Path, two: Path) -> bool:
    """Whether two of them released the same, bit for bit."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def log(models: Path) -> list[dict[str, Any]]:
    """Its lines an epoch, without the time they took."""
    records = [json.loads(line) for line in (models / "ecas_cnn" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@contextmanager
def no_larger_files(size: int) -> Iterator[None]:
    """Writing fails in this process beyond ``size`` bytes a file, as on a disk that is full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def stopped_in(last: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training in this process hears SIGTERM as an epoch begins, and ends after its first step."""
    honest = Trainer._train_epoch

    def stopped(trainer: Trainer, epoch: int) -> dict[str, Any]:
        if epoch == last:
            trainer.stop(signal.SIGTERM)
        return honest(trainer, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", stopped)
        yield


def prediction(**known: Any) -> Prediction:
    """An answer of which a test says what it needs."""
    blank = {
        "path": "song.wav",
        "duration_s": 60.0,
        "windows": 3,
        "genre": "a",
        "probabilities": {"a": 0.6, "b": 0.4},
        "notes": [],
        "confident": True,
        "sections": [],
        "size": 0,
        "mtime": 0.0,
        "sounds_like": None,
    }
    return Prediction(**blank | known)
