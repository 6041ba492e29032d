"""Score the released models on a folder of genre folders: music that neither training nor evaluation has seen.

Reads   DIR/<genre>/<song>, models/
Writes  nothing; prints accuracy with its 95 % interval and the recall of each genre

Example
    python benchmarks/score_folder.py my_music/
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import UserError, argument_parser, command, complain, format_table, progress  # noqa: E402
from detector_inputs import find_songs  # noqa: E402


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--device", "--threads")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder whose subfolders are named as the genres")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder of checkpoints; if not given, the one here")
    args = parser.parse_args(argv)

    import numpy as np
    import torch

    from evaluate import percent, score
    from genre_detector import GenreDetector

    torch.set_num_threads(args.threads)
    detector = GenreDetector(models=args.models, device=args.device)
    folders = [str(args.folder / genre) for genre in detector.genres if (args.folder / genre).is_dir()]
    analyses, labels = [], []
    for song, problem in progress([*find_songs(folders)], args.folder.name):
        try:
            if problem:
                raise problem
            analyses.append(detector.analyse(song))
            labels.append(detector.genres.index(Path(song).relative_to(args.folder).parts[0]))
        except UserError as error:
            complain(f"{error}; left out")
    if not labels:
        raise UserError(f"no songs in {args.folder}: expected folders named {', '.join(detector.genres)}")

    scores = {model: score(analyses, np.array(labels), detector.genres, model) for model in analyses[0].song}
    counts = np.bincount(labels, minlength=len(detector.genres))
    rows = [["accuracy, %", str(len(labels)), *(percent(s["song_accuracy"]) for s in scores.values())]]
    rows.append(["95 % interval", "", *("-".join(percent(end) for end in s["wilson_95"]) for s in scores.values())])
    rows += [
        [genre, str(count), *(percent(s["recall"][genre]) for s in scores.values())]
        for genre, count in zip(detector.genres, counts, strict=True)
        if count
    ]
    print(format_table(("", "songs", *scores), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
