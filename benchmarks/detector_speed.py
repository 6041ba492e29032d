"""Measure the detector: from a cold start to the answer, the next song, a folder, each stage, a long file, memory.

Reads   songs (default: the demo song), models/
Writes  nothing that stays; prints a table, and these figures beside those of other detectors

Memory is the largest resident set of a process of its own that runs the command line, Python and torch included.

Examples
    python benchmarks/detector_speed.py
    python benchmarks/detector_speed.py --hours 2 my_music/
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import UserError, argument_parser, command, format_table, path_name, positive_int  # noqa: E402
from common import seconds as finite  # noqa: E402
from detector_inputs import find_songs, listen  # noqa: E402

if TYPE_CHECKING:
    from genre_detector import GenreDetector

DEMO = ROOT / "examples" / "demo_song.ogg"
# Measured once by this project, each installed as its authors say, on two cores: seconds from a cold start to the
# answer for a file of 30 s, and for each further file in the same process
PEERS = (
    ("musicnn, features and an SVM", 9.6, 2.1),
    ("jsalbert's CRNN, moved to torch", 5.2, 0.42),
    ("alepot55's Efficient_VGG", 7.8, 0.26),
    ("BBNN", 7.7, 0.40),
    ("pyAudioAnalysis, SVM", 2.6, 0.64),
    ("lumenalux's ensemble", 12.0, 4.2),
)


def run_alone(args: Sequence[object]) -> tuple[float, float]:
    """Seconds and peak memory in MB of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.DEVNULL, stderr=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, args))} left with exit code {process.returncode}: see its message above")
    return time.perf_counter() - started, usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def median_time(work: Callable[[], object], repeat: int) -> float:
    """Median seconds of a call after a first one."""
    work()
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def stages(detector: GenreDetector, song: Path, repeat: int) -> list[tuple[str, float]]:
    """Median seconds of each stage of one song."""
    from decoding import SoundReader
    from extract_features import song_features

    blocks = list(SoundReader(song))
    heard = listen(song)
    analysis = detector.judge(heard)
    found: list[tuple[str, Callable[[], object]]] = [
        ("decode and resample", lambda: list(SoundReader(song))),
        ("log-mel and MFCC", lambda: song_features(blocks)),
    ]
    for member in detector.members:
        found.append((member.name, lambda member=member: member.outputs([heard.features])))
    found.append(("sections and answer", lambda: detector.conclude("", heard, analysis)))
    return [(name, median_time(work, repeat)) for name, work in found]


def write_long(path: Path, hours: float) -> None:
    """The demo song over and over, 44,100 Hz stereo FLAC."""
    import soundfile
    import soxr

    samples, rate = soundfile.read(DEMO, dtype="float32")
    stereo = np.tile(soxr.resample(samples, rate, 44_100)[:, None], (1, 2))
    with soundfile.SoundFile(path, "w", 44_100, 2) as stream:
        for _ in range(round(hours * 3600 * 44_100 / len(stereo))):
            stream.write(stereo)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--threads")
    parser.add_argument("songs", nargs="*", default=[str(DEMO)], metavar="SONG", help="song or folder")
    parser.add_argument(
        "--models", type=path_name, default=ROOT / "models", metavar="DIR", help="folder of checkpoints"
    )
    parser.add_argument("--repeat", type=positive_int, default=5, metavar="N", help="runs of each measurement")
    parser.add_argument(
        "--hours", type=finite, default=0, metavar="H", help="also a file of this length; 0 leaves it out"
    )
    args = parser.parse_args(argv)
    songs = [path for path, problem in find_songs(args.songs) if problem is None]
    if not songs:
        raise UserError(f"no songs in {', '.join(args.songs)}: name a song or a folder of songs")

    line = [ROOT / "genre_detector.py", "--models", args.models, "--threads", args.threads]
    runs = [run_alone([*line, songs[0]]) for _ in range(args.repeat)]
    cold = statistics.median(seconds for seconds, _ in runs)
    rows = [("cold start to answer, s", f"{cold:.2f}")]
    rows.append(
        ("  of which Python and torch", f"{statistics.median(run_alone(['-c', 'import torch'])[0] for _ in runs):.2f}")
    )
    rows.append(("peak memory, one song, MB", f"{max(memory for _, memory in runs):.0f}"))

    import torch

    from genre_detector import GenreDetector

    torch.set_num_threads(args.threads)
    detector = GenreDetector(models=args.models)
    following = median_time(lambda: detector.predict(songs[0]), args.repeat)
    rows.append(("next song, s", f"{following:.3f}"))
    parts = stages(detector, Path(songs[0]), args.repeat)
    total = sum(seconds for _, seconds in parts)
    rows += [(f"  {name}", f"{seconds:.3f} ({100 * seconds / total:.0f} %)") for name, seconds in parts]
    if len(songs) > 1:
        for workers in (1, 2):
            started = time.perf_counter()
            count = sum(1 for _ in detector.predictions(songs, workers=workers))
            rows.append((f"songs a second, {workers} worker(s)", f"{count / (time.perf_counter() - started):.1f}"))
    if args.hours:
        with tempfile.TemporaryDirectory() as folder:
            write_long(Path(folder, "long.flac"), args.hours)
            seconds, memory = run_alone([*line, Path(folder, "long.flac")])
        rows += [(f"file of {args.hours:g} h, s", f"{seconds:.1f}"), ("  peak memory, MB", f"{memory:.0f}")]
    print(format_table((f"fusion, {args.threads} threads, {Path(songs[0]).name}", ""), rows))
    peers = [(name, f"{first:.1f}", f"{later:.2f}") for name, first, later in PEERS]
    header = ("beside others, measured earlier", "cold start, s", "next song, s")
    print(f"\n{format_table(header, [('this fusion, now', f'{cold:.1f}', f'{following:.2f}'), *peers])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
