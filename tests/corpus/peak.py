"""Run a command and say how much memory it took."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# A process's peak counts from that of the one that starts it: this one is small, a session of tests is not
STARTER = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[2:]);"
    "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=open(sys.argv[1], 'w'))"
)


def peak_of(command: Sequence[str], output: Path, errors: Path) -> tuple[int, float]:
    """Exit code and peak megabytes of a command; ``output`` and ``errors`` take what it prints."""
    said = errors.with_name(f"{errors.name}.peak")
    with output.open("wb") as out, errors.open("wb") as err:
        start = [sys.executable, "-c", STARTER, os.fspath(said), *command]
        subprocess.run(start, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=True)
    code, kilobytes = map(int, said.read_text().split())
    return code, kilobytes / 1024
