"""Put the corpus of bad and odd files through the detector: outcomes, the slowest file, peak memory.

Reads   models/, and makes tests/corpus anew in a temporary folder
Writes  a table on standard output; exit code 1 if a file became of other than it should, if a bad one isn't named
        just once, or if memory or time are over the limits

Example
    python benchmarks/corpus_run.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from corpus.make_corpus import ANSWERED, NOTED, REFUSED, make  # noqa: E402
from corpus.peak import peak_of  # noqa: E402

from common import UserError, argument_parser, command, format_table, one_line  # noqa: E402

MEGABYTES = 1000  # at most, of the one call
SECONDS = 10  # at most, of a file


@command
def main(argv: Sequence[str] | None = None) -> int:
    argument_parser(__doc__).parse_args(argv)
    from genre_detector import GenreDetector

    with tempfile.TemporaryDirectory() as name:
        corpus = make(Path(name) / "corpus")
        errors = Path(name) / "errors"
        call = [sys.executable, str(ROOT / "genre_detector.py"), "--jsonl", *corpus]
        code, megabytes = peak_of(call, Path(name) / "answers", errors)
        lines = errors.read_text(encoding="utf-8").split("\n")[:-1]
        refused = [path for path, case in corpus.items() if case.outcome == REFUSED]
        once = sum(sum(f": {one_line(path)}: " in line for line in lines) == 1 for path in refused)
        detector = GenreDetector()
        outcomes: Counter[tuple[str, str]] = Counter()
        slowest = (0.0, "")
        for path, case in corpus.items():
            started = time.perf_counter()
            try:
                outcome = NOTED if detector.predict(path).notes else ANSWERED
            except UserError:
                outcome = REFUSED
            slowest = max(slowest, (time.perf_counter() - started, case.what))
            outcomes[case.outcome, outcome] += 1
    rows = [(f"{wanted}, as it should" if wanted == got else f"{got} instead of {wanted}", count)
            for (wanted, got), count in sorted(outcomes.items())]  # fmt: skip
    rows += [("exit code of one call", code), ("lines on stderr", len(lines)), ("bad files named once", once)]
    rows.append(("peak memory, MB", f"{megabytes:.0f}"))
    rows.append((f"slowest file, s ({slowest[1]})", f"{slowest[0]:.2f}"))
    print(format_table((f"{len(corpus)} files", ""), rows))
    as_they_should = all(wanted == got for wanted, got in outcomes) and code == 1 and once == len(lines) == len(refused)
    return int(not (as_they_should and megabytes < MEGABYTES and slowest[0] < SECONDS))


if __name__ == "__main__":
    sys.exit(main())
