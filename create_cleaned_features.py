"""Remove the dimensions of the 896-d features that hardly vary, and save which ones are kept.

A unit that is the same for every song carries nothing and makes a classifier's problem ill-conditioned. The
selector (scikit-learn's VarianceThreshold) is fitted on training and validation songs and applied to all.

Reads   data/fusion_features/{train,val,test}_features.npy
Writes  data/fusion_features/{train,val,test}_features_cleaned.npy  float32 (songs, kept)
        data/fusion_features/selector.npy                           bool (896,): True where kept
Next    verify_model_features.py

Example
    python create_cleaned_features.py --threshold 1e-4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from catalogue import SPLITS
from common import UserError, argument_parser, command, complain, format_table, number
from extract_model_features import read_provenance
from files import locked, read_array, write_array


def _run(args: argparse.Namespace) -> int:
    from sklearn.feature_selection import VarianceThreshold

    maker = "extract_model_features.py"
    folder = args.data / "fusion_features"
    sizes = read_provenance(folder)["sizes"]
    here = [split for split in SPLITS if (folder / f"{split}_features.npy").exists()]
    features = {split: read_array(folder / f"{split}_features.npy", maker) for split in here or SPLITS}
    learned = [features[split] for split in ("train", "val") if split in features]
    for split in SPLITS:
        if split not in features:
            complain(f"no {split} rows are there: {maker} makes them; going on without")
    if not learned:
        raise UserError(f"only test rows are there: run {maker} again")
    try:
        selector = VarianceThreshold(args.threshold).fit(np.concatenate(learned))
        cleaned = {split: selector.transform(array) for split, array in features.items()}
    except (ValueError, TypeError) as error:
        problem = f"the features can't be cleaned ({error})"
        remedy = f"try a smaller --threshold, train the networks for longer, or run {maker} again if files are damaged"
        raise UserError(f"{problem}: {remedy}") from None
    kept = selector.get_support()
    for split, array in cleaned.items():
        write_array(folder / f"{split}_features_cleaned.npy", array)
    write_array(folder / "selector.npy", kept)

    rows, first = [], 0
    for name, size in sizes.items():
        part = kept[first : first + size]
        rows.append([name, size, int((~part).sum()), int(part.sum())])
        first += size
    rows.append(["all", len(kept), int((~kept).sum()), int(kept.sum())])
    print(format_table(("features of", "dimensions", "removed", "kept"), rows))
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    parser.add_argument(
        "--threshold", type=number(float), default=1e-4, metavar="X", help="variance up to which a dimension is removed"
    )
    args = parser.parse_args(argv)
    with locked(args.data):
        return _run(args)


if __name__ == "__main__":
    sys.exit(main())
