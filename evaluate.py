"""Score the frozen networks and the fusion on held-out songs, through the detector's own predict path.

Every song is decoded and classified by ``GenreDetector``, which sees no labels; they are compared afterwards. The
validation figure stands beside the test figure: those songs steered the training and chose temperatures, and thresholds
and the fusion too, unless that was fitted on other held-out songs. Networks with a --refit were trained on them, so
there is none. ``label_conditioned_composite`` is of the kind that the published method reports as accuracy: each
class's best check of the whole schedule, put together. No classifier has that accuracy.

With --seen every song below data/ is scored that the networks have not seen, whatever split is prepared there: so the
released ones can be tested on more of GTZAN than they were. Songs by artists of the seen ones are left out, as far as
artists are known from --artist-index or from when the songs were prepared, and so are repeats.

With --protocol the whole pipeline is trained and scored over several splits of the prepared songs, and the test
songs of all rounds are pooled: five seeds of ``random``, five folds of ``artist``, three training seeds of the
published ``fault_filtered`` lists. That takes hours; a round that is done is kept, and a stopped command goes on.

Reads   data/metadata.json, data/processed/, the songs, models/; with --seen the lists of songs to leave out
Writes  results/evaluation.json, results/predictions.csv, results/confusion_<model>.png, results/reliability.png;
        with --seen the same in results/unseen/
        with --protocol results/protocol_<name>.json, two pictures of that name, protocol_<name>_answers.csv with
        each model's probabilities for every test song, and each round below --runs

Examples
    python evaluate.py
    python evaluate.py --update models/README.md    # put the tables between the marks there
    python evaluate.py --seen models/split/train.txt models/split/val.txt --artist-index GTZANindex.txt
    python evaluate.py --protocol artist --update README.md
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from catalogue import Catalogue, read_catalogue, read_repeats
from common import (
    UserError,
    argument_parser,
    command,
    complain,
    format_table,
    library_versions,
    path_name,
    positive_int,
    progress,
)
from detector_inputs import listen
from extract_model_features import check_split, recipe
from figures import draw_confusion, draw_reliability, rare_genres, right_among, song_figures
from files import file_sha256, locked, whole_file, write_json, write_text
from genre_detector import FUSION, Analysis, GenreDetector
from protocols import ROUNDS, pooled, read_rounds, run_rounds
from song_lists import read_artists
from tables import COMPOSITE, caption, markdown, percent, protocol_caption, protocol_tables, tables, with_tables
from unseen import read_seen, unseen_songs

Outputs = dict[str, tuple[np.ndarray, np.ndarray]]  # probabilities and labels by kind of songs
SPLIT_WORDS = {"val": "validation songs", "test": "test songs"}


# ---------------------------------------------------------------- predictions


def analyse_songs(
    detector: GenreDetector, catalogue: Catalogue, split: str
) -> tuple[list[str], list[Analysis], np.ndarray]:
    """The songs of a split, the detector's analysis of each, and whether its answer is confident, bool (songs,).

    A song that can't be read, or isn't the file that was prepared, is named and left out.
    """
    tracks, analyses, confident = [], [], []
    for track in progress(catalogue.splits[split], split):
        path = catalogue.audio_path(track)
        try:
            heard = listen(path)
            if file_sha256(path) != catalogue.songs[track].sha256:
                raise UserError(f"{path} is not the file that prepare_gtzan_data.py saw: run it again")
            analyses.append(detector.judge(heard))
            confident.append(detector.conclude(str(path), heard, analyses[-1]).confident)
            tracks.append(track)
        except UserError as error:
            complain(f"{error}; left out of the figures")
    if not tracks:
        raise UserError(f"no song of the {split} split can be read: run prepare_gtzan_data.py again")
    return tracks, analyses, np.array(confident)


def score(analyses: Sequence[Analysis], labels: np.ndarray, genres: list[str], model: str) -> dict[str, Any]:
    """Figures of one model over songs: all of them parts of 1."""
    windows = [(a.windows[model].argmax(axis=1) == label).mean() for a, label in zip(analyses, labels, strict=True)]
    figures = song_figures(np.exp(np.stack([a.song[model] for a in analyses])), labels, genres)
    return figures | {"window_accuracy": float(np.mean(windows))}


def evaluate(detector: GenreDetector, catalogue: Catalogue) -> tuple[dict[str, Any], list[list[str]], Outputs]:
    """All figures, a row of predictions for each held-out song and model, and the fusion's answers.

    The latter by kind of songs: probabilities float64 (songs, classes) and labels int64 (songs,).
    """
    names = [*(member.name for member in detector.members), FUSION]
    scores: dict[str, dict[str, Any]] = {name: {} for name in names}
    rows, outputs = [["split", "track", "genre", "model", *(f"p_{genre}" for genre in catalogue.genres)]], Outputs()
    for split in SPLIT_WORDS:
        if split in detector.knows or not catalogue.splits[split]:
            continue
        tracks, analyses, confident = analyse_songs(detector, catalogue, split)
        labels = catalogue.labels(tracks)
        for name in names:
            scores[name][split] = score(analyses, labels, catalogue.genres, name)
            rows += [
                [split, track, catalogue.songs[track].genre, name, *(f"{p:.6g}" for p in np.exp(a.song[name]))]
                for track, a in zip(tracks, analyses, strict=True)
            ]
        probabilities = np.exp([analysis.song[FUSION] for analysis in analyses])
        outputs[SPLIT_WORDS[split]] = probabilities, labels
        right = probabilities.argmax(axis=1) == labels
        named = np.array([bool(catalogue.songs[track].artist) for track in tracks])
        scores[FUSION][split]["confident"] = right_among(right, confident)
        scores[FUSION][split]["named_artists"] = right_among(right, named)
    checkpoints = {}
    for member in detector.members:
        meta = member.meta
        scores[member.name]["label_conditioned_composite"] = meta["label_conditioned_composite"]
        checkpoints[member.name] = {
            "sha256": member.sha256,
            "seed": meta["seed"],
            "windows": meta["progress"]["windows"],
            "settings": meta["settings"],
            "refit": recipe(meta)["refit"],
        }
    songs = [song for song in catalogue.songs.values() if song.verdict == "ok"]
    count = {genre: sum(song.genre == genre for song in songs) for genre in catalogue.genres}
    result = {
        "genres": catalogue.genres,
        "rare_genres": rare_genres(count),
        "split": catalogue.split,
        "songs": {split: len(tracks) for split, tracks in catalogue.splits.items()},
        "models": scores,
        "checkpoints": checkpoints,
        "versions": library_versions(),
    }
    return result, rows, outputs


# ---------------------------------------------------------------- one split, a protocol


def only_unseen(
    detector: GenreDetector, catalogue: Catalogue, seen: Sequence[Path], index: Path | None
) -> tuple[Catalogue, dict[str, Any]]:
    """The songs that the networks have not seen, by the lists ``seen``, under the networks' own split."""
    foreign = {*catalogue.genres} - {*detector.genres}
    if foreign:
        raise UserError(f"the networks know no {' or '.join(sorted(foreign))}: name another --data")
    if catalogue.split == detector.meta["split"]:
        check_split(detector.members, catalogue)  # songs are known by their names below
    known = read_seen(seen, detector.meta["split"]["sha256"])
    catalogue = dataclasses.replace(catalogue, genres=detector.genres, split=detector.meta["split"])
    artists = read_artists(index) if index else {}
    if index and not any(artists.get(name) for name in known):
        raise UserError(f"{index} names no artist of the songs that the networks have seen: is it of this data set?")
    catalogue, left_out = unseen_songs(catalogue, known, artists, read_repeats(catalogue))
    return catalogue, left_out | {"artist_index": file_sha256(index) if index else None}


def one_split(
    catalogue: Catalogue, models: Path, device: str, results: Path, seen: Sequence[Path] = (), index: Path | None = None
) -> dict[str, Any]:
    """Score the networks below ``models`` on the songs of their split, or on all that they haven't ``seen``.

    Writes figures, predictions and pictures.
    """
    detector = GenreDetector(FUSION, models, device)
    left_out = None
    if seen:
        catalogue, left_out = only_unseen(detector, catalogue, seen, index)
    else:
        check_split(detector.members, catalogue)
    result, rows, outputs = evaluate(detector, catalogue)
    if left_out is not None:
        result["unseen"] = left_out
    _write_rows(results / "predictions.csv", rows)
    for name, scores in result["models"].items():
        test = scores["test"]
        title = f"{name}: {percent(test['song_accuracy'])} % of {test['songs']} test songs"
        draw_confusion(np.array(test["confusion"]), catalogue.genres, title, results / f"confusion_{name}.png")
    draw_reliability(outputs, "fusion", results / "reliability.png")
    write_json(results / "evaluation.json", result)
    return result


def protocol(name: str, folders: Sequence[Path], results: Path) -> dict[str, Any]:
    """Pool the rounds of a protocol; write figures, answers and pictures."""
    pool = read_rounds(folders)
    result = {"protocol": name, "rounds": len(folders), **pooled(pool, FUSION), "versions": library_versions()}
    figures = result["models"][FUSION]
    title = f"fusion, {name}: {percent(figures['mean'])} %, {len(folders)} rounds"
    confusion, path = np.array(figures["confusion"]), results / f"protocol_{name}_confusion.png"
    draw_confusion(confusion, pool.genres, title, path, "answers")
    outputs = {model: (probabilities, pool.labels) for model, probabilities in pool.outputs.items()}
    draw_reliability(outputs, f"{name}, {len(folders)} rounds", results / f"protocol_{name}_reliability.png")
    rows = [["round", "track", "genre", "model", *(f"p_{genre}" for genre in pool.genres)]]
    songs = [*zip(map(str, pool.rounds), pool.tracks, (pool.genres[label] for label in pool.labels), strict=True)]
    for model, (probabilities, _) in outputs.items():
        rows += [[*song, model, *(f"{p:.4g}" for p in row)] for song, row in zip(songs, probabilities, strict=True)]
    _write_rows(results / f"protocol_{name}_answers.csv", rows)
    write_json(results / f"protocol_{name}.json", result)
    return result


def _write_rows(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data", "--models", "--device", "--threads", "--json")
    add = parser.add_argument
    add(
        "--seen",
        type=path_name,
        nargs="+",
        default=[],
        metavar="LIST",
        help="score all songs but those in these lists, the training and validation lists of --models",
    )
    lines = "lines '<genre>/<file> ::: artist ::: title'"
    add("--artist-index", type=path_name, metavar="FILE", help=f"with --seen: {lines}")
    of_protocol = parser.add_argument_group("options of --protocol").add_argument
    add("--results", type=path_name, default=Path("results"), metavar="DIR", help="folder of the results")
    add("--update", type=path_name, nargs="+", default=[], metavar="FILE", help="documents to put the tables in")
    add("--protocol", choices=list(ROUNDS), help="train and score the pipeline over several splits")
    of_protocol("--rounds", type=positive_int, metavar="N", help="only the first N rounds of the protocol")
    of_protocol(
        "--split-lists",
        type=path_name,
        metavar="DIR",
        help="folder of {train,valid,test}_filtered.txt, for fault_filtered",
    )
    of_protocol("--runs", type=path_name, default=Path("runs"), metavar="DIR", help="folder of the rounds of protocols")
    of_protocol(
        "--jobs", type=positive_int, default=2, metavar="N", help="trainings of a protocol at once, one thread each"
    )
    of_protocol(
        "--training", default="", metavar="OPTIONS", help="options for the training scripts, such as '--epochs 12'"
    )
    args = parser.parse_args(argv)
    try:
        options = shlex.split(args.training)
    except ValueError as error:
        parser.error(f"--training {args.training}: {error}")
    if args.protocol == "fault_filtered" and not args.split_lists:
        parser.error("--protocol fault_filtered needs --split-lists")
    if args.artist_index and not args.seen:
        parser.error("--artist-index goes with --seen")
    if args.rounds and args.protocol and args.rounds > ROUNDS[args.protocol]:
        parser.error(f"--rounds is at most {ROUNDS[args.protocol]} for {args.protocol}")
    alone, together = ("models", "seen", "threads"), ("rounds", "split_lists", "runs", "jobs", "training")
    for name in alone if args.protocol else together:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} goes {'without' if args.protocol else 'with'} --protocol")
    kind = f" --protocol {args.protocol}" if args.protocol else " --seen" if args.seen else ""
    mark = f"evaluate.py{kind}"
    for document in args.update:
        with_tables(document, "", mark)  # a mistake here is told before minutes of work

    catalogue = read_catalogue(args.data)
    if args.protocol:
        rounds = args.rounds or ROUNDS[args.protocol]
        with ExitStack() as stack:
            for folder in {args.runs.resolve(), args.results.resolve()}:
                stack.enter_context(locked(folder))
            folders = run_rounds(
                catalogue, args.protocol, rounds, args.runs, args.split_lists, args.jobs, args.device, options
            )
            result = protocol(args.protocol, folders, args.results)
        text, parts, note = protocol_caption(result), protocol_tables(result), ""
    else:
        import torch

        torch.set_num_threads(args.threads)
        results = args.results / "unseen" if args.seen else args.results
        with locked(results):
            result = one_split(catalogue, args.models, args.device, results, args.seen, args.artist_index)
        text, parts, note = caption(result), tables(result), COMPOSITE
    for document in args.update:
        write_text(document, with_tables(document, markdown(text, parts, note), mark))
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print("\n\n".join([text, *(format_table(*part) for part in parts), *([note.lstrip("\\")] if note else [])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
