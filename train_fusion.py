"""Fit the fusion of the three networks on held-out songs, and choose it by validation.

Every candidate ends as one linear map from the members' outputs to the classes:
    average    mean of the members' calibrated log-probabilities; nothing is fitted
    weighted   the same with one weight a member
    stacked    logistic regression on the members' log-probabilities
    features   logistic regression on the cleaned features

They are compared by cross-validation on the validation songs, which no member was trained on, with an artist's
songs kept together. The average is kept unless another's log-loss is better by more than its standard error:
with a hundred songs, less is chance. Rows of training songs are in-sample and never used.

With --rounds the fusion learns from more songs: from what the networks of cross-validation rounds, trained by the
same recipe, said of the songs that each of them was not trained on (evaluate.py --protocol artist). Test songs of the
split in use are left out. Features of different networks have no axes in common, so that candidate is left out too.
After a --refit of the networks no validation song is held out: without --rounds the fusion is then the average with
nothing fitted, and calls no answer confident. So it is where all of these songs are of one artist.

Reads   data/metadata.json, data/fusion_features/; with --rounds <round>/data/ and <round>/results/
Writes  models/fusion_progressive/model.safetensors
Next    evaluate.py, genre_detector.py

Example
    python train_fusion.py --seed 0
    python train_fusion.py --rounds runs/artist_*
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from catalogue import Catalogue, artist_key, read_catalogue, read_repeats
from checkpoints import load_checkpoint, save_checkpoint
from common import UserError, argument_parser, command, format_table, library_versions, path_name
from extract_model_features import read_provenance
from figures import calibration_error, confidence_threshold, fit_temperature
from files import file_sha256, locked, read_array
from predict import is_confident, log_softmax
from rules import ADDED
from splits import track_groups
from verify_model_features import flat_outputs, rows_problems

MADE_BY = "train_fusion.py"
EXTRACTOR = "extract_model_features.py"


@dataclass(frozen=True)
class Fusion:
    """A linear map from the members' outputs to class scores.

    ``coefficients`` float32 (inputs, classes) and ``intercept`` float32 (classes,); the inputs are the members'
    log-probabilities, flattened member by member, or the kept dimensions of the 896-d feature.
    """

    kind: str
    coefficients: np.ndarray
    intercept: np.ndarray
    kept: np.ndarray  # int64: which of the 896 are used; empty when log-probabilities are
    temperature: float = 1.0

    def __call__(self, log_probabilities: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Log-probabilities (rows, classes) from (rows, members, classes) and (rows, 896)."""
        inputs = features[:, self.kept] if len(self.kept) else log_probabilities.reshape(len(log_probabilities), -1)
        return log_softmax(inputs.astype(np.float64) @ self.coefficients + self.intercept, self.temperature)


def fusion_path(models: Path) -> Path:
    return models / "fusion_progressive" / "model.safetensors"


def load_fusion(models: Path) -> tuple[Fusion, dict[str, Any]]:
    """The fusion in a models folder and its meta. Raises UserError if it is absent, broken or of wrong shape."""
    path = fusion_path(models)
    tensors, meta = load_checkpoint(path, MADE_BY)
    try:
        fusion = Fusion(
            meta["kind"],
            tensors["coefficients"].numpy(),
            tensors["intercept"].numpy(),
            tensors["kept"].numpy(),
            meta["temperature"],
        )
        inputs = len(fusion.kept) or len(meta["members"]) * len(meta["genres"])
        if fusion.coefficients.shape != (inputs, len(meta["genres"])) or fusion.intercept.shape != (
            len(meta["genres"]),
        ):
            raise ValueError(f"coefficients of shape {fusion.coefficients.shape}")
        if not fusion.coefficients.dtype == fusion.intercept.dtype == np.float32:
            raise ValueError(f"coefficients of type {fusion.coefficients.dtype}")
        if fusion.kept.dtype != np.int64 or fusion.kept.ndim != 1 or fusion.kept.min(initial=0) < 0:
            raise ValueError("kept are no numbers of features")
        if not isinstance(meta["members"], dict):
            raise ValueError("members without sums")
        if not (0 < fusion.temperature < np.inf and 0 <= meta["min_confidence"] <= 1 and meta["genres"]):
            raise ValueError("temperature, min_confidence or genres")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no fusion ({error}): run {MADE_BY} again") from None
    return fusion, meta


def save_fusion(path: Path, fusion: Fusion, meta: Mapping[str, Any]) -> None:
    import torch

    arrays = {"coefficients": fusion.coefficients, "intercept": fusion.intercept, "kept": fusion.kept}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_checkpoint(path, tensors, {**meta, "kind": fusion.kind, "temperature": fusion.temperature})


# ---------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Rows:
    """Held-out songs: (songs, members, classes), (songs, 896), (songs,)."""

    log_probabilities: np.ndarray
    features: np.ndarray
    labels: np.ndarray
    kept: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # which of the 896 vary

    def __getitem__(self, index: np.ndarray) -> Rows:
        return Rows(self.log_probabilities[index], self.features[index], self.labels[index], self.kept)


def weighted_fusion(weights: np.ndarray, classes: int) -> Fusion:
    """The log-probabilities of member m times weights[m], summed."""
    return Fusion(
        "weighted" if np.ptp(weights) else "average",
        np.kron(weights[:, None], np.eye(classes)).astype(np.float32),
        np.zeros(classes, dtype=np.float32),
        np.zeros(0, dtype=np.int64),
    )


def fit_average(rows: Rows) -> Fusion:
    members, classes = rows.log_probabilities.shape[1:]
    return weighted_fusion(np.full(members, 1 / members), classes)


def fit_weighted(rows: Rows) -> Fusion:
    """Weights on the simplex with the least log-loss, drawn towards equal ones as strongly as ten songs would."""
    from scipy.optimize import minimize
    from scipy.special import softmax

    members, classes = rows.log_probabilities.shape[1:]

    def loss(scores: np.ndarray) -> float:
        outputs = weighted_fusion(softmax(scores), classes)(rows.log_probabilities, rows.features)
        return log_loss(outputs, rows.labels).sum() + 10 * float(np.square(scores).sum())

    scores = minimize(loss, np.zeros(members), method="Nelder-Mead").x
    return weighted_fusion(softmax(scores), classes)


def _fit_linear(kind: str, inputs: np.ndarray, labels: np.ndarray, classes: int, kept: np.ndarray, c: float) -> Fusion:
    """Logistic regression on standardised inputs, folded into one linear map; unseen classes get a low score."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    coefficients = np.zeros((inputs.shape[1], classes))
    intercept = np.full(classes, -10.0)
    if len(set(labels.tolist())) == 1:  # nothing to tell apart
        intercept[labels[0]] = 0
        return Fusion(kind, coefficients.astype(np.float32), intercept.astype(np.float32), kept)
    model = LogisticRegression(C=c, max_iter=2000).fit((inputs - mean) / scale, labels)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients[:, model.classes_] = np.concatenate([-model.coef_, model.coef_]).T / 2 / scale[:, None]
        intercept[model.classes_] = np.array([-1, 1]) * model.intercept_[0] / 2
    else:
        coefficients[:, model.classes_] = model.coef_.T / scale[:, None]
        intercept[model.classes_] = model.intercept_
    intercept -= mean @ coefficients
    return Fusion(kind, coefficients.astype(np.float32), intercept.astype(np.float32), kept)


def fit_stacked(rows: Rows) -> Fusion:
    classes = rows.log_probabilities.shape[2]
    inputs = rows.log_probabilities.reshape(len(rows.labels), -1)
    return _fit_linear("stacked", inputs, rows.labels, classes, np.zeros(0, dtype=np.int64), c=0.03)


def fit_features(rows: Rows) -> Fusion:
    classes = rows.log_probabilities.shape[2]
    return _fit_linear("features", rows.features[:, rows.kept], rows.labels, classes, rows.kept, c=0.003)


CANDIDATES: dict[str, Callable[[Rows], Fusion]] = {
    "average": fit_average,
    "weighted": fit_weighted,
    "stacked": fit_stacked,
    "features": fit_features,
}


# ---------------------------------------------------------------- choice


def log_loss(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each row's negative log-probability of its label."""
    return -outputs[np.arange(len(labels)), labels]


def cross_validated(fit: Callable[[Rows], Fusion], rows: Rows, folds: list) -> np.ndarray:
    """Log-probabilities (songs, classes) of each song by a fusion fitted without its fold."""
    outputs = np.empty((len(rows.labels), rows.log_probabilities.shape[2]))
    for rest, held in folds:
        outputs[held] = fit(rows[rest])(rows.log_probabilities[held], rows.features[held])
    return outputs


def choose(losses: dict[str, np.ndarray]) -> str:
    """The candidate with the least mean loss, if that is below the average's by more than a standard error."""
    best = min(losses, key=lambda name: losses[name].mean())
    gain = losses["average"] - losses[best]
    return best if gain.mean() > gain.std() / np.sqrt(len(gain)) else "average"


def artist_folds(
    catalogue: Catalogue, tracks: Sequence[str], repeats: Iterable[tuple[str, str]], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Up to five folds of songs, an artist's songs together and ``repeats`` too; none if all are of one artist."""
    from sklearn.model_selection import GroupKFold

    artists = [artist_key(catalogue.songs[track].artist) or track for track in tracks]
    numbers = track_groups(tracks, artists, repeats).tolist()
    names: dict[int, str] = {}  # of groups: numbers would be shuffled into other folds than those of older results
    for number, artist in sorted(zip(numbers, artists, strict=True)):
        names.setdefault(number, artist)
    if len(names) < 2:
        return []
    folds = GroupKFold(min(5, len(names)), shuffle=True, random_state=seed)
    return list(folds.split(tracks, groups=[names[number] for number in numbers]))


def held_out_rows(folder: Path, catalogue: Catalogue, members: int) -> tuple[Rows, list[str]]:
    """The validation songs' rows of ``extract_model_features.py``, and their tracks. Raises UserError if unusable."""
    names = ("log_probabilities", "features", "labels", "tracks")
    outputs, features, labels, tracks = (read_array(folder / f"val_{name}.npy", EXTRACTOR) for name in names)
    for name, table in zip(names, (flat_outputs(outputs, members, len(catalogue.genres)), features), strict=False):
        if problems := rows_problems(table, labels, tracks, catalogue, "val"):
            raise UserError(f"{folder / f'val_{name}.npy'} is unusable, {problems[0]}: run {EXTRACTOR} again")
    selector = read_array(folder / "selector.npy", "create_cleaned_features.py")
    if selector.shape != features.shape[1:]:
        raise UserError(f"{folder / 'selector.npy'} is of other features: run create_cleaned_features.py again")
    return Rows(outputs, features, labels, np.flatnonzero(selector)), tracks.tolist()


def round_rows(
    folders: Sequence[Path], catalogue: Catalogue, members: Mapping[str, Any]
) -> tuple[Rows, list[str], list[str]]:
    """What the networks of rounds said of songs that they weren't trained on, those songs, and the split hashes.

    ``members`` are the settings of the networks to be fused, by name. Rows have no features. Raises UserError if the
    rounds know other genres or were trained with other settings, if none of their songs may be used, or if their
    networks know the artists of their test songs, as those of an artist split don't.
    """
    from protocols import read_rounds

    pool = read_rounds(folders)
    recipes = {name: ADDED | {"refit": 0} | values for name, values in members.items()}
    if pool.genres != catalogue.genres or pool.settings != recipes:
        raise UserError("the rounds have other genres or settings than the networks: train both alike")
    usable = {*catalogue.splits["train"], *catalogue.splits["val"]}
    use = np.array([track in usable for track in pool.tracks], dtype=bool)
    if len(set(pool.tracks[use])) < use.sum():
        raise UserError("the rounds test a song more than once, as if it were several: take those of artist folds")
    if not use.any():
        raise UserError(f"no training or validation song of {catalogue.data} is a test song of these rounds")
    outputs = np.stack([pool.outputs[name][use] for name in members], axis=1)
    rows = Rows(np.log(np.maximum(outputs, np.finfo(float).tiny)), np.zeros((len(outputs), 0)), pool.labels[use])
    for folder, split in zip(folders, pool.splits, strict=True):
        if catalogue.split.get("method") == "artist" != split.get("method"):
            raise UserError(
                f"{folder} is no artist fold, its networks know artists of its test songs: take artist folds"
            )
    return rows, pool.tracks[use].tolist(), [split["sha256"]["test"] for split in pool.splits]


def check_networks(provenance: Mapping[str, Any], catalogue: Catalogue, models: Path) -> None:
    """Raise UserError unless the features are of the networks in a models folder and of a catalogue's split."""
    again = f"run {EXTRACTOR} again"
    if provenance["split"] != catalogue.split:
        raise UserError(f"the features are of another split than the one in {catalogue.data}: {again}")
    for name, made in provenance["members"].items():
        network = models / name / "model.safetensors"
        problem = ""
        if not network.exists():
            problem = f"{models} has no {name}"
        elif file_sha256(network) != made:
            problem = f"the features are of another {name} than the one in {models}"
        if problem:
            raise UserError(f"{problem}: name the folder of the networks with --models, or {again}")


def _run(args: argparse.Namespace) -> int:
    folder = args.data / "fusion_features"
    provenance = read_provenance(folder)
    catalogue = read_catalogue(args.data)
    check_networks(provenance, catalogue, args.models)
    meta = {
        "network": "fusion",
        "genres": catalogue.genres,
        "members": provenance["members"],
        "split": catalogue.split,
        "seed": args.seed,
        "versions": library_versions(),
    }
    members, target = len(provenance["members"]), fusion_path(args.models)
    candidates, source, hashes = dict(CANDIDATES), "validation songs", list[str]()
    rows, tracks = None, list[str]()
    if args.rounds:
        del candidates["features"]
        source = "songs of cross-validation rounds"
        rows, tracks, hashes = round_rows(args.rounds, catalogue, provenance["settings"])
    elif provenance["held_out"]["val"]:
        rows, tracks = held_out_rows(folder, catalogue, members)
        if read_provenance(folder) != provenance:
            raise UserError(f"{folder} has changed meanwhile: run create_cleaned_features.py, then this again")
    folds = artist_folds(catalogue, tracks, read_repeats(catalogue), args.seed)
    if rows is None or not folds:
        nothing = {"min_confidence": 1.0, "fitted_on": {"what": "nothing", "songs": 0, "rounds": []}, "candidates": {}}
        save_fusion(target, weighted_fusion(np.full(members, 1 / members), len(catalogue.genres)), meta | nothing)
        problem = (
            "The networks know the validation songs" if rows is None else f"The {source} are one song, or of one artist"
        )
        print(f"{problem}: the fusion is the average of the networks, and calls no answer confident.")
        return 0

    outputs = {name: cross_validated(fit, rows, folds) for name, fit in candidates.items()}
    losses = {name: log_loss(values, rows.labels) for name, values in outputs.items()}
    chosen = choose(losses)
    temperature = fit_temperature(outputs[chosen], rows.labels)
    held_out = log_softmax(outputs[chosen], temperature)
    min_confidence = confidence_threshold(held_out, rows.labels)
    figures = {
        name: {"accuracy": float((v.argmax(1) == rows.labels).mean()), "log_loss": float(losses[name].mean())}
        for name, v in outputs.items()
    }
    fitted = {
        "min_confidence": min_confidence,
        "fitted_on": {"what": source, "songs": len(tracks), "rounds": hashes},
        "candidates": figures,
    }
    save_fusion(target, replace(candidates[chosen](rows), temperature=temperature), meta | fitted)
    report(rows, list(provenance["members"]), source, figures, chosen)
    sure = np.exp(held_out)
    confident = f"Confident from {min_confidence:.2f} on" if min_confidence < 1 else "Confident"
    print(
        f"Temperature {temperature:.2f}, calibration error {100 * calibration_error(sure, rows.labels):.1f} %. "
        f"{confident}: {100 * is_confident(sure.max(axis=1), min_confidence).mean():.0f} % of them."
    )
    return 0


def report(
    rows: Rows, members: Sequence[str], source: str, figures: Mapping[str, Mapping[str, float]], chosen: str
) -> None:
    """Print how often members and candidates are right."""
    right = rows.log_probabilities.argmax(2) == rows.labels[:, None]
    table = [[name, f"{100 * part:.1f}", ""] for name, part in zip(members, right.mean(axis=0), strict=True)]
    for name, f in figures.items():
        mark = " (chosen)" if name == chosen else ""
        table.append([f"fusion: {name}{mark}", f"{100 * f['accuracy']:.1f}", f"{f['log_loss']:.3f}"])
    table.append(["any member right", f"{100 * right.any(axis=1).mean():.1f}", ""])
    print(format_table((f"{len(rows.labels)} {source}", "accuracy, %", "log-loss"), table))


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data", "--models", "--seed")
    parser.add_argument(
        "--rounds",
        type=path_name,
        nargs="+",
        metavar="DIR",
        help="rounds of evaluate.py --protocol to learn from, as runs/artist_*",
    )
    args = parser.parse_args(argv)
    with locked(fusion_path(args.models).parent):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
