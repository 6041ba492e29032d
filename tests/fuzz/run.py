"""Coverage-guided fuzzing of all that reads strangers' files: sounds, tags, checkpoints, archives, lists, JSON.

Needs atheris (pip install atheris), which is no requirement of the project. Each target runs in a process of its own
for a given time; what crashes one is left in OUT/<target>/, to become a test in tests/test_fuzz.py.

Writes  OUT/<target>/crash-*; a table on standard output; exit code 1 if there was a crash

Examples
    python tests/fuzz/run.py --seconds 120
    python tests/fuzz/run.py --seconds 3600 decode archive
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import UserError, argument_parser, command, format_table, path_name, positive_int  # noqa: E402

INSTRUMENTED = (
    "archives", "catalogue", "checkpoints", "common", "detector_output", "detector_tags", "extract_features",
    "extract_model_features", "files", "fuzz", "json", "mp3_frames", "mutagen", "song_lists", "sound_faults", "tarfile",
    "train_fusion", "zipfile",
)  # fmt: skip


def fuzz(name: str, seconds: int, seed: int, out: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        from fuzz.targets import SEEDS, TARGETS

    target = TARGETS[name]
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(SEEDS[name]()):
        (corpus / f"seed{number}").write_bytes(content)

    def once(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target(content, Path(folder))

    limits = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=3000", "-max_len=65536"]
    options = [f"-seed={seed}", f"-artifact_prefix={out}/", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *options], once)
    atheris.Fuzz()


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="what is fuzzed; if not given, everything")
    parser.add_argument("--seconds", type=positive_int, default=120, metavar="S", help="for each target")
    parser.add_argument("--seed", type=positive_int, default=1, metavar="N", help="of libFuzzer")
    parser.add_argument("--out", type=path_name, default=Path("fuzzing"), metavar="OUT", help="folder of what it finds")
    args = parser.parse_args(argv)
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise UserError("atheris is not installed: pip install atheris") from None

    from fuzz.targets import TARGETS

    rows, crashes = [], 0
    for name in args.targets or TARGETS:
        started = time.monotonic()
        options = ["--alone", name, args.seconds, args.seed, args.out / name]
        run = subprocess.run([sys.executable, __file__, *map(str, options)], capture_output=True, errors="replace")
        (args.out / name).mkdir(parents=True, exist_ok=True)
        (args.out / name / "log.txt").write_text(run.stderr + run.stdout, encoding="utf-8")
        found = re.findall(r"stat::number_of_executed_units:\s*(\d+)", run.stderr)
        crashes += run.returncode != 0
        what = "nothing" if run.returncode == 0 else f"see {args.out / name}"
        rows.append((name, f"{time.monotonic() - started:.0f}", found[-1] if found else "?", what))
    print(format_table(("target", "seconds", "executions", "found"), rows))
    return int(bool(crashes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        fuzz(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
    sys.exit(main())
