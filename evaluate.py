"""Score the frozen networks and the fusion on held-out songs, through the detector's own predict path.

Every song is decoded and classified by ``GenreDetector``, which sees no labels; they are compared afterwards.
The validation figure stands beside the test figure: it chose thresholds, temperatures and the fusion.
``label_conditioned_composite`` is what the published method reports as accuracy: each class's best check of the
whole training, put together. No classifier has that accuracy.

Reads   data/metadata.json, data/processed/*_files.txt, the songs, models/
Writes  results/evaluation.json, results/predictions.csv, results/confusion_<model>.png

Examples
    python evaluate.py
    python evaluate.py --update README.md    # put the table between the marks in README.md
    python evaluate.py --json
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import (
    Catalogue,
    UserError,
    argument_parser,
    command,
    complain,
    file_sha256,
    format_table,
    library_versions,
    progress,
    read_catalogue,
    whole_file,
    write_json,
    write_text,
)
from genre_detector import FUSION, Analysis, GenreDetector
from predict import class_accuracies

RARE = 15  # songs: classes with fewer in the data set are also left out of a second figure
Z_95 = 1.959964


# ---------------------------------------------------------------- figures


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    part, square = right / count, Z_95**2
    centre = (part + square / (2 * count)) / (1 + square / count)
    half = Z_95 * math.sqrt(part * (1 - part) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error of the top probability, in equal bins (Guo et al., ICML 2017)."""
    top, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((top * bins).astype(int), bins - 1)
    gaps = [abs(top[which == b].mean() - right[which == b].mean()) * (which == b).mean() for b in np.unique(which)]
    return float(sum(gaps))


def score(analyses: Sequence[Analysis], labels: np.ndarray, genres: list[str], model: str) -> dict[str, Any]:
    """Figures of one model over songs: all of them parts of 1."""
    from sklearn.metrics import confusion_matrix, f1_score

    outputs = np.stack([analysis.song[model] for analysis in analyses])
    said = outputs.argmax(axis=1)
    right = said == labels
    windows = [(a.windows[model].argmax(axis=1) == label).mean() for a, label in zip(analyses, labels, strict=True)]
    return {
        "songs": len(labels),
        "song_accuracy": float(right.mean()),
        "wilson_95": wilson_interval(int(right.sum()), len(right)),
        "window_accuracy": float(np.mean(windows)),
        "macro_f1": float(f1_score(labels, said, average="macro", labels=np.unique(labels), zero_division=0)),
        "expected_calibration_error": calibration_error(np.exp(outputs), labels),
        "recall": dict(zip(genres, class_accuracies(right, labels, len(genres)), strict=True)),
        "confusion": confusion_matrix(labels, said, labels=range(len(genres))).tolist(),
    }


def accuracy_without(figures: dict[str, Any], genres: list[str], rare: list[str]) -> float:
    """Song accuracy over the songs of the other genres."""
    matrix = np.array(figures["confusion"])[[genre not in rare for genre in genres]]
    keep = np.flatnonzero([genre not in rare for genre in genres])
    return float(matrix[np.arange(len(keep)), keep].sum() / max(1, matrix.sum()))


# ---------------------------------------------------------------- predictions


def analyse_songs(detector: GenreDetector, catalogue: Catalogue, split: str) -> tuple[list[str], list[Analysis]]:
    """The detector's analysis of each song of a split; a song that can't be read is named and left out."""
    tracks, analyses = [], []
    for track in progress(catalogue.splits[split], split):
        try:
            analyses.append(detector.analyse(catalogue.audio_path(track)))
            tracks.append(track)
        except UserError as error:
            complain(f"{error}; left out of the figures")
    if not tracks:
        raise UserError(f"no song of the {split} split can be read: run prepare_gtzan_data.py again")
    return tracks, analyses


def evaluate(detector: GenreDetector, catalogue: Catalogue, models: Path) -> tuple[dict[str, Any], list[list[str]]]:
    """All figures, and each test song's predictions (track, genre, one column a model)."""
    from checkpoints import load_checkpoint
    from extract_model_features import MEMBERS

    names = [*MEMBERS, FUSION]
    scores: dict[str, dict[str, Any]] = {name: {} for name in names}
    rows: list[list[str]] = []
    for split in ("val", "test"):
        tracks, analyses = analyse_songs(detector, catalogue, split)
        labels = catalogue.labels(tracks)
        for name in names:
            scores[name][split] = score(analyses, labels, catalogue.genres, name)
    rows = [
        [track, catalogue.songs[track].genre, *(catalogue.genres[int(a.song[name].argmax())] for name in names)]
        for track, a in zip(tracks, analyses, strict=True)
    ]
    checkpoints = {}
    for name in MEMBERS:
        path = models / name / "model.safetensors"
        meta = load_checkpoint(path, f"{MEMBERS[name]}.py")[1]
        scores[name]["label_conditioned_composite"] = meta["label_conditioned_composite"]
        checkpoints[name] = {"sha256": file_sha256(path), "seed": meta["seed"], "windows": meta["progress"]["windows"]}
    songs = [song for song in catalogue.songs.values() if song.verdict == "ok"]
    count = {genre: sum(song.genre == genre for song in songs) for genre in catalogue.genres}
    rare = [genre for genre in catalogue.genres if count[genre] < RARE]
    return {
        "genres": catalogue.genres,
        "rare_genres": rare if len(rare) < len(catalogue.genres) else [],
        "split": catalogue.split,
        "songs": {split: len(tracks) for split, tracks in catalogue.splits.items()},
        "models": scores,
        "checkpoints": checkpoints,
        "versions": library_versions(),
    }, [["track", "genre", *names], *rows]


# ---------------------------------------------------------------- output


def percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f}"


def tables(result: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of the results table and of the recall table."""
    rare = result["rare_genres"]
    header = ["model", "test, %", "95 % interval", *([f"without {' and '.join(rare)}, %"] if rare else [])]
    header += ["windows, %", "macro-F1, %", "calibration error, %", "validation, %", "composite*, %"]
    rows = []
    for name, scores in result["models"].items():
        test = scores["test"]
        row = [name, percent(test["song_accuracy"]), "-".join(percent(end) for end in test["wilson_95"])]
        if rare:
            row.append(percent(accuracy_without(test, result["genres"], rare)))
        parts = [test["window_accuracy"], test["macro_f1"], test["expected_calibration_error"]]
        parts += [scores["val"]["song_accuracy"], scores.get("label_conditioned_composite")]
        rows.append([*row, *map(percent, parts)])
    confusion = np.array(result["models"][FUSION]["test"]["confusion"])
    recall = [
        [genre, str(songs), *(percent(scores["test"]["recall"][genre]) for scores in result["models"].values())]
        for genre, songs in zip(result["genres"], confusion.sum(axis=1), strict=True)
    ]
    return [(header, rows), (["recall, %", "test songs", *result["models"]], recall)]


def caption(result: dict[str, Any]) -> str:
    songs, split = result["songs"], result["split"]
    seeds = sorted({str(checkpoint["seed"]) for checkpoint in result["checkpoints"].values()})
    return (
        f"Split {split['name']}, split seed {split['seed']}: {songs['train']} training, {songs['val']} validation, "
        f"{songs['test']} test songs; training seed {', '.join(seeds)}; one run each."
    )


def markdown(result: dict[str, Any]) -> str:
    """The tables for a README."""
    parts = [caption(result)]
    for header, rows in tables(result):
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts.append(
        "\\* `label_conditioned_composite`: each class's best validation check of the whole training put together, "
        "as the published method reports; no classifier has this accuracy."
    )
    return "\n\n".join(parts)


def with_tables(path: Path, text: str) -> str:
    """A document with text between its marks ``<!-- evaluate.py -->`` and ``<!-- end -->``.

    Raises UserError if it is absent or has no marks.
    """
    pattern = re.compile(r"(<!-- evaluate\.py -->\n).*?(<!-- end -->)", re.DOTALL)
    try:
        document = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): name a document with --update") from None
    if not pattern.search(document):
        raise UserError(f"{path} has no '<!-- evaluate.py -->' and '<!-- end -->' lines to put the table between")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", document)


def draw_confusion(matrix: np.ndarray, genres: list[str], title: str, path: Path) -> None:
    """A picture of a confusion matrix: true genres down, predicted across, counts in the cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.5 * len(genres)
    figure, axes = pyplot.subplots(figsize=(size, size), layout="constrained")
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(genres)), genres, rotation=45, ha="right")
    axes.set_yticks(range(len(genres)), [f"{g} ({n})" for g, n in zip(genres, matrix.sum(axis=1), strict=True)])
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (songs)")
    axes.set_title(title)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            colour = "white" if parts[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data", "--models", "--device", "--threads", "--json")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--update", type=Path, nargs="*", default=[], metavar="FILE", help="documents to put the table in"
    )
    args = parser.parse_args(argv)
    for document in args.update:
        with_tables(document, "")  # a mistake here is told before minutes of work

    import torch

    torch.set_num_threads(args.threads)
    catalogue = read_catalogue(args.data)
    detector = GenreDetector(FUSION, args.models, args.device)
    if detector.meta["split"] != catalogue.split or detector.genres != catalogue.genres:
        raise UserError(
            f"the networks were trained on split {detector.meta['split']['name']!r}, seed "
            f"{detector.meta['split']['seed']}, not on the one in {args.data}: they may have seen its test songs"
        )
    result, rows = evaluate(detector, catalogue, args.models)
    write_json(args.results / "evaluation.json", result)
    with whole_file(args.results / "predictions.csv") as temporary, temporary.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    for name, scores in result["models"].items():
        test = scores["test"]
        title = f"{name}: {percent(test['song_accuracy'])} % of {test['songs']} test songs"
        draw_confusion(np.array(test["confusion"]), catalogue.genres, title, args.results / f"confusion_{name}.png")
    for document in args.update:
        write_text(document, with_tables(document, markdown(result)))
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(caption(result))
        for header, body in tables(result):
            print("\n" + format_table(header, body))
        print("\n* label_conditioned_composite: the published way of scoring; no classifier has this accuracy.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
