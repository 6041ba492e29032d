"""Train and score the whole pipeline over several splits, and pool what the rounds say.

``evaluate.py --protocol`` is its command line. A round is a folder with lists, networks and results of its own;
every step in it is one of the numbered scripts, run as a user would run it, so that what is scored is what is used.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from catalogue import Catalogue, artist_key, read_catalogue, read_repeats, write_catalogue
from checkpoints import load_checkpoint
from common import UserError, complain
from figures import bootstrap_difference, mcnemar, right_among, song_figures, wilson_interval
from files import file_sha256, read_json
from song_lists import read_split_lists
from splits import split_songs
from stopping import signals_to

ROUNDS = {"random": 5, "artist": 5, "fault_filtered": 3}
WHAT = {
    "random": "split seeds; songs of one artist are on both sides",
    "artist": "artist-grouped folds; no song is tested twice",
    "fault_filtered": "training seeds on the published lists",
}
ROOT = Path(__file__).resolve().parent
VAL, TEST = 0.15, 0.15  # shares of the songs; of five folds each tests a fifth, and a tenth validates


# ---------------------------------------------------------------- the rounds


def round_catalogue(
    catalogue: Catalogue, repeats: Sequence[Any], protocol: str, number: int, lists: Path | None
) -> Catalogue:
    """The songs of a catalogue in the split of one round, 0 on.

    Raises UserError if the catalogue knows no artists, or as ``read_split_lists`` and ``split_songs``.
    """
    songs = {t: dataclasses.replace(s, path=str(catalogue.audio_path(t).resolve())) for t, s in catalogue.songs.items()}
    if protocol == "artist" and not any(song.artist for song in songs.values()):
        raise UserError("no song has an artist: run prepare_gtzan_data.py with --artist-index")
    rounds = ROUNDS[protocol]
    fold = (number + 1, rounds) if protocol == "artist" else None
    seed = number if protocol == "random" else 0
    val = 0.1 if fold else VAL
    listed = read_split_lists(lists, [*songs.values()]) if lists and protocol == "fault_filtered" else None
    splits, split, _ = split_songs([*songs.values()], repeats, protocol, seed, val, TEST, fold, listed)
    return dataclasses.replace(catalogue, songs=songs, splits=splits, split=split)


def prepare_round(folder: Path, catalogue: Catalogue, repeats: Sequence[Any]) -> None:
    """Write the lists of a round into ``folder``/data and lend it the features that are already there."""
    data = folder / "data"
    there = read_catalogue(data) if (data / "metadata.json").exists() else None
    elsewhere = "move it away or name another folder with --runs"
    if there and there.split != catalogue.split:
        raise UserError(f"{folder} holds a round of another split: {elsewhere}")
    tracks = [track for split in catalogue.splits.values() for track in split]
    if there and any(there.songs[track].sha256 != catalogue.songs[track].sha256 for track in tracks):
        raise UserError(f"{folder} holds a round of songs that have changed since: {elsewhere}")
    if not there:
        shutil.rmtree(data, ignore_errors=True)  # of a start that was interrupted
        (data / "processed").mkdir(parents=True)
    for features in (catalogue.data / "processed").resolve().iterdir():
        target = data / "processed" / features.name
        if features.suffix != ".txt" and not target.exists():
            target.unlink(missing_ok=True)  # a link to where the features were before
            lend(features, target)
    if not there or there.songs != catalogue.songs:  # the songs may have moved
        write_catalogue(dataclasses.replace(catalogue, data=data), {"repeats": [{"tracks": pair} for pair in repeats]})


def lend(source: Path, target: Path) -> None:
    """A link to a file or folder, or a copy where the system allows no links."""
    try:
        target.symlink_to(source)
    except OSError:
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


_running: set[subprocess.Popen[bytes]] = set()
_ending = threading.Event()  # no further script starts


def end_scripts(number: int) -> NoReturn:
    """At a signal: end the scripts that ``run_script`` started, trainings after their step, and then this process."""
    _ending.set()
    for script in [*_running]:
        script.terminate()
    complain("stopped; run the same command again to go on")
    raise SystemExit(128 + number)


def run_script(script: str, folder: Path, *options: str) -> None:
    """Run one of the numbered scripts on a round's folder; what it prints goes into a log there."""
    if _ending.is_set():
        raise UserError(f"{script}.py wasn't started: another script has failed")
    command = [sys.executable, str(ROOT / f"{script}.py"), "--data", str(folder / "data"), *options]
    log = folder / f"{script}.log"
    utf8 = os.environ | {"PYTHONIOENCODING": "utf-8"}  # whatever this terminal has
    with (
        log.open("a", encoding="utf-8") as stream,
        subprocess.Popen(command, stdout=stream, stderr=stream, env=utf8) as run,
    ):
        _running.add(run)
        code = run.wait()
        _running.discard(run)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no word of why"]
            raise UserError(f"{script}.py failed on {folder} ({lines[-1]}): see {log}, then repeat this command")


def check_settings(folders: Sequence[Path], options: Sequence[str]) -> None:
    """Raise UserError if a round holds a network, or a training in progress, of other settings than the scripts' now.

    ``options`` differ from their defaults; a mistake in them is bad usage.
    """
    from extract_model_features import MEMBERS, recipe
    from training_command import read_options

    for name, script in MEMBERS.items():
        args, settings = read_options(options, None, importlib.import_module(script).SETTINGS, recipe_only=True)
        wanted = recipe({"settings": dataclasses.asdict(settings), "refit": args.refit})
        for folder in (folder / "models" / name for folder in folders):
            files = (folder / file for file in ("model.safetensors", "latest.safetensors"))
            path = next((path for path in files if path.exists()), None)
            if path and recipe(load_checkpoint(path, f"{script}.py")[1]) != wanted:
                what = "was trained with other settings"
                raise UserError(f"{folder} {what}: move it away or name another folder with --runs")


def train(script: str, name: str, folder: Path, seed: int, options: Sequence[str]) -> None:
    """Train one network of a round, or go on with it, unless that is done."""
    models = folder / "models"
    if (models / name / "model.safetensors").exists():
        return
    resume = ["--resume"] if (models / name / "latest.safetensors").exists() else []
    run_script(script, folder, "--models", str(models), "--seed", str(seed), "--threads", "1", *resume, *options)


def is_scored(folder: Path) -> bool:
    """Whether a round's results are there, of the networks that are there and about all of its test songs."""
    path = folder / "results" / "evaluation.json"
    if not path.exists() or not path.with_name("predictions.csv").exists():
        return False
    from extract_model_features import MEMBERS

    result = read_json(path, "evaluate.py", "checkpoints", "models")
    with path.with_name("predictions.csv").open(encoding="utf-8", newline="") as stream:
        if not any(column.startswith("p_") for column in next(csv.reader(stream), [])):  # as an older version wrote it
            return False
    answers = {model.get("test", {}).get("songs") for model in result["models"].values()}
    if answers != {len(read_catalogue(folder / "data").splits["test"])}:
        return False  # a song couldn't be read when it was scored
    scored = result["checkpoints"]
    return all(
        name in scored and scored[name]["sha256"] == file_sha256(folder / "models" / name / "model.safetensors")
        for name in MEMBERS
    )


def finish(folder: Path, seed: int, device: str) -> None:
    """Fuse a round's networks and score them on its test songs."""
    from extract_model_features import read_provenance

    models = ["--models", str(folder / "models")]
    where = ["--device", device, "--threads", "1"]
    run_script("extract_model_features", folder, *models, *where, "--splits", "val")
    if read_provenance(folder / "data" / "fusion_features")["held_out"]["val"]:  # after a refit nothing is fitted
        run_script("create_cleaned_features", folder)
    run_script("train_fusion", folder, *models, "--seed", str(seed))
    run_script("evaluate", folder, *models, *where, "--results", str(folder / "results"))


def run_rounds(
    catalogue: Catalogue,
    protocol: str,
    rounds: int,
    runs: Path,
    lists: Path | None,
    jobs: int,
    device: str,
    options: Sequence[str],
) -> list[Path]:
    """Every round of a protocol; what is done already is kept. Returns their folders.

    ``options`` are for the training scripts. ``jobs`` scripts run at a time with one thread each: on two cores that is
    a third faster than one with two.
    """
    from extract_model_features import MEMBERS

    repeats = read_repeats(catalogue)
    folders = [runs / f"{protocol}_{number}" for number in range(rounds)]
    check_settings(folders, options)
    for number, folder in enumerate(folders):
        prepare_round(folder, round_catalogue(catalogue, repeats, protocol, number, lists), repeats)

    def job(work: Callable[..., None], *arguments: object) -> None:
        if not _ending.is_set():
            try:
                work(*arguments)
            except BaseException:
                _ending.set()  # here: this thread would begin the next job before the main one hears of it
                raise

    _ending.clear()
    with signals_to(end_scripts, signal.SIGTERM), ThreadPoolExecutor(jobs) as pool:
        trained: list[list[Future[None]]] = []
        ends: list[Future[None]] = []

        def end(number: int) -> None:
            for future in trained[number]:
                future.result()
            if not is_scored(folders[number]):
                finish(folders[number], number, device)
                if not is_scored(folders[number]):
                    log = folders[number] / "evaluate.log"
                    raise UserError(f"not all test songs of {folders[number].name} were scored: {log} names them")
                complain(f"{folders[number].name} is done")

        for number, folder in enumerate(folders):
            jobs_here = [
                (script, name, folder, number, ["--device", device, *options]) for name, script in MEMBERS.items()
            ]
            trained.append([pool.submit(job, train, *arguments) for arguments in jobs_here])
            if number:  # one round behind, so that no worker waits for a training
                ends.append(pool.submit(job, end, number - 1))
        ends.append(pool.submit(job, end, rounds - 1))
        try:
            for future in wait([*chain(*trained), *ends], return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException as error:
            if isinstance(error, Exception):  # is told at once; trainings end after their step and can go on
                for script in [*_running]:
                    script.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return folders


# ---------------------------------------------------------------- figures


@dataclass(frozen=True)
class Pool:
    """The test songs of every round, one after the other."""

    genres: list[str]
    rare: list[str]  # genres with few songs in the data set
    tracks: np.ndarray  # names (songs,)
    artists: np.ndarray  # names (songs,); of a song by an unknown artist, its own
    rounds: np.ndarray  # int (songs,)
    labels: np.ndarray  # int (songs,)
    outputs: dict[str, np.ndarray]  # model -> probabilities (songs, classes)
    validation: dict[str, list[float]]  # model -> accuracy a round
    windows: dict[str, list[int]]  # model -> windows trained on a round
    settings: dict[str, dict[str, Any]]  # model -> its recipe, the same in every round
    seeds: dict[str, list[int]]  # model -> seed of its training a round
    splits: list[dict[str, Any]]  # name, seed and hashes of each round's split


def read_rounds(folders: Sequence[Path]) -> Pool:
    """What ``evaluate.py`` wrote in each round's folder.

    Raises UserError if a round isn't done, is damaged or was trained with other settings than the first.
    """
    from extract_model_features import recipe

    tracks, artists, rounds, labels = [], [], [], []
    outputs: dict[str, list[list[float]]] = {}
    validation: dict[str, list[float]] = {}
    windows: dict[str, list[int]] = {}
    settings: dict[str, dict[str, Any]] = {}
    seeds: dict[str, list[int]] = {}
    splits: list[dict[str, Any]] = []
    genres: list[str] = []
    rare: list[str] = []
    for number, folder in enumerate(folders):
        path = folder / "results" / "evaluation.json"
        result = read_json(path, "evaluate.py --protocol", "split", "genres", "rare_genres", "checkpoints", "models")
        catalogue = read_catalogue(folder / "data")
        splits.append(catalogue.split)
        try:
            genres, rare = result["genres"], result["rare_genres"]
            for model, checkpoint in result["checkpoints"].items():
                windows.setdefault(model, []).append(checkpoint["windows"])
                seeds.setdefault(model, []).append(checkpoint["seed"])
                if settings.setdefault(model, recipe(checkpoint)) != recipe(checkpoint):
                    raise UserError(
                        f"{folder} was trained with other settings than {folders[0]}: move one of them away"
                    )
            for model, scores in result["models"].items():
                if "val" in scores:
                    validation.setdefault(model, []).append(scores["val"]["song_accuracy"])
            first = next(iter(result["models"]))
            if not all(isinstance(genre, str) for genre in [*genres, *rare]):
                raise ValueError("genres that are no names")
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}): make that round again") from None
        answers = folder / "results" / "predictions.csv"
        try:
            with answers.open(encoding="utf-8", newline="") as stream:
                rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
            for row in rows:
                outputs.setdefault(row["model"], []).append([float(row[f"p_{genre}"]) for genre in genres])
                if row["model"] == first:
                    tracks.append(row["track"])
                    artists.append(artist_key(catalogue.songs[row["track"]].artist) or row["track"])
                    rounds.append(number)
                    labels.append(genres.index(row["genre"]))
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{answers} can't be read ({error}): make that round again") from None
    arrays = {model: np.array(values) for model, values in outputs.items()}
    order = (np.array(tracks), np.array(artists), np.array(rounds), np.array(labels))
    return Pool(genres, rare, *order, arrays, validation, windows, settings, seeds, splits)


def pooled(pool: Pool, fusion: str) -> dict[str, Any]:
    """Figures of every model, of the plain average and of the oracle over the pooled rounds, parts of 1."""
    members = [model for model in pool.outputs if model != fusion]
    average = np.exp(np.mean([np.log(np.maximum(pool.outputs[m], 1e-12)) for m in members], axis=0))
    outputs = {**{m: pool.outputs[m] for m in members}, "average": average / average.sum(1, keepdims=True)}
    outputs[fusion] = pool.outputs[fusion]
    right = {model: values.argmax(1) == pool.labels for model, values in outputs.items()}
    right["any member"] = np.any([right[m] for m in members], axis=0)
    common = ~np.isin(pool.labels, [pool.genres.index(genre) for genre in pool.rare])
    rounds = np.unique(pool.rounds)
    named = pool.artists != pool.tracks
    artists_known = bool(named.any())
    several_artists = artists_known and len(np.unique(pool.artists)) > 1
    models: dict[str, Any] = {}
    for model, good in right.items():
        by_round = [float(good[pool.rounds == r].mean()) for r in rounds]
        models[model] = {
            "by_round": by_round,
            "mean": float(np.mean(by_round)),
            "spread": float(np.std(by_round, ddof=1)) if len(rounds) > 1 else None,
            "wilson_95": wilson_interval(int(good.sum()), len(good)),
            "artists_95": bootstrap_difference(good, np.zeros_like(good), pool.artists) if several_artists else None,
            "without_rare": float(good[common].mean()) if common.any() else None,
        }
        if model in outputs:
            models[model] |= song_figures(outputs[model], pool.labels, pool.genres, pool.tracks)
        if model in pool.validation:
            models[model]["validation"] = float(np.mean(pool.validation[model]))
    best = max(members, key=lambda m: models[m]["mean"])
    return {
        "genres": pool.genres,
        "rare_genres": pool.rare,
        "splits": pool.splits,
        "settings": pool.settings,
        "seeds": pool.seeds,
        "windows_trained": pool.windows,
        **{key: sorted({values[key] for values in pool.settings.values()}) for key in ("epochs", "refit")},
        "songs": len(pool.labels),
        "different_songs": len(np.unique(pool.tracks)),
        "models": models,
        "named_artists": right_among(right[fusion], named),
        "best_member": best,
        "fusion_against_best": {
            "difference": float(right[fusion].mean() - right[best].mean()),
            "bootstrap_95": bootstrap_difference(right[fusion], right[best], pool.artists),
            "bootstrap_over": "artists" if artists_known else "songs",
            "mcnemar_p": mcnemar(right[fusion], right[best]),
        },
    }
