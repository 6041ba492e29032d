"""Data that doesn't fit is refused by the script that would use it: features, splits, files of the fusion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK
from helpers import copy_data, edit_metadata, one_line

import create_cleaned_features
import evaluate
import extract_features
import extract_model_features
import train_ecas_cnn
import train_fusion
import verify_model_features
from catalogue import read_catalogue

# ---------------------------------------------------------------- features


def extract(data: Path, capsys) -> dict[str, str]:
    """Run the extraction; its table."""
    assert extract_features.main(["--data", str(data), "--workers", "1"]) == 0
    return dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[2:])


def test_extraction_makes_only_what_is_missing(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path, features=True)
    assert extract(data, capsys)["made now"] == "0"
    missing = data / "processed" / "mfcc" / "jazz.00002.npy"
    before = missing.read_bytes()
    missing.unlink()
    table = extract(data, capsys)
    assert (table["made now"], table["there before"], table["failed"]) == ("1", "69", "0")
    assert missing.read_bytes() == before


def test_a_file_where_a_folder_should_be_is_named(tmp_path, capsys):
    (tmp_path / "data").write_text("")
    assert extract_features.main(["--data", str(tmp_path / "data")]) == 1
    assert f"{tmp_path / 'data'}: not a folder" in one_line(capsys)


def test_a_complaint_has_an_end(tmp_path, capsys):
    assert extract_features.main(["--data", str(tmp_path / ("x" * 100_000))]) == 1
    assert len(one_line(capsys)) < 11_000


@pytest.mark.parametrize("gone", [True, False])
def test_a_song_that_is_gone_or_changed_since_it_was_checked_is_named(pipeline, tmp_path, capsys, gone):
    data = copy_data(pipeline, tmp_path)
    catalogue = read_catalogue(data)
    track, other = catalogue.splits["test"][:2]
    path = str(tmp_path / "gone.wav" if gone else catalogue.audio_path(other))
    edit_metadata(data, lambda value: [song.update(path=path) for song in value["songs"] if song["track"] == track])
    (data / "processed" / "features.json").unlink()
    assert extract_features.main(["--data", str(data), "--workers", "1"]) == 1
    problem = "no such file" if gone else "has changed since it was checked"
    assert one_line(capsys).endswith(f": {path}: {problem}: run prepare_gtzan_data.py again; skipped")
    assert track not in json.loads((data / "processed" / "features.json").read_text())["songs"]


def test_features_of_other_settings_are_refused(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    path = data / "processed" / "features.json"
    path.write_text(path.read_text().replace('"n_fft": 2048', '"n_fft": 1024'))
    assert extract_features.main(["--data", str(data)]) == 1
    line = one_line(capsys)
    assert "n_fft" in line
    assert "extract_features.py --force" in line


def test_features_from_before_silence_was_left_out_are_refused(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    path = data / "processed" / "features.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"settings": extract_features.FEATURE_SETTINGS}))
    assert extract_features.main(["--data", str(data)]) == 1
    assert "other feature settings (silence): run extract_features.py --force" in one_line(capsys)


def test_absent_features_are_asked_for_without_force(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    (data / "processed" / "features.json").unlink()
    assert extract_model_features.main(["--data", str(data), "--models", str(pipeline.models)]) == 1
    line = one_line(capsys)
    assert "extract_features.py" in line
    assert "--force" not in line


def test_features_of_another_song_are_refused(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path, features=True)
    path = data / "processed" / "features.json"
    index = json.loads(path.read_text())
    index["songs"][read_catalogue(data).splits["train"][0]] = "0" * 64
    path.write_text(json.dumps(index))
    assert extract_model_features.main(["--data", str(data), "--models", str(pipeline.models)]) == 1
    assert "run extract_features.py again" in one_line(capsys)


@pytest.mark.parametrize("script", [create_cleaned_features, verify_model_features, train_fusion])
@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "7",
        "{",
        '{"sizes": {"a": 1.5}, "split": {}, "members": {}, "settings": {}, "held_out": {"val": 1}}',
        '{"split": {}, "members": [], "settings": {}, "sizes": {}, "held_out": {"val": true}}',
    ],
)
def test_a_damaged_provenance_is_refused(pipeline, tmp_path, capsys, script, text):
    data = copy_data(pipeline, tmp_path)
    path = data / "fusion_features" / "provenance.json"
    assert path.exists()
    path.write_text(text)
    models = [] if script is not train_fusion else ["--models", str(pipeline.models)]
    assert script.main(["--data", str(data), *models]) == 1
    line = one_line(capsys)
    assert "provenance.json" in line
    assert "run extract_model_features.py again" in line


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("script", [evaluate, extract_model_features, train_fusion])
def test_another_split_is_refused(pipeline, tmp_path, capsys, script):
    data = copy_data(pipeline, tmp_path)
    edit_metadata(data, lambda value: value["split"].update(seed=99))
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    args = ["--data", str(data), "--models", str(models)]
    if script is evaluate:
        args += ["--results", str(tmp_path / "results")]
    assert script.main(args) == 1
    line = one_line(capsys)
    assert "split" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("script", [evaluate, extract_model_features, train_ecas_cnn])
def test_songs_that_have_changed_places_are_refused(pipeline, tmp_path, capsys, script):
    """A song that was trained on must not be tested under another song's name."""
    data = copy_data(pipeline, tmp_path, features=True)
    splits = read_catalogue(data).splits
    one, other = splits["train"][0], splits["test"][0]

    def swap(value: dict[str, Any]) -> None:
        songs = {song["track"]: song for song in value["songs"]}
        for name in ("sha256", "path"):
            songs[one][name], songs[other][name] = songs[other][name], songs[one][name]

    edit_metadata(data, swap)
    assert extract_features.main(["--data", str(data), "--workers", "1"]) == 0
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    options = [*map(str, QUICK), "--resume"] if script is train_ecas_cnn else []
    options += ["--results", str(tmp_path / "results")] if script is evaluate else []
    assert script.main(["--data", str(data), "--models", str(models), *options]) == 1
    line = one_line(capsys)
    assert "have changed since" in line or "have other contents" in line
    if script is evaluate:  # which knows songs by their names
        seen = [str(data / "processed" / f"{name}_files.txt") for name in ("train", "val")]
        assert script.main(["--data", str(data), "--models", str(models), *options, "--seen", *seen]) == 1
        assert "have other contents" in one_line(capsys)
    assert not (tmp_path / "results").exists()


def test_documents_are_looked_at_before_the_work(pipeline, tmp_path, capsys):
    args = ["--data", str(pipeline.data), "--models", str(pipeline.models), "--results", str(tmp_path / "results")]
    assert evaluate.main([*args, "--update", str(tmp_path / "README.md")]) == 1
    assert "README.md" in one_line(capsys)
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*args, "--update"])
    assert caught.value.code == 2
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------- files of the fusion


def nan(folder: Path) -> None:
    array = np.load(folder / "val_features.npy")
    array[3, 5] = np.nan
    np.save(folder / "val_features.npy", array)


def infinity(folder: Path) -> None:
    array = np.load(folder / "train_features_cleaned.npy")
    array[0, 0] = np.inf
    np.save(folder / "train_features_cleaned.npy", array)


def swapped_labels(folder: Path) -> None:
    labels = np.load(folder / "train_labels.npy")
    other = int(np.flatnonzero(labels != labels[0])[0])
    labels[[0, other]] = labels[[other, 0]]
    np.save(folder / "train_labels.npy", labels)


def leaked_test_song(folder: Path) -> None:
    tracks = np.load(folder / "train_tracks.npy")
    tracks[0] = np.load(folder / "test_tracks.npy")[0]
    np.save(folder / "train_tracks.npy", tracks)


def a_row_too_few(folder: Path) -> None:
    np.save(folder / "test_features.npy", np.load(folder / "test_features.npy")[:-1])


def not_a_table(folder: Path) -> None:
    np.save(folder / "test_features.npy", np.load(folder / "test_features.npy").ravel())


def nan_probability(folder: Path) -> None:
    array = np.load(folder / "test_log_probabilities.npy")
    array[2, 1, 0] = np.nan
    np.save(folder / "test_log_probabilities.npy", array)


def a_member_too_few(folder: Path) -> None:
    np.save(folder / "val_log_probabilities.npy", np.load(folder / "val_log_probabilities.npy")[:, 1:])


def another_selector(folder: Path) -> None:
    selector = np.load(folder / "selector.npy")
    selector[7] = ~selector[7]
    np.save(folder / "selector.npy", selector)


def not_numbers(folder: Path) -> None:
    np.save(folder / "val_features_cleaned.npy", np.array([["a", "b"]] * 12))


def labels_of_another_kind(folder: Path) -> None:
    np.save(folder / "val_labels.npy", np.load(folder / "val_labels.npy").astype(float))


def no_rows(folder: Path) -> None:
    np.save(folder / "val_log_probabilities.npy", np.load(folder / "val_log_probabilities.npy")[:0])


def labels_of_no_dimension(folder: Path) -> None:
    np.save(folder / "val_labels.npy", np.array(3))


def tracks_in_a_table(folder: Path) -> None:
    np.save(folder / "val_tracks.npy", np.load(folder / "val_tracks.npy")[None])


def features_of_several_kinds(folder: Path) -> None:
    array = np.load(folder / "val_features.npy")
    np.save(folder / "val_features.npy", np.zeros(array.shape, dtype=[("a", "f4")]))


def constant(folder: Path) -> None:
    array = np.load(folder / "train_features_cleaned.npy")
    array[:, 4] = 1
    np.save(folder / "train_features_cleaned.npy", array)


@pytest.mark.parametrize(
    ("change", "file", "reason"),
    [
        (nan, "val_features.npy", "1 rows hold NaN or infinity"),
        (infinity, "train_features_cleaned.npy", "1 rows hold NaN or infinity"),
        (swapped_labels, "train_features.npy", "labels are not those of the catalogue"),
        (leaked_test_song, "train_features.npy", "songs are not those of the split"),
        (a_row_too_few, "test_features.npy", "labels are int64 (13,), 12 rows need one each"),
        (no_rows, "val_log_probabilities.npy", "(0, 30), not a table of numbers"),
        (labels_of_another_kind, "val_features.npy", "labels are float64 (12,), 12 rows need one each"),
        (labels_of_no_dimension, "val_features.npy", "labels are int64 (), 12 rows need one each"),
        (tracks_in_a_table, "val_features.npy", "need one each"),
        (features_of_several_kinds, "val_features.npy", "not a table of numbers"),
        (not_a_table, "test_features.npy", "not a table of numbers"),
        (not_numbers, "val_features_cleaned.npy", "not a table of numbers"),
        (constant, "train_features_cleaned.npy", "1 cleaned dimensions are constant"),
        (another_selector, "val_features_cleaned.npy", "not what selector.npy keeps"),
        (nan_probability, "test_log_probabilities.npy", "1 rows hold NaN or infinity"),
        (a_member_too_few, "val_log_probabilities.npy", "(12, 2, 10), not a table of numbers"),
    ],
)
def test_verify_names_the_unusable_file(pipeline, tmp_path, capsys, change, file, reason):
    data = copy_data(pipeline, tmp_path)
    change(data / "fusion_features")
    assert verify_model_features.main(["--data", str(data)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("unusable: ")]
    assert any(file in line and reason in line for line in lines), lines


def test_cleaning_refuses_what_is_no_table_of_numbers(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    features_of_several_kinds(data / "fusion_features")
    assert create_cleaned_features.main(["--data", str(data)]) == 1
    assert "run extract_model_features.py again" in one_line(capsys)


@pytest.mark.parametrize("change", [nan, a_member_too_few, another_selector])
def test_the_fusion_refuses_unusable_files(pipeline, tmp_path, capsys, change):
    data = copy_data(pipeline, tmp_path)
    change(data / "fusion_features")
    if change is another_selector:
        np.save(data / "fusion_features" / "selector.npy", np.ones(7, dtype=bool))
    models = shutil.copytree(pipeline.models, tmp_path / "models")
    assert train_fusion.main(["--data", str(data), "--models", str(models)]) == 1
    assert ".npy is " in one_line(capsys)


def test_verify_names_a_file_that_is_no_array(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    (data / "fusion_features" / "val_labels.npy").write_bytes(b"\x93NUMPY")
    assert verify_model_features.main(["--data", str(data)]) == 1
    line = one_line(capsys)
    assert "val_labels.npy" in line
    assert "run extract_model_features.py again" in line


def test_verify_accepts_what_is_as_it_was(pipeline, capsys):
    assert verify_model_features.main(["--data", str(pipeline.data)]) == 0
    assert "usable; " in capsys.readouterr().out


def test_features_that_tell_no_more_than_guessing_are_unusable(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify_model_features, "FEWEST", 1)
    data = copy_data(pipeline, tmp_path)
    for kind in ("features", "features_cleaned"):
        path = data / "fusion_features" / f"val_{kind}.npy"
        np.save(path, np.zeros_like(np.load(path)))
    assert verify_model_features.main(["--data", str(data)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("unusable: val_features_cleaned.npy: a linear classifier on validation songs gets ")
