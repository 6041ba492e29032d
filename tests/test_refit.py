"""Epochs on training and validation songs after the schedule: what they change, and that nothing held out is lost."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK
from helpers import SIZES, copy_data, equal, log, one_line, stopped_in
from tiny_data import write_tiny_data

import create_cleaned_features
import evaluate
import extract_model_features
import train_bigru_cnn
import train_dpa_cnn
import train_ecas_cnn
import train_fusion
import verify_model_features
from checkpoints import load_checkpoint, save_checkpoint
from genre_detector import GenreDetector
from protocols import check_settings, is_scored, read_rounds

OPTIONS = "--epochs 4 --check-every 2 --width 0.05 --window 32 --share 1 --batch-size 8 --seed 3 --device cpu"
OPTIONS += " --graduate-at 2 --struggle-below 0 --threads 1"  # no rule is at work: all windows in all epochs
MEASURED = ("temperature", "min_confidence", "validation_accuracy", "label_conditioned_composite")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data", {"a": (6, 3, 1), "b": (6, 1, 1), "c": (9, 3, 1)})


def train(data: Path, models: Path, *options: str) -> int:
    return train_ecas_cnn.main(["--data", str(data), "--models", str(models), *OPTIONS.split(), *options])


def meta(models: Path) -> dict[str, Any]:
    return load_checkpoint(models / "ecas_cnn" / "model.safetensors", "")[1]


@pytest.fixture(scope="module")
def without(data, tmp_path_factory) -> Path:
    """A run without a refit."""
    models = tmp_path_factory.mktemp("without")
    assert train(data, models) == 0
    return models


@pytest.fixture(scope="module")
def refitted(data, tmp_path_factory) -> Path:
    """The same with three epochs of it."""
    models = tmp_path_factory.mktemp("refitted")
    assert train(data, models, "--refit", "3") == 0
    return models


def test_the_schedule_is_the_same_and_the_refit_trains_on_more_songs(without, refitted):
    assert log(refitted)[:4] == log(without)
    windows = np.diff([0, *(record["windows"] for record in log(refitted))])
    assert len(windows) == 7
    np.testing.assert_allclose(windows[4:] / windows[:4].mean(), 28 / 21, rtol=0.1)
    assert not any("val_accuracy" in record for record in log(refitted)[4:])
    assert not equal(refitted, without)


def test_what_is_measured_on_validation_songs_is_from_before(without, refitted):
    before, after = meta(without), meta(refitted)
    assert {key: after[key] for key in MEASURED} == {key: before[key] for key in MEASURED}
    assert (before["released_epoch"], after["released_epoch"]) == (4, 7)
    assert (before["refit"], after["refit"]) == (0, 3)


def test_the_average_at_the_end_is_released(refitted):
    last = load_checkpoint(refitted / "ecas_cnn" / "latest.safetensors", "")[0]
    for name, value in load_checkpoint(refitted / "ecas_cnn" / "model.safetensors", "")[0].items():
        assert not value.is_floating_point() or torch.equal(last[f"average.{name}"].half(), value)


@pytest.mark.parametrize("lengths", [(3,), (2, 3)])
def test_a_finished_training_can_be_refitted_and_again_for_longer(data, without, refitted, tmp_path, capsys, lengths):
    models = shutil.copytree(without, tmp_path / "models")
    for length in lengths:
        assert train(data, models, "--resume", "--refit", str(length)) == 0
        assert "21 training songs (28 in the refit)" in capsys.readouterr().out
    assert equal(models, refitted)
    assert log(models) == log(refitted)


@pytest.mark.parametrize("last", [0, 4, 5])  # long before the refit, in its first epoch, later
def test_a_refit_that_was_stopped_goes_on(data, refitted, tmp_path, monkeypatch, capsys, last):
    with stopped_in(last, monkeypatch):
        assert train(data, tmp_path, "--refit", "3") == 128 + signal.SIGTERM
    capsys.readouterr()
    for other in ([], ["--refit", "2"]):
        assert train(data, tmp_path, "--resume", *other) == 1
        assert "was made with --refit 3" in one_line(capsys)
    assert train(data, tmp_path, "--refit", "3") == 1
    assert "go on with --resume" in one_line(capsys)
    assert train(data, tmp_path, "--resume", "--refit", "3") == 0
    assert equal(tmp_path, refitted)
    assert log(tmp_path) == log(refitted)
    assert {key: meta(tmp_path)[key] for key in MEASURED} == {key: meta(refitted)[key] for key in MEASURED}


@pytest.mark.parametrize("refit", [None, "3", -1])
def test_a_checkpoint_whose_refit_is_no_number_of_epochs_is_refused(data, refitted, tmp_path, capsys, refit):
    models = shutil.copytree(refitted, tmp_path / "models")
    path = models / "ecas_cnn" / "latest.safetensors"
    tensors, said = load_checkpoint(path, "")
    save_checkpoint(path, tensors, said | {"refit": refit})
    assert train(data, models, "--resume", "--refit", "3") == 1
    assert f"was made with --refit {refit}" in one_line(capsys)


@pytest.mark.parametrize("option", ["--last", "--final-rate"])
def test_what_a_refit_can_not_go_on_from_is_bad_usage(capsys, option):
    with pytest.raises(SystemExit) as caught:
        train_ecas_cnn.main([option, "0", "--refit", "1"])
    assert caught.value.code == 2
    assert "--refit goes on" in capsys.readouterr().err


# ---------------------------------------------------------------- after the training


@pytest.fixture(scope="module")
def used(pipeline, tmp_path_factory) -> tuple[Path, Path]:
    """Data and models folder of the pipeline with its networks refitted, their features made anew."""
    folder = tmp_path_factory.mktemp("used")
    data, models = copy_data(pipeline, folder, features=True), shutil.copytree(pipeline.models, folder / "models")
    where = ["--data", str(data), "--models", str(models)]
    for script in (train_bigru_cnn, train_dpa_cnn, train_ecas_cnn):
        assert script.main([*where, *map(str, QUICK), "--resume", "--refit", "1"]) == 0
    assert extract_model_features.main(where) == 0
    assert create_cleaned_features.main(where[:2]) == 0
    return data, models


def test_one_network_that_knows_a_song_is_enough(pipeline, used, tmp_path):
    data, models = copy_data(pipeline, tmp_path, features=True), shutil.copytree(pipeline.models, tmp_path / "models")
    shutil.copy(used[1] / "ecas_cnn" / "model.safetensors", models / "ecas_cnn")
    assert extract_model_features.main(["--data", str(data), "--models", str(models), "--splits", "val"]) == 0
    provenance = json.loads((data / "fusion_features" / "provenance.json").read_text())
    assert provenance["held_out"]["val"] is False


def test_no_row_of_a_song_that_was_trained_on_counts_as_held_out(used, monkeypatch, capsys):
    data, _ = used
    monkeypatch.setattr(verify_model_features, "FEWEST", 1)
    provenance = json.loads((data / "fusion_features" / "provenance.json").read_text())
    assert provenance["held_out"] == {"train": False, "val": False, "test": True}
    assert verify_model_features.main(["--data", str(data)]) == 0
    assert "no held-out validation songs" in capsys.readouterr().out


def test_nothing_is_fitted_on_songs_that_were_trained_on(used, run_script, capsys):
    data, models = used
    where = ["--data", str(data), "--models", str(models)]
    assert train_fusion.main(where) == 0
    assert "know the validation songs" in capsys.readouterr().out
    fusion, said = train_fusion.load_fusion(models)
    assert (fusion.kind, fusion.temperature, said["min_confidence"]) == ("average", 1, 1)
    assert said["fitted_on"]["songs"] == 0

    results = models.parent / "results"
    assert evaluate.main([*where, "--results", str(results)]) == 0
    told = capsys.readouterr().out
    assert "1 more epochs on training and validation songs" in told
    assert "macro-F1, %" in told
    assert "validation, %" not in told
    for scores in json.loads((results / "evaluation.json").read_text())["models"].values():
        assert "test" in scores
        assert "val" not in scores
    with (results / "predictions.csv").open(newline="") as stream:
        assert {row["split"] for row in csv.DictReader(stream)} == {"test"}
    assert GenreDetector(models=models).knows == {"train", "val"}
    robustness = run_script("benchmarks/robustness.py", *where, "--results", results, check=False)
    assert robustness.returncode == 1
    assert "know the validation songs" in robustness.stderr


def test_rounds_of_refitted_networks_calibrate_their_fusion(mini_features, used, tmp_path, capsys):
    data, models = used
    runs, results = tmp_path / "runs", tmp_path / "results"
    training = " ".join(map(str, QUICK[:-2]))
    command = ["--data", str(mini_features[0]), "--protocol", "artist", "--rounds", "1", "--runs", str(runs)]
    command += ["--results", str(results), "--training"]
    assert evaluate.main([*command, f"{training} --refit 1"]) == 0
    told = capsys.readouterr().out
    assert "4 epochs; " in told
    assert "1 more epochs on training and validation songs" in told
    assert not (runs / "artist_0" / "data" / "fusion_features" / "selector.npy").exists()  # nothing would read it
    pool = read_rounds([runs / "artist_0"])
    assert pool.validation == {}
    assert {name: values["refit"] for name, values in pool.settings.items()} == dict.fromkeys(SIZES, 1)
    assert evaluate.main([*command, training]) == 1
    assert "other settings" in one_line(capsys)
    check_settings([runs / "artist_0"], [*training.split(), "--refit", "1"])
    assert is_scored(runs / "artist_0")
    another = runs / "artist_0" / "models" / "ecas_cnn" / "model.safetensors"
    another.write_bytes(b"another")
    assert not is_scored(runs / "artist_0")

    assert train_fusion.main(["--data", str(data), "--models", str(models), "--rounds", str(runs / "artist_0")]) == 0
    assert "songs of cross-validation rounds" in capsys.readouterr().out
    assert train_fusion.load_fusion(models)[1]["fitted_on"]["songs"] > 0
    metadata = runs / "artist_0" / "data" / "metadata.json"
    value = json.loads(metadata.read_text())
    value["split"]["method"] = "random"
    metadata.write_text(json.dumps(value))
    assert train_fusion.main(["--data", str(data), "--models", str(models), "--rounds", str(runs / "artist_0")]) == 1
    assert "its networks know artists of its test songs" in capsys.readouterr().err
