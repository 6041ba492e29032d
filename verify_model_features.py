"""Check the fusion's feature files and say whether they can be used.

Of features, cleaned features and log-probabilities: shape, NaN and infinity, constant dimensions, what selector.npy
keeps, labels and tracks against the catalogue, whose splits share no song. Linear separability: a cross-validated
logistic regression on the held-out validation songs must beat guessing (not after a --refit: then they aren't held
out).
Test rows are checked for form only; their labels play no part.

Reads   data/metadata.json, data/fusion_features/
Writes  nothing; prints a verdict, exit code 1 when a file is unusable
Next    train_fusion.py

Example
    python verify_model_features.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from catalogue import SPLITS, Catalogue, read_catalogue
from common import argument_parser, command, format_table
from extract_model_features import read_provenance
from files import read_array

KINDS = {  # of tables, and the script that makes each
    "features": "extract_model_features.py",
    "features_cleaned": "create_cleaned_features.py",
    "log_probabilities": "extract_model_features.py",
}
FEWEST = 30  # validation songs of genres with two or more: with less, a classifier's accuracy is chance


def rows_problems(
    features: np.ndarray, labels: np.ndarray, tracks: np.ndarray, catalogue: Catalogue, split: str
) -> list[str]:
    """What makes one split's rows unusable; empty when nothing does."""
    problems = []
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not features.size:
        return [f"features are {features.dtype} {features.shape}, not a table of numbers"]
    for name, values, kind in (("labels", labels, "i"), ("tracks", tracks, "U")):
        if values.shape != (len(features),) or values.dtype.kind != kind:
            return [f"{name} are {values.dtype} {values.shape}, {len(features)} rows need one each"]
    if not np.isfinite(features).all():
        problems.append(f"{int((~np.isfinite(features)).any(axis=1).sum())} rows hold NaN or infinity")
    names = [str(track) for track in tracks]
    if len(set(names)) != len(names):
        problems.append("a song has two rows")
    if names != catalogue.splits[split]:
        problems.append("the songs are not those of the split in use")
    elif not np.array_equal(labels, catalogue.labels(names)):
        problems.append("labels are not those of the catalogue")
    return problems


def flat_outputs(outputs: np.ndarray, members: int, classes: int) -> np.ndarray:
    """Log-probabilities (songs, members, classes) as a table (songs, members * classes); what isn't so, as it is."""
    return outputs.reshape(len(outputs), members * classes) if outputs.shape[1:] == (members, classes) else outputs


def is_cleaned(cleaned: np.ndarray, whole: np.ndarray, selector: np.ndarray) -> bool:
    """Whether ``cleaned`` are the columns of ``whole`` that ``selector``, bool (dimensions,), keeps."""
    fits = selector.dtype == bool and selector.shape == whole.shape[1:]
    return fits and cleaned.dtype == whole.dtype and np.array_equal(cleaned, whole[:, selector])


def linear_separability(features: np.ndarray, labels: np.ndarray) -> tuple[float, float] | None:
    """Accuracy of a cross-validated linear classifier, and that of always saying the commonest class.

    None with too few songs to tell. Classes of one song are left out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = np.bincount(labels)
    common = np.flatnonzero(count >= 2)
    use = np.isin(labels, common)
    if len(common) < 2 or use.sum() < FEWEST:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    folds = StratifiedKFold(min(5, int(count[common].min())), shuffle=True, random_state=0)
    said = cross_val_predict(model, features[use], labels[use], cv=folds)
    return float((said == labels[use]).mean()), float(count.max() / use.sum())


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = argument_parser(__doc__, "--data").parse_args(argv)
    catalogue = read_catalogue(args.data)
    folder = args.data / "fusion_features"
    problems: list[str] = []
    provenance = read_provenance(folder)
    members, held_out = provenance["members"], provenance["held_out"]["val"]
    separable = f"{'too few' if held_out else 'no held-out'} validation songs for a linear classifier"
    table = []
    selector = read_array(folder / "selector.npy", "create_cleaned_features.py")
    for split in SPLITS:
        labels = read_array(folder / f"{split}_labels.npy", "extract_model_features.py")
        names = read_array(folder / f"{split}_tracks.npy", "extract_model_features.py")
        arrays = {kind: read_array(folder / f"{split}_{kind}.npy", maker) for kind, maker in KINDS.items()}
        cleaned_is_so = is_cleaned(arrays["features_cleaned"], arrays["features"], selector)
        arrays["log_probabilities"] = flat_outputs(arrays["log_probabilities"], len(members), len(catalogue.genres))
        for kind, features in arrays.items():
            found = rows_problems(features, labels, names, catalogue, split)
            constant = int((np.ptp(features, axis=0) == 0).sum()) if not found and len(features) > 1 else 0
            if kind == "features_cleaned" and split == "train" and constant:
                found.append(f"{constant} cleaned dimensions are constant over the training songs")
            if kind == "features_cleaned" and not found and not cleaned_is_so:
                found.append("not what selector.npy keeps of the features")
            problems += [f"{split}_{kind}.npy: {problem}; {KINDS[kind]} makes it" for problem in found]
            shape = features.shape if features.ndim == 2 else ("-", "-")
            table.append([f"{split}_{kind}", *shape, constant, "unusable" if found else "good"])
            if kind == "features_cleaned" and split == "val" and held_out and not found:
                figures = linear_separability(features, labels)
                if figures is not None:
                    accuracy, guess = (100 * part for part in figures)
                    separable = f"a linear classifier on validation songs gets {accuracy:.1f} %, guessing {guess:.1f} %"
                    if accuracy <= guess:
                        problems.append(f"val_{kind}.npy: {separable}")
    print(format_table(("file", "songs", "dimensions", "constant", "verdict"), table))
    if not problems:
        print(f"usable; {separable}")
        return 0
    for problem in problems:
        print(f"unusable: {problem}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
