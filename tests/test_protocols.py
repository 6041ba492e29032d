"""Protocols: rounds that never mix songs, a stopped command that goes on, pooled figures that can be checked."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK
from helpers import SIZES, copy_data, edit_metadata

import evaluate
import protocols
import train_fusion
from catalogue import artist_key, read_catalogue, read_repeats
from checkpoints import load_checkpoint
from common import UserError
from figures import perfect_calibration_error
from files import locked
from protocols import (
    ROUNDS,
    Pool,
    check_settings,
    is_scored,
    pooled,
    prepare_round,
    read_rounds,
    round_catalogue,
    run_rounds,
)
from rules import ADDED
from tables import protocol_caption, protocol_tables

TINY = " ".join(map(str, QUICK[:-2]))  # the threads are the protocol's


@pytest.fixture(scope="module")
def catalogue(mini_features):
    return read_catalogue(mini_features[0])


def repeats(catalogue) -> list[list[str]]:
    metadata = json.loads((catalogue.data / "metadata.json").read_text())
    return [pair["tracks"] for pair in metadata["repeats"]]


def test_artist_rounds_test_every_song_once_and_keep_artists_apart(catalogue):
    tested: list[str] = []
    for number in range(ROUNDS["artist"]):
        splits = round_catalogue(catalogue, repeats(catalogue), "artist", number, None).splits
        artists = {name: {catalogue.songs[t].artist for t in tracks} for name, tracks in splits.items()}
        assert not artists["train"] & artists["test"]
        assert not artists["train"] & artists["val"]
        assert not artists["val"] & artists["test"]
        tested += splits["test"]
    assert sorted(tested) == sorted(track for tracks in catalogue.splits.values() for track in tracks)


def test_rounds_have_seeds_of_their_own_and_keep_repeats_together(pipeline, tmp_path, monkeypatch):
    data = copy_data(pipeline, tmp_path)
    tracks = sorted(read_catalogue(data).songs)
    pairs = list(zip(tracks[::7], tracks[6::7], strict=True))
    edit_metadata(data, lambda metadata: metadata.update(repeats=[{"tracks": pair} for pair in pairs]))
    trained = set()
    monkeypatch.setattr(
        protocols, "train", lambda script, name, folder, seed, options: trained.add((folder, name, seed))
    )
    monkeypatch.setattr(protocols, "is_scored", lambda folder: True)
    folders = run_rounds(read_catalogue(data), "random", 4, tmp_path / "runs", None, 1, "cpu", [])
    assert trained == {(folder, name, number) for number, folder in enumerate(folders) for name in SIZES}
    for folder in folders:
        found = read_catalogue(folder / "data")
        split_of = {track: split for split, songs in found.splits.items() for track in songs}
        assert all(split_of[first] == split_of[second] for first, second in pairs)
        assert read_repeats(found) == pairs


def test_random_rounds_differ(catalogue):
    tests = {tuple(round_catalogue(catalogue, repeats(catalogue), "random", n, None).splits["test"]) for n in range(3)}
    assert len(tests) == 3


def test_a_protocol_without_what_it_needs_is_refused(catalogue, tmp_path):
    with pytest.raises(UserError, match="--split-lists"):
        round_catalogue(catalogue, [], "fault_filtered", 0, None)
    prepare_round(tmp_path / "round", round_catalogue(catalogue, [], "random", 0, None), [])
    with pytest.raises(UserError, match="another split"):
        prepare_round(tmp_path / "round", round_catalogue(catalogue, [], "random", 1, None), [])
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--data", str(catalogue.data), "--protocol", "fault_filtered"])
    assert caught.value.code == 2


def test_a_round_borrows_features_that_were_made_after_it(catalogue, tmp_path):
    bare = dataclasses.replace(catalogue, data=tmp_path / "data")
    (bare.data / "processed").mkdir(parents=True)
    for _ in range(2):
        prepare_round(tmp_path / "round", round_catalogue(bare, [], "random", 0, None), [])
        (bare.data / "processed" / "features.json").touch()
    lent = tmp_path / "round" / "data" / "processed" / "features.json"
    assert lent.exists()
    moved = dataclasses.replace(bare, data=bare.data.rename(tmp_path / "moved"))
    assert not lent.exists()
    prepare_round(tmp_path / "round", round_catalogue(moved, [], "random", 0, None), [])
    assert lent.exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Where the one round of the module is trained."""
    return tmp_path_factory.mktemp("protocol") / "runs"


def test_a_protocol_runs_through_the_scripts_and_goes_on(mini_features, runs, tmp_path, capsys):
    results = tmp_path / "results"
    readme = tmp_path / "README.md"
    readme.write_text("<!-- evaluate.py --protocol artist -->\n<!-- end -->\n")
    command = ["--data", str(mini_features[0]), "--protocol", "artist", "--rounds", "1", "--runs", str(runs)]
    command += ["--results", str(results), "--training", TINY, "--update", str(readme), "--json"]
    assert evaluate.main(command) == 0
    first = json.loads(capsys.readouterr().out)
    split = read_catalogue(runs / "artist_0" / "data").splits
    assert first["songs"] == first["different_songs"] == len(split["test"])
    alone = json.loads((runs / "artist_0" / "results" / "evaluation.json").read_text())
    for model in ("cnn_bigru", "dpa_cnn", "ecas_cnn", "fusion"):
        assert first["models"][model]["mean"] == pytest.approx(alone["models"][model]["test"]["song_accuracy"])
        assert first["models"][model]["confusion"] == alone["models"][model]["test"]["confusion"]
        assert first["models"][model]["validation"] == alone["models"][model]["val"]["song_accuracy"]
    assert first["splits"] == [read_catalogue(runs / "artist_0" / "data").split]
    assert first["seeds"]["dpa_cnn"] == [0]
    for name in ("protocol_artist_confusion.png", "protocol_artist_reliability.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    assert "1 of 5 artist-grouped folds" in readme.read_text()
    with (results / "protocol_artist_answers.csv").open(newline="") as stream:
        answers = list(csv.DictReader(stream))
    assert sorted(row["track"] for row in answers if row["model"] == "fusion") == sorted(split["test"])
    for model in alone["models"]:
        mine = [row for row in answers if row["model"] == model]
        right = [max(first["genres"], key=lambda g, row=row: float(row[f"p_{g}"])) == row["genre"] for row in mine]
        assert np.mean(right) == pytest.approx(first["models"][model]["mean"])

    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*.*") if path.is_file()}
    assert evaluate.main(command) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.*") if path.is_file()} == written


def test_a_round_that_is_not_there_says_what_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.json is not there: run evaluate\.py --protocol first"):
        read_rounds([tmp_path])


def test_a_song_counts_once_for_the_fusion(pipeline, runs, tmp_path, capsys):
    data, models = copy_data(pipeline, tmp_path), shutil.copytree(pipeline.models, tmp_path / "models")
    command = ["--data", str(data), "--models", str(models), "--rounds", *[str(runs / "artist_0")] * 2]
    assert train_fusion.main(command) == 1
    assert "the rounds test a song more than once" in capsys.readouterr().err


def test_a_fusion_learns_from_rounds_but_not_from_its_own_test_songs(pipeline, runs, tmp_path, capsys):
    data, models = copy_data(pipeline, tmp_path), shutil.copytree(pipeline.models, tmp_path / "models")
    (data / "fusion_features" / "selector.npy").unlink()  # the rounds' features aren't used
    provenance = data / "fusion_features" / "provenance.json"
    made = json.loads(provenance.read_text())
    made["settings"] = {name: {k: v for k, v in s.items() if k not in ADDED} for name, s in made["settings"].items()}
    provenance.write_text(json.dumps(made))  # as a version wrote it that had no such settings
    command = ["--data", str(data), "--models", str(models), "--rounds"]
    assert train_fusion.main([*command, str(runs / "artist_0")]) == 0
    own, rounds = (read_catalogue(folder).splits for folder in (data, runs / "artist_0" / "data"))
    used = set(rounds["test"]) - set(own["test"])
    assert 0 < len(used) < len(rounds["test"])
    assert f"{len(used)} songs of cross-validation rounds" in capsys.readouterr().out
    meta = load_checkpoint(models / "fusion_progressive" / "model.safetensors", "")[1]
    assert meta["fitted_on"]["songs"] == len(used)
    assert "features" not in meta["candidates"]

    evaluation = runs / "artist_0" / "results" / "evaluation.json"
    told = evaluation.read_text()
    evaluation.write_text(told.replace('"epochs": 4', '"epochs": 5'))
    assert train_fusion.main([*command, str(runs / "artist_0")]) == 1
    evaluation.write_text(told)
    assert "other genres or settings" in capsys.readouterr().err


def test_a_step_that_fails_names_its_log(mini_features, tmp_path, capsys):
    command = ["--data", str(mini_features[0]), "--protocol", "artist", "--rounds", "1", "--jobs", "1"]
    command += ["--runs", str(tmp_path), "--results", str(tmp_path / "results")]
    command += ["--training", f"{TINY} --learning-rate 1e30"]
    assert evaluate.main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "train_bigru_cnn.log" in lines[0]
    assert "try a smaller --learning-rate" in lines[0]
    assert Path(tmp_path / "artist_0" / "train_bigru_cnn.log").exists()


@pytest.mark.parametrize(
    "training", ["--epochs 0", "--epoch's 3", "--help", "--no-such-option", "--seed 7", "--models m", "--force"]
)
def test_bad_options_for_the_trainings_are_bad_usage(mini_features, tmp_path, training):
    command = ["--data", str(mini_features[0]), "--protocol", "artist", "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*command, "--results", str(tmp_path / "results"), f"--training={training}"])
    assert caught.value.code == 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    ["--training=--refit=30", "--runs other", "--jobs 1", "--protocol artist --models m", "--rounds 1"]
    + [f"--protocol artist --{option}" for option in ("threads 99", "seen x", "rounds 6")],
)
def test_options_of_what_is_not_done_are_bad_usage(mini_features, tmp_path, options, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--data", str(mini_features[0]), "--results", str(tmp_path), *options.split()])
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--protocol" in said or "--rounds is at most 5" in said
    assert not any(tmp_path.iterdir())


def test_rounds_of_another_recipe_are_refused(mini_features, runs, tmp_path, capsys):
    command = ["--data", str(mini_features[0]), "--protocol", "artist", "--rounds", "1", "--runs", str(runs)]
    command += ["--results", str(tmp_path / "results"), "--training", f"{TINY} --weight-decay 0.5"]
    assert evaluate.main(command) == 1
    assert "was trained with other settings" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_training_in_progress_of_another_recipe_is_refused(mini_features, runs, tmp_path):
    folder = shutil.copytree(runs / "artist_0" / "models", tmp_path / "models").parent
    check_settings([folder], TINY.split())
    for path in folder.rglob("model.safetensors"):
        path.unlink()
    check_settings([folder], TINY.split())
    with pytest.raises(UserError, match="was trained with other settings"):
        check_settings([folder], [*TINY.split(), "--weight-decay", "0.5"])


def test_a_failed_training_ends_a_protocol_before_others_begin(mini_features, tmp_path, monkeypatch):
    began: list[str] = []

    def train(_: str, name: str, folder: Path, *__: object) -> None:
        began.append(f"{folder.name} {name}")
        if len(began) == 1:
            raise UserError("no room")
        time.sleep(0.5)

    monkeypatch.setattr(protocols, "train", train)
    catalogue = read_catalogue(mini_features[0])
    with pytest.raises(UserError, match="no room"):
        protocols.run_rounds(catalogue, "artist", 5, tmp_path, None, 2, "cpu", [])
    assert len(began) <= 2
    assert all(name.startswith("artist_0") for name in began)


def test_a_failure_ends_the_scripts_that_run(mini_features, tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(
        f"import pathlib, time; time.sleep(20); pathlib.Path({str(tmp_path)!r}, 'done').touch()"
    )
    monkeypatch.setattr(protocols, "ROOT", tmp_path)
    began: list[str] = []

    def train(_: str, name: str, folder: Path, *__: object) -> None:
        began.append(name)
        if len(began) == 1:
            while not protocols._running:
                time.sleep(0.01)
            raise UserError("no room")
        protocols.run_script("slow", folder)

    monkeypatch.setattr(protocols, "train", train)
    with pytest.raises(UserError, match="no room"):
        protocols.run_rounds(read_catalogue(mini_features[0]), "artist", 1, tmp_path / "runs", None, 2, "cpu", [])
    assert len(began) == 2
    assert not (tmp_path / "done").exists()


def test_a_log_is_read_whatever_the_encoding_of_the_terminal(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text("raise SystemExit('no Räp')", encoding="utf-8")
    monkeypatch.setattr(protocols, "ROOT", tmp_path)
    monkeypatch.setattr(protocols, "_ending", threading.Event())  # another test's protocol may have failed
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    with pytest.raises(UserError, match="no Räp"):
        protocols.run_script("fails", tmp_path)
    with (tmp_path / "fails.log").open("ab") as log:
        log.write("Räp\n".encode("latin-1"))  # of an older version
    with pytest.raises(UserError, match="no Räp"):
        protocols.run_script("fails", tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [("model,p_blues", "model,p_bleus"), ("test,", "test,another_"), ("0.0", "o.o")]
)
def test_damaged_answers_of_a_round_are_named(runs, tmp_path, old, new):
    folder = shutil.copytree(runs / "artist_0", tmp_path / "artist_0", symlinks=True)
    path = folder / "results" / "predictions.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"predictions\.csv can't be read .*: make that round again"):
        read_rounds([folder])


@pytest.mark.parametrize(
    "change", [{"checkpoints": [1]}, {"models": [1]}, {"models": {}}, {"genres": [1]}, {"genres": 1}]
)
def test_damaged_figures_of_a_round_are_named(runs, tmp_path, change):
    folder = shutil.copytree(runs / "artist_0", tmp_path / "artist_0", symlinks=True)
    path = folder / "results" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"evaluation\.json is damaged .*: make that round again"):
        read_rounds([folder])


def test_songs_that_moved_are_found_and_songs_that_were_not_scored_are_missed(runs, tmp_path):
    folder = shutil.copytree(runs / "artist_0", tmp_path / "artist_0", symlinks=True)
    catalogue = read_catalogue(folder / "data")
    moved = {track: dataclasses.replace(song, path=f"/moved/{song.file}") for track, song in catalogue.songs.items()}
    prepare_round(folder, dataclasses.replace(catalogue, songs=moved), [])
    assert read_catalogue(folder / "data").songs == moved
    assert read_catalogue(folder / "data").splits == catalogue.splits
    assert is_scored(folder)
    path = folder / "results" / "evaluation.json"
    result = json.loads(path.read_text())
    for model in result["models"].values():
        model["test"]["songs"] -= 1
    path.write_text(json.dumps(result))
    assert not is_scored(folder)


def test_names_of_genres_may_hold_commas_and_quotes(runs, tmp_path):
    folder = shutil.copytree(runs / "artist_0", tmp_path / "artist_0", symlinks=True)
    path = folder / "results" / "predictions.csv"
    with path.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([[f'{name}, "so"' if name.startswith("p_") else name for name in header], *rows])
    assert is_scored(folder)
    path.write_text("split,track,genre,model\n")
    assert not is_scored(folder)


def test_results_without_a_network_are_of_no_round(runs, tmp_path):
    folder = shutil.copytree(runs / "artist_0", tmp_path / "artist_0", symlinks=True)
    assert is_scored(folder)
    path = folder / "results" / "evaluation.json"
    result = json.loads(path.read_text())
    del result["checkpoints"]["ecas_cnn"]
    path.write_text(json.dumps(result))
    assert not is_scored(folder)
    del result["models"]
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"evaluation\.json can't be read .*: run evaluate\.py --protocol again"):
        read_rounds([folder])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process hears")
def test_a_protocol_that_is_stopped_leaves_no_training_behind(mini_features, repo, tmp_path):
    command = [sys.executable, str(repo / "evaluate.py"), "--data", str(mini_features[0]), "--protocol", "artist"]
    command += ["--runs", str(tmp_path), "--results", str(tmp_path), "--rounds", "1", "--jobs", "1"]
    command += ["--training", f"{TINY} --epochs 5000"]
    latest = tmp_path / "artist_0" / "models" / "cnn_bigru" / "latest.safetensors"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 200
        while not latest.exists():
            assert run.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.terminate()
        assert run.communicate(timeout=100)[1].endswith("stopped; run the same command again to go on\n")
    assert run.returncode == 128 + signal.SIGTERM
    with locked(latest.parent):  # nobody is there any more
        assert load_checkpoint(latest, "")[1]["progress"]["steps"] > 0
    log = (tmp_path / "artist_0" / "train_bigru_cnn.log").read_text().splitlines()
    assert "stopped by SIGTERM, all is saved" in log[-1]
    assert not (tmp_path / "artist_0" / "train_dpa_cnn.log").exists(), "it began another"


def test_a_round_that_is_read_knows_its_songs_artists(pipeline):
    pool = read_rounds([pipeline.data.parent])
    songs = read_catalogue(pipeline.data).songs
    assert pool.artists.tolist() == [artist_key(songs[track].artist) for track in pool.tracks]
    result = pooled(pool, "fusion")
    assert result["fusion_against_best"]["bootstrap_over"] == "artists"
    logs = np.log([pool.outputs[name] for name in SIZES])
    assert result["models"]["average"]["mean"] == (logs.mean(axis=0).argmax(axis=1) == pool.labels).mean()


def test_each_pooled_figure_stands_in_its_column(pipeline):
    result = pooled(read_rounds([pipeline.data.parent]), "fusion")
    known = {"mean": 0.1, "spread": 0.2, "macro_f1": 0.3, "expected_calibration_error": 0.4, "validation": 0.5}
    result["models"]["dpa_cnn"] |= known
    header, rows = protocol_tables({"protocol": "artist", "rounds": 1} | result)[0]
    [row] = [dict(zip(header, row, strict=True)) for row in rows if row[0] == "dpa_cnn"]
    columns = ("mean, %", "spread", "macro-F1, %", "calibration error, %", "validation, %")
    assert [row[column] for column in columns] == ["10.0", "20.0", "30.0", "40.0", "50.0"]


def test_pooled_figures():
    labels = np.array([0, 1, 2, 0, 1, 2])
    sure = np.full((3, 3), 0.05) + 0.85 * np.eye(3)
    outputs = {
        "a": sure[[0, 1, 2, 0, 0, 0]],  # 4 right
        "b": sure[[1, 1, 0, 0, 1, 0]],  # 3 right, one of them where a is wrong
        "fusion": sure[[0, 1, 2, 0, 1, 0]],  # 5 right
    }
    names = np.array(["x", "y", "z", "x", "y", "z"])
    pool = Pool(
        ["p", "q", "r"],
        ["r"],
        np.char.add(names, "1"),
        names,
        np.repeat([0, 1], 3),
        labels,
        outputs,
        {"a": [0.5, 0.7]},
        {"a": [9, 9]},
        {"a": {"epochs": 4, "refit": 2}},
        {"a": [0, 0]},
        [{"seed": 0}, {"seed": 1}],
    )
    result = pooled(pool, "fusion")
    models = result["models"]
    assert models["a"]["by_round"] == pytest.approx([1, 1 / 3])
    assert models["a"]["mean"] == pytest.approx(4 / 6)
    assert models["a"]["spread"] == pytest.approx(np.std([1, 1 / 3], ddof=1))
    assert models["a"]["validation"] == pytest.approx(0.6)
    low, high = models["a"]["artists_95"]  # songs x are right twice, songs y and z once each
    assert (low, high) == (0.5, 1)
    assert models["any member"]["mean"] == pytest.approx(5 / 6)
    assert models["fusion"]["without_rare"] == 1
    by_song, by_answer = (perfect_calibration_error(outputs["fusion"], names) for names in (pool.tracks, np.arange(6)))
    assert models["fusion"]["perfect_calibration_error"] == by_song != by_answer
    assert models["fusion"]["recall"] == {"p": 1, "q": 1, "r": 0.5}
    assert (result["songs"], result["different_songs"], result["best_member"]) == (6, 3, "a")
    assert result["fusion_against_best"]["difference"] == pytest.approx(1 / 6)
    assert result["fusion_against_best"]["mcnemar_p"] == 1
    assert (result["epochs"], result["refit"]) == ([4], [2])
    assert result["named_artists"] == {"answers": 6, "right": 5}
    words = {"protocol": "artist", "rounds": 2} | result
    assert "unknown artists" not in protocol_caption(words)
    assert "(bootstrap over artists " in protocol_caption(words)
    assert "over artists 95 %" in protocol_tables(words)[0][0]

    one_unknown = pooled(dataclasses.replace(pool, artists=np.array(["x", "y", "z1", "x", "y", "z1"])), "fusion")
    share = f"{100 * one_unknown['named_artists']['right'] / 4:.1f}"
    expected = (
        " 2 answers are about songs by unknown artists, some of whom may be on both sides: without these the fusion"
    )
    assert f"{expected} has {share} %." in protocol_caption(words | one_unknown)
    assert "unknown artists" not in protocol_caption(words | one_unknown | {"protocol": "random"})

    pool = dataclasses.replace(pool, tracks=np.array(list("uvwuvw")), artists=np.array(list("uvwuvw")))
    words |= pooled(pool, "fusion")  # no artist is known
    assert "(bootstrap over songs " in protocol_caption(words)
    assert "over artists 95 %" not in protocol_tables(words)[0][0]
