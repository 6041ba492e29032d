"""Results in words: the tables of ``evaluate.py`` and their captions, as plain text and in documents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError
from figures import accuracy_without
from genre_detector import FUSION
from protocols import ROUNDS, WHAT

Table = tuple[list[str], list[list[str]]]


def percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.1f}"


def without_empty(header: list[str], rows: list[list[str]]) -> Table:
    """A table without the columns that no row has a figure in: no song is left to validate refitted networks on."""
    kept = [any(row[column] != "-" for row in rows) for column in range(len(header))]
    return list(compress(header, kept)), [list(compress(row, kept)) for row in rows]


def tables(result: dict[str, Any]) -> list[Table]:
    """Header and rows of the results table and of the recall table of one split."""
    rare = result["rare_genres"]
    header = ["model", "test, %", "95 % interval", *([f"without {' and '.join(rare)}, %"] if rare else [])]
    header += ["windows, %", "macro-F1, %", "calibration error, %", "validation, %", "composite*, %"]
    rows = []
    for name, scores in result["models"].items():
        test = scores["test"]
        row = [name, percent(test["song_accuracy"]), "-".join(percent(end) for end in test["wilson_95"])]
        if rare:
            row.append(percent(accuracy_without(test["confusion"], result["genres"], rare)))
        parts = [test["window_accuracy"], test["macro_f1"], test["expected_calibration_error"]]
        parts += [scores.get("val", {}).get("song_accuracy"), scores.get("label_conditioned_composite")]
        rows.append([*row, *map(percent, parts)])
    figures = {name: scores["test"] for name, scores in result["models"].items()}
    return [without_empty(header, rows), recall_table(result, figures)]


def recall_table(result: dict[str, Any], figures: dict[str, dict[str, Any]], counted: str = "test songs") -> Table:
    songs = np.array(figures[FUSION]["confusion"]).sum(axis=1)
    return ["recall, %", counted, *figures], [
        [genre, str(count), *(percent(scores["recall"][genre]) for scores in figures.values())]
        for genre, count in zip(result["genres"], songs, strict=True)
    ]


def protocol_tables(result: dict[str, Any]) -> list[Table]:
    """The same of the pooled rounds of a protocol."""
    rare = result["rare_genres"]
    header = ["model", "mean, %", "spread", "pooled 95 %", "over artists 95 %"]
    header += [f"without {' and '.join(rare)}, %"] if rare else []
    header += ["macro-F1, %", "calibration error, %", "validation, %", "rounds, %"]
    rows = []
    for name, scores in result["models"].items():
        if name == "average" and any(result["refit"]):  # the fusion is that
            continue
        row = [name, percent(scores["mean"]), percent(scores["spread"])]
        row += ["-".join(map(percent, scores[key] or [None])) for key in ("wilson_95", "artists_95")]
        if rare:
            row.append(percent(scores["without_rare"]))
        row += [percent(scores.get(key)) for key in ("macro_f1", "expected_calibration_error", "validation")]
        rows.append([*row, " ".join(percent(part) for part in scores["by_round"])])
    members = {name: scores for name, scores in result["models"].items() if "recall" in scores and name != "average"}
    return [without_empty(header, rows), recall_table(result, members, "answers")]


def either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def refit_words(epochs: Sequence[int]) -> str:
    return f" {either(epochs)} more epochs on training and validation songs." if any(epochs) else ""


def chance_words(figures: dict[str, Any]) -> str:
    mean, high = (percent(part) for part in figures["perfect_calibration_error"])
    return (
        f" By chance alone its calibration error would be {mean} % on average, up to {high} % in 95 of 100 cases, and "
        "more in truth, as songs of one artist are alike."
    )


def unnamed_words(named: dict[str, int] | None, answers: int) -> str:
    """How many test songs of a split by artist have no known one, and what the fusion has without them."""
    if named is None or not 0 < named["answers"] < answers:
        return ""
    return (
        f" {answers - named['answers']} answers are about songs by unknown artists, some of whom may be on both sides: "
        f"without these the fusion has {percent(named['right'] / named['answers'])} %."
    )


def caption(result: dict[str, Any]) -> str:
    songs, split = result["songs"], result["split"]
    seeds, refits = (
        sorted({checkpoint[key] for checkpoint in result["checkpoints"].values()}) for key in ("seed", "refit")
    )
    test = result["models"][FUSION]["test"]
    by_artist = "unseen" in result or split["method"] != "random"
    unnamed = unnamed_words(test["named_artists"], test["songs"]) if by_artist else ""
    sure, unread = test["confident"], songs["test"] - test["songs"]
    if "unseen" in result:
        words = f"{test['songs']} songs that the networks have not seen{unseen_words(result['unseen'])}"
    else:
        words = f"Split {split['name']}, split seed {split['seed']}: {songs['train']} training, "
        words += f"{songs['val']} validation, {test['songs']} test songs"
    if unread:
        words += f"; {unread} more can't be read, or are not the files that were prepared"
    return (
        f"{words}; training seed {either(seeds)}; one run each.{refit_words(refits)} The fusion is right with "
        f"{sure['right']} of {sure['answers']} answers that it calls confident.{chance_words(test)}{unnamed}"
    )


def unseen_words(left: dict[str, Any]) -> str:
    by_artist = "" if left["artist"] is None else f"{left['artist']} by artists of these, "
    words = f"; left out are {left['listed']} that they have, {by_artist}{left['repeat']} that repeat one of them"
    if left["absent"]:
        words += f"; repeats of {left['absent']} that they have seen can't be told, as those are not here"
    return words + ("; artists are not known and may be those that they have heard" if left["artist"] is None else "")


def protocol_caption(result: dict[str, Any]) -> str:
    gain, rounds = result["fusion_against_best"], result["rounds"]
    low, high = (f"{100 * end:+.1f}" for end in gain["bootstrap_95"])
    over, chance = gain["bootstrap_over"], chance_words(result["models"][FUSION])
    unnamed = "" if result["protocol"] == "random" else unnamed_words(result.get("named_artists"), result["songs"])
    return (
        f"Protocol {result['protocol']}: {rounds} of {ROUNDS[result['protocol']]} {WHAT[result['protocol']]}; "
        f"{either(result['epochs'])} epochs; {result['songs']} answers about "
        f"{result['different_songs']} different test songs.{refit_words(result['refit'])} The fusion is "
        f"{100 * gain['difference']:+.1f} points from its best member, {result['best_member']} (bootstrap "
        f"over {over} {low} to {high}, McNemar p {gain['mcnemar_p']:.2g}).{chance}{unnamed} "
        "Spread: standard deviation of the rounds. Means are over rounds, differences over pooled answers. "
        "Pooled 95 % and p take answers as independent, which those about one song or one artist are not."
        + (" After a refit a round's fusion is the average, nothing is fitted." if any(result["refit"]) else "")
    )


def markdown(text: str, parts: Sequence[Table], note: str = "") -> str:
    """Caption, tables and note for a README."""
    blocks = [text]
    for header, rows in parts:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        blocks.append("\n".join("| " + " | ".join(line) + " |" for line in cells))
    return "\n\n".join([*blocks, *([note] if note else [])])


COMPOSITE = (
    "\\* `label_conditioned_composite`: each class's best validation check of the whole schedule put together. "
    "The published method counts in this way where classes graduate; no classifier has this accuracy."
)


def with_tables(path: Path, text: str, mark: str) -> str:
    """A document with text between ``<!-- mark -->`` and the next ``<!-- end -->``.

    Raises UserError if it is absent or has no marks.
    """
    pattern = re.compile(rf"(<!-- {re.escape(mark)} -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
    try:
        document = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): name a document with --update") from None
    if not pattern.search(document):
        raise UserError(f"{path} has no '<!-- {mark} -->' and '<!-- end -->' lines to put the table between")
    return pattern.sub(lambda match: f"{match[1]}{text}\n{match[2]}", document)
