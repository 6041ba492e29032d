"""The scripts one after another on made-up songs: what they write, what they refuse, and that no label leaks."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import GENRES, SIZES, copy_data, edit_metadata, predictions

import create_cleaned_features
import evaluate
import extract_features
import extract_model_features
import genre_detector
import train_fusion
from catalogue import SPLITS, Catalogue, read_catalogue
from checkpoints import load_checkpoint, save_checkpoint
from decoding import SoundReader
from figures import wilson_interval
from genre_detector import GenreDetector
from tables import tables


@pytest.fixture(scope="module")
def catalogue(pipeline) -> Catalogue:
    return read_catalogue(pipeline.data)


@pytest.fixture(scope="module")
def evaluation(pipeline) -> dict:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads((pipeline.results / "evaluation.json").read_text(), parse_constant=refuse)


# ---------------------------------------------------------------- what is there afterwards


def test_each_script_says_which_comes_next(pipeline):
    names = list(pipeline.runs)
    said = {name: out.splitlines()[-1] for name, out in pipeline.runs.items() if "\nnext: " in out}
    assert list(said) == [name for name in names if name != "evaluate.py"]
    for name, line in said.items():
        assert line.startswith("next: ")
        if name.startswith(("train_", "extract_model")):
            assert line.endswith(" (where taken: --data data --models models)")
        else:
            assert re.search(r" \(where taken: --data \S+\)$", line)
        assert name == "train_fusion.py" or {*line.replace(",", "").split()} & {*names[names.index(name) + 1 :]}


def test_splits_share_no_song_artist_or_content(catalogue):
    assert catalogue.genres == GENRES
    assert sum(len(catalogue.splits[split]) for split in SPLITS) == 70
    for kind in ("track", "file", "artist", "sha256"):
        sets = [{getattr(catalogue.songs[track], kind) for track in catalogue.splits[split]} for split in SPLITS]
        assert all(sets)
        assert sum(map(len, sets)) == len(set.union(*sets)), kind


def test_every_song_has_its_features(pipeline, catalogue):
    for track, song in catalogue.songs.items():
        frames = 1 + round(song.seconds * extract_features.SAMPLE_RATE) // extract_features.HOP_LENGTH
        sounding = extract_features.timed_features(SoundReader(catalogue.audio_path(track)))[1]
        assert len(sounding) == frames
        for folder, bins in (("melspectrogram_normalized", 128), ("mfcc", 20)):
            array = np.load(pipeline.data / "processed" / folder / f"{track}.npy", allow_pickle=False)
            assert array.dtype == np.float16
            assert array.shape == (bins, sounding.sum())
    index = json.loads((pipeline.data / "processed" / "features.json").read_text())
    assert index["settings"] == extract_features.STORED_SETTINGS
    assert index["songs"] == {track: song.sha256 for track, song in catalogue.songs.items()}


@pytest.mark.parametrize("name", SIZES)
def test_a_training_writes_its_three_files(pipeline, catalogue, name):
    folder = pipeline.models / name
    files = ["latest.safetensors", "log.jsonl", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(4))
    assert all(np.isfinite(record["loss"]) for record in records)
    assert [("val_accuracy" in record) for record in records] == [False, True] * 2
    tensors, meta = load_checkpoint(folder / "model.safetensors", "")
    assert all("float16" in str(t.dtype) for t in tensors.values() if t.is_floating_point())
    assert meta["genres"] == GENRES
    assert meta["split"] == catalogue.split
    assert meta["temperature"] > 0
    output = pipeline.runs[f"train_{'bigru_cnn' if name == 'cnn_bigru' else name}.py"]
    assert f"{100 * meta['validation_accuracy']:.1f}" in output
    assert f"{100 * meta['label_conditioned_composite']:.1f}" in output


def test_networks_learn_something(pipeline):
    first, last = (
        [json.loads((pipeline.models / n / "log.jsonl").read_text().splitlines()[i])["loss"] for n in SIZES]
        for i in (0, -1)
    )
    assert np.mean(last) < np.mean(first) - 0.1


def test_fusion_features_have_896_places(pipeline, catalogue):
    folder = pipeline.data / "fusion_features"
    kept = np.load(folder / "selector.npy", allow_pickle=False)
    assert (kept.dtype, kept.shape) == (bool, (896,))
    for split in SPLITS:
        count = len(catalogue.splits[split])
        expected = {
            "features": (np.float32, (count, 896)),
            "features_cleaned": (np.float32, (count, kept.sum())),
            "log_probabilities": (np.float32, (count, 3, 10)),
            "labels": (np.int64, (count,)),
        }
        arrays = {name: np.load(folder / f"{split}_{name}.npy", allow_pickle=False) for name in expected}
        assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == expected
        np.testing.assert_array_equal(arrays["features_cleaned"], arrays["features"][:, kept])
        np.testing.assert_array_equal(arrays["labels"], catalogue.labels(catalogue.splits[split]))
        assert np.load(folder / f"{split}_tracks.npy").tolist() == catalogue.splits[split]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["sizes"] == SIZES
    assert provenance["held_out"] == {"train": False, "val": True, "test": True}
    table = pipeline.runs["create_cleaned_features.py"].splitlines()
    assert table[-2].split() == ["all", "896", str((~kept).sum()), str(kept.sum())]


def test_a_threshold_that_leaves_nothing_is_named(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    assert create_cleaned_features.main(["--data", str(data), "--threshold", "1e9"]) == 1
    assert "try a smaller --threshold" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        create_cleaned_features.main(["--data", str(data), "--threshold=-1"])
    assert caught.value.code == 2


def test_features_of_other_networks_are_not_fused(pipeline, tmp_path, capsys):
    data, models = copy_data(pipeline, tmp_path), shutil.copytree(pipeline.models, tmp_path / "models")
    (models / "ecas_cnn" / "model.safetensors").write_bytes(b"another")
    assert train_fusion.main(["--data", str(data), "--models", str(models)]) == 1
    err = capsys.readouterr().err
    assert f"another ecas_cnn than the one in {models}: name the folder of the networks with --models" in err


def test_without_the_networks_there_is_nothing_to_fuse(pipeline, tmp_path, capsys):
    assert train_fusion.main(["--data", str(pipeline.data), "--models", str(tmp_path / "typo")]) == 1
    assert f"{tmp_path / 'typo'} has no cnn_bigru: name the folder" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_network_beside_a_newer_training_is_named(pipeline, tmp_path, capsys):
    data, models = (shutil.copytree(folder, tmp_path / folder.name) for folder in (pipeline.data, pipeline.models))
    latest = models / "dpa_cnn" / "latest.safetensors"
    tensors, meta = load_checkpoint(latest, "")
    save_checkpoint(latest, tensors, meta | {"progress": meta["progress"] | {"epoch": 1}})
    assert extract_model_features.main(["--data", str(data), "--models", str(models), "--splits", "val"]) == 0
    done = f"1 of {meta['settings']['epochs']} epochs"
    [line] = capsys.readouterr().err.splitlines()
    assert f"a newer training of dpa_cnn isn't done ({done}): the network from before it is used" in line


def test_features_that_change_while_they_are_read_are_not_fused(pipeline, tmp_path, capsys, monkeypatch):
    data, models = copy_data(pipeline, tmp_path), shutil.copytree(pipeline.models, tmp_path / "models")
    read = train_fusion.read_array

    def slowly(path: Path, maker: str) -> np.ndarray:
        provenance = path.with_name("provenance.json")  # another network's features are made meanwhile
        provenance.write_text(provenance.read_text().replace('"ecas_cnn": "', '"ecas_cnn": "0'))
        return read(path, maker)

    monkeypatch.setattr(train_fusion, "read_array", slowly)
    assert train_fusion.main(["--data", str(data), "--models", str(models)]) == 1
    assert "has changed meanwhile" in capsys.readouterr().err


def test_validation_songs_of_one_artist_leave_the_average(pipeline, tmp_path, capsys):
    data, models = copy_data(pipeline, tmp_path), shutil.copytree(pipeline.models, tmp_path / "models")

    def sing(metadata: dict) -> None:
        for song in metadata["songs"]:
            song["artist"] = "One" if song["file"] in val else song["artist"]

    val = (data / "processed" / "val_files.txt").read_text().split()
    edit_metadata(data, sing)
    assert train_fusion.main(["--data", str(data), "--models", str(models)]) == 0
    assert "validation songs are one song, or of one artist: the fusion is the average" in capsys.readouterr().out
    fusion, said = train_fusion.load_fusion(models)
    assert (fusion.kind, fusion.temperature, said["min_confidence"]) == ("average", 1, 1)


def test_cleaning_is_decided_without_test_songs(pipeline, tmp_path, capsys):
    data = copy_data(pipeline, tmp_path)
    folder = data / "fusion_features"
    for split, dead in (("train", [3, 300, 895, 10]), ("val", [3, 300, 895, 11]), ("test", [700])):
        array = np.load(folder / f"{split}_features.npy")
        array[:, dead] = 0.25
        np.save(folder / f"{split}_features.npy", array)
    rows = [np.load(folder / f"{split}_features.npy") for split in ("train", "val")]
    variance = np.concatenate(rows).astype(np.float64).var(axis=0)
    assert create_cleaned_features.main(["--data", str(data), "--threshold", "1e-3"]) == 0
    kept = np.load(folder / "selector.npy")
    assert not kept[[3, 300, 895]].any()
    clear = np.abs(variance - 1e-3) > 1e-6
    np.testing.assert_array_equal(kept[clear], (variance > 1e-3)[clear])
    for split in SPLITS:
        cleaned, whole = (np.load(folder / f"{split}_features{end}.npy") for end in ("_cleaned", ""))
        np.testing.assert_array_equal(cleaned, whole[:, kept])
    assert capsys.readouterr().out.splitlines()[-2].split() == ["all", "896", str((~kept).sum()), str(kept.sum())]


def test_evaluation_figures_follow_from_the_predictions(pipeline, catalogue, evaluation):
    rows = predictions(pipeline.results)
    assert [row["track"] for row in rows] == catalogue.splits["test"]
    assert [*rows[0]] == ["track", "genre", *SIZES, "fusion"]
    for name in (*SIZES, "fusion"):
        test = evaluation["models"][name]["test"]
        right = [row[name] == row["genre"] for row in rows]
        assert test["song_accuracy"] == pytest.approx(np.mean(right))
        assert test["wilson_95"] == pytest.approx(wilson_interval(sum(right), len(right)))
        confusion = Counter((GENRES.index(row["genre"]), GENRES.index(row[name])) for row in rows)
        assert test["confusion"] == [[confusion[i, j] for j in range(10)] for i in range(10)]
        picture = (pipeline.results / f"confusion_{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    assert len(list(pipeline.results.iterdir())) == 7
    output = pipeline.runs["evaluate.py"]
    fusion = evaluation["models"]["fusion"]
    assert f"{100 * fusion['test']['song_accuracy']:.1f}" in next(x for x in output.splitlines() if x[:6] == "fusion")
    assert "validation, %" in output
    assert "without" not in output  # all genres are rare here


def test_songs_confident_answers_and_windows_are_counted(pipeline, catalogue, monkeypatch):
    detector = GenreDetector("fusion", pipeline.models, "cpu")
    tracks = catalogue.splits["test"]
    paths, labels = [*map(catalogue.audio_path, tracks)], catalogue.labels(tracks)
    analyses = [*map(detector.analyse, paths)]
    answers = np.array([analysis.song["fusion"] for analysis in analyses])
    monkeypatch.setattr(detector, "min_confidence", float(np.median(np.exp(answers).max(axis=1))))
    monkeypatch.setattr(detector, "_own_threshold", False)  # these songs are shorter than a window
    confident = np.array([detector.predict(path).confident for path in paths])
    assert 0 < confident.sum() < len(confident)

    counted = {}
    monkeypatch.setattr(evaluate, "rare_genres", lambda songs: counted.update(songs) or ["jazz"])
    result = evaluate.evaluate(detector, catalogue)[0]
    assert (counted, result["rare_genres"]) == (dict.fromkeys(GENRES, 7), ["jazz"])
    test = result["models"]["fusion"]["test"]
    right = answers.argmax(axis=1) == labels
    assert test["confident"] == {"answers": confident.sum(), "right": (confident & right).sum()}
    windows = [(a.windows["fusion"].argmax(axis=1) == c).mean() for a, c in zip(analyses, labels, strict=True)]
    assert test["window_accuracy"] == pytest.approx(np.mean(windows))


def test_each_figure_stands_in_its_column(evaluation):
    result = json.loads(json.dumps(evaluation))
    scores = result["models"]["dpa_cnn"]
    scores["test"] |= {"song_accuracy": 0.1, "window_accuracy": 0.2, "macro_f1": 0.3, "expected_calibration_error": 0.4}
    scores |= {"val": {"song_accuracy": 0.5}, "label_conditioned_composite": 0.6}
    header, rows = tables(result)[0]
    [row] = [dict(zip(header, row, strict=True)) for row in rows if row[0] == "dpa_cnn"]
    columns = ("test", "windows", "macro-F1", "calibration error", "validation", "composite*")
    assert [row[f"{column}, %"] for column in columns] == ["10.0", "20.0", "30.0", "40.0", "50.0", "60.0"]


def test_composite_stands_only_under_its_own_name(pipeline, evaluation):
    for name in SIZES:
        composite = evaluation["models"][name]["label_conditioned_composite"]
        log = [json.loads(line) for line in (pipeline.models / name / "log.jsonl").read_text().splitlines()]
        assert composite >= max(record.get("val_accuracy", 0) for record in log) - 1e-9
    assert "label_conditioned_composite" not in evaluation["models"]["fusion"]
    text = json.dumps(evaluation)
    assert text.count("composite") == text.count('"label_conditioned_composite"') == 3


def test_nothing_half_written_is_left(pipeline):
    assert not list(pipeline.data.parent.rglob("*.mgf-part"))


# ---------------------------------------------------------------- detection is evaluation


def test_detector_answers_as_evaluated(pipeline, catalogue, run_script, capsys):
    rows = predictions(pipeline.results)
    songs = [str(catalogue.audio_path(row["track"])) for row in rows]
    said = {"fusion": json.loads(run_script("genre_detector.py", "--models", pipeline.models, "--json", *songs).stdout)}
    for name in SIZES:
        assert genre_detector.main(["--models", str(pipeline.models), "--model", name, "--json", *songs]) == 0
        said[name] = json.loads(capsys.readouterr().out)
    detector = GenreDetector("fusion", pipeline.models)
    for index, (song, row) in enumerate(zip(songs, rows, strict=True)):
        analysis = detector.analyse(song)
        for name, answers in said.items():
            assert answers[index]["genre"] == row[name]
            assert answers[index]["path"] == song
            expected = dict(zip(GENRES, np.exp(analysis.song[name]), strict=True))
            assert answers[index]["probabilities"] == pytest.approx(expected, abs=1e-6)


def test_stored_outputs_are_the_detectors(pipeline, catalogue):
    detector = GenreDetector("fusion", pipeline.models)
    folder = pipeline.data / "fusion_features"
    stored, features = (np.load(folder / f"test_{kind}.npy") for kind in ("log_probabilities", "features"))
    fusion, _ = train_fusion.load_fusion(pipeline.models)
    for index in (0, 7):
        analysis = detector.analyse(catalogue.audio_path(catalogue.splits["test"][index]))
        said = np.stack([analysis.song[name] for name in SIZES])  # which evaluate.py writes, for --rounds
        np.testing.assert_allclose(stored[index], said, atol=1e-3)
        outputs = fusion(stored[index : index + 1], features[index : index + 1])[0]
        np.testing.assert_allclose(outputs, analysis.song["fusion"], atol=2e-3)


def test_shuffled_test_labels_change_the_score_and_no_prediction(pipeline, catalogue, evaluation, tmp_path):
    data = copy_data(pipeline, tmp_path)
    test = set(catalogue.splits["test"])

    def rotate(value: dict) -> None:
        for song in value["songs"]:
            if song["track"] in test:
                song["genre"] = GENRES[(GENRES.index(song["genre"]) + 1) % 10]

    edit_metadata(data, rotate)
    args = ["--data", str(data), "--models", str(pipeline.models), "--results", str(tmp_path / "results")]
    assert evaluate.main(args) == 0
    before, after = predictions(pipeline.results), predictions(tmp_path / "results")
    for was, now in zip(before, after, strict=True):
        assert was["genre"] != now["genre"]
        assert {k: v for k, v in was.items() if k != "genre"} == {k: v for k, v in now.items() if k != "genre"}
    again = json.loads((tmp_path / "results" / "evaluation.json").read_text())["models"]["fusion"]
    assert again["test"]["song_accuracy"] < evaluation["models"]["fusion"]["test"]["song_accuracy"]
    assert again["val"] == evaluation["models"]["fusion"]["val"]
