"""Measure the detector: cold start, next song, memory.

Reads   songs (default: the demo song), models/
Writes  nothing; prints a table

Example
    python benchmarks/detector_speed.py --repeat 5
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import argument_parser, command, format_table, positive_int  # noqa: E402


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--threads")
    parser.add_argument("songs", nargs="*", type=Path, default=[ROOT / "examples" / "demo_song.ogg"], metavar="SONG")
    parser.add_argument("--repeat", type=positive_int, default=5, metavar="N", help="runs of each measurement")
    args = parser.parse_args(argv)

    cold = []
    for _ in range(args.repeat):
        started = time.perf_counter()
        words = [sys.executable, str(ROOT / "genre_detector.py"), str(args.songs[0]), "--threads", str(args.threads)]
        subprocess.run(words, check=True, capture_output=True)
        cold.append(time.perf_counter() - started)

    import torch

    from genre_detector import GenreDetector

    torch.set_num_threads(args.threads)
    detector = GenreDetector()
    detector.predict(args.songs[0])
    warm = []
    for _ in range(args.repeat):
        for song in args.songs:
            started = time.perf_counter()
            detector.predict(song)
            warm.append(time.perf_counter() - started)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [
        ("cold start to answer, s", f"{min(cold):.2f}", f"{sum(cold) / len(cold):.2f}"),
        ("next song, s", f"{min(warm):.3f}", f"{sum(warm) / len(warm):.3f}"),
        ("peak memory, MB", f"{memory:.0f}", ""),
    ]
    print(format_table((f"fusion, {args.threads} threads", "least", "mean"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
