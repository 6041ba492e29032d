"""Score the released models on a folder of genre folders: music that neither training nor evaluation has seen.

Reads   DIR/<genre>/<song>, models/
Prints  accuracy with its 95 % interval, calibration error, the recall of each genre, and how many
        answers of the fusion are confident and how many of these right

Examples
    python benchmarks/score_folder.py my_music/
    python benchmarks/score_folder.py my_music/ --start 12 --duration 3 --min-confidence 0.8    # of a part of each song
    python benchmarks/score_folder.py my_music/ --silence 2    # of copies with silence around the song
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import UserError, argument_parser, command, complain, format_table, fraction, path_name, progress, seconds  # noqa: E402
from decoding import SAMPLE_RATE, decode  # noqa: E402
from detector_inputs import Heard, find_songs, listen  # noqa: E402


def listen_amid_silence(song: str, silence: float, start: float, duration: float | None) -> Heard:
    """``listen`` to a copy of a part of a song with so many seconds of silence before and after it."""
    import numpy as np
    import soundfile

    part = decode(Path(song), start, duration).samples
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "song.wav"
        soundfile.write(copy, np.pad(part, round(silence * SAMPLE_RATE)), SAMPLE_RATE, subtype="FLOAT")
        return listen(copy)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--device", "--threads")
    parser.add_argument("folder", type=path_name, metavar="DIR", help="folder whose subfolders are named as the genres")
    parser.add_argument("--models", type=path_name, metavar="DIR", help="folder of checkpoints; else the released ones")
    parser.add_argument("--start", type=seconds, default=0.0, metavar="S", help="seconds left out at the start")
    parser.add_argument("--duration", type=seconds, metavar="S", help="seconds used; if not given, to the end")
    parser.add_argument("--silence", type=seconds, default=0.0, metavar="S", help="seconds of it put around each song")
    parser.add_argument("--min-confidence", type=fraction, metavar="P", help="if not given, the model's own")
    args = parser.parse_args(argv)

    import numpy as np
    import torch

    from evaluate import score
    from genre_detector import FUSION, GenreDetector
    from tables import chance_words, percent

    torch.set_num_threads(args.threads)
    detector = GenreDetector(models=args.models, device=args.device, min_confidence=args.min_confidence)
    folders = [str(args.folder / genre) for genre in detector.genres if (args.folder / genre).is_dir()]
    for other in sorted({path.name for path in args.folder.glob("[!.]*") if path.is_dir()} - {*detector.genres}):
        complain(f"{args.folder / other}: no genre of these networks; left out")
    analyses, labels, confident = [], [], []
    for song, problem in progress([*find_songs(folders)], args.folder.name):
        try:
            if problem:
                raise problem
            part = args.start, args.duration
            heard = listen_amid_silence(song, args.silence, *part) if args.silence else listen(song, *part)
            analyses.append(detector.judge(heard))
            confident.append(detector.conclude(song, heard, analyses[-1]).confident)
            labels.append(detector.genres.index(Path(song).relative_to(args.folder).parts[0]))
        except UserError as error:
            complain(f"{error}; left out")
    if not labels:
        raise UserError(f"no songs in {args.folder}: expected folders named {', '.join(detector.genres)}")

    scores = {model: score(analyses, np.array(labels), detector.genres, model) for model in analyses[0].song}
    counts = np.bincount(labels, minlength=len(detector.genres))
    rows = [["accuracy, %", str(len(labels)), *(percent(s["song_accuracy"]) for s in scores.values())]]
    rows.append(["95 % interval", "", *("-".join(percent(end) for end in s["wilson_95"]) for s in scores.values())])
    rows.append(["calibration error, %", "", *(percent(s["expected_calibration_error"]) for s in scores.values())])
    rows += [
        [genre, str(count), *(percent(s["recall"][genre]) for s in scores.values())]
        for genre, count in zip(detector.genres, counts, strict=True)
        if count
    ]
    print(format_table(("", "songs", *scores), rows))
    right = np.array([analysis.song[FUSION].argmax() for analysis in analyses]) == labels
    sure = f"The fusion is right with {right[confident].sum()} of {sum(confident)} confident answers."
    print(f"\n{sure}{chance_words(scores[FUSION])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
