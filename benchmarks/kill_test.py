"""Kill every step of the pipeline with SIGKILL at random moments; the next run must end as if nothing had happened.

A run is killed after a random time, or after a random number of changes in its folder; alone, or with its worker
processes. Then the same command goes on (a training with --resume where there is something to resume), and every
file must equal that of an undisturbed run: bit for bit, but for the seconds a training says it took. Runs are forked
from this process, which has imported everything, so that kills hit work and not imports. POSIX only.

With --disk runs aren't killed: the disk is full after a random number of bytes. Each must then end with exit code 1
and one line, and go on likewise once there is room.

Reads   nothing: songs and networks are made up
Writes  a table on standard output; exit code 1 if anything was lost

Examples
    python benchmarks/kill_test.py --kills 63 --seed 0
    mount -t tmpfs -o size=64m tmpfs /mnt/small && python benchmarks/kill_test.py --disk /mnt/small
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from joblib.externals.loky import get_reusable_executor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoints import content_sum, load_checkpoint  # noqa: E402
from common import argument_parser, command, complain, format_table, path_name, positive_int, progress  # noqa: E402
from extract_model_features import MEMBERS  # noqa: E402
from files import file_sha256  # noqa: E402

Command = list[str]
SONGS = 18
GENRES = ("polka", "samba", "waltz")
TRAINED = {script: name for name, script in MEMBERS.items()}
ORPHAN_SECONDS = 20  # that worker processes of a killed run may take to end
POOLED = ("prepare_gtzan_data", "extract_features")  # have joblib's worker processes
MODELS = ["--models", "models"]
DEVICE = ["--device", "cpu", "--threads", "1"]
OUTPUT = Path(tempfile.gettempdir()) / f"kill_test_{os.getpid()}.txt"  # of all runs
SMALL = {"epochs": 4, "check-every": 2, "width": 0.05, "window": 32, "share": 1, "batch-size": 4}


@dataclass(frozen=True)
class Step:
    name: str
    commands: list[Command]  # a script and its arguments, run one after another


def steps() -> list[Step]:
    training = [*MODELS, *DEVICE, *(f"--{name}={value}" for name, value in SMALL.items())]
    detection = [*MODELS, *DEVICE, "--jsonl", "--output", "answers.jsonl", "--resume", "--workers", "2"]
    return [
        Step("prepare", [["prepare_gtzan_data", "--source", "../songs.zip", "--workers", "2"]]),
        Step("extract", [["extract_features", "--workers", "2"]]),
        *(Step(script, [[script, *training]]) for script in TRAINED),
        Step(
            "fusion chain",
            [["extract_model_features", *MODELS, *DEVICE], ["create_cleaned_features"], ["train_fusion", *MODELS]],
        ),
        Step("detection", [["genre_detector", *detection, "data/raw/genres"]]),
    ]


def write_songs(path: Path) -> None:
    """A zip of short noisy tunes in three genres."""
    import soundfile

    with zipfile.ZipFile(path, "w") as bundle:
        for number in range(SONGS):
            rng = np.random.default_rng(number)
            times = np.arange(round(rng.uniform(1.1, 1.6) * 22_050)) / 22_050
            tune = np.sin(2 * np.pi * rng.uniform(100, 2000, (4, 1)) * times).sum(axis=0)
            beat = rng.standard_normal(len(times)) * np.exp(-6 * (times % rng.uniform(0.2, 0.5)))
            stream = io.BytesIO()
            soundfile.write(stream, 0.1 * tune + 0.05 * beat, 22_050, format="WAV")
            genre = GENRES[number % len(GENRES)]
            info = zipfile.ZipInfo(f"genres/{genre}/{genre}.{number:05d}.wav", (2020, 1, 1, 0, 0, 0))
            bundle.writestr(info, stream.getvalue())


# ---------------------------------------------------------------- runs


def start(words: Command, folder: Path) -> Any:
    """Run a script's ``main`` in a forked process and group of its own, in ``folder``."""

    def work() -> None:
        os.setpgrp()  # no session of its own: on Linux that would lose the low priority this test was started with
        os.chdir(folder)
        output = os.open(OUTPUT, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [f"{words[0]}.py", *words[1:]]
        code = __import__(words[0]).main(words[1:])
        sys.stdout.flush()
        if words[0] in POOLED:  # as at the end of a process of its own; this one would wait until they are long idle
            get_reusable_executor().shutdown()
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def run(words: Command, folder: Path) -> int:
    process = start(words, folder)
    process.join()
    return process.exitcode


def go_on(words: Command, folder: Path) -> None:
    """The next run after a kill, as a user would start it. Raises RuntimeError if it fails."""
    name = TRAINED.get(words[0])
    if name and (folder / "models" / name / "latest.safetensors").exists() and run([*words, "--resume"], folder) == 0:
        return
    if code := run(words, folder):
        raise RuntimeError(f"{' '.join(words)} left with {code}: {OUTPUT.read_text()[-500:]}")


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files in a folder."""
    found = []
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(parent, file))
                found.append((os.path.join(parent, file), status.st_size, status.st_mtime_ns))
    return found


def kill(words: Command, folder: Path, seconds: float, rng: np.random.Generator) -> int:
    """Start a run and kill it; the number of its group of processes, 0 if it had ended before."""
    by_time, alone = rng.random() < 0.5, rng.random() < 0.5
    deadline = time.monotonic() + (rng.uniform(0, seconds) if by_time else 60)
    wanted, count, seen = int(rng.integers(2, 40)), 0, listing(folder)
    process = start(words, folder)
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.0005)
        if not by_time and (now := listing(folder)) != seen:
            count, seen = count + 1, now
            if count == wanted:
                break
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # it may end just now, or not yet lead its group
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
    process.join()
    return process.pid if process.exitcode == -signal.SIGKILL else 0


def starve(words: Command, folder: Path, grown: int, rng: np.random.Generator) -> str | None:
    """Run with room for less than a run needs (bytes); what is wrong with its end, None if it had room enough."""
    ballast, seen = folder.parent / "ballast", len(OUTPUT.read_bytes())
    room = shutil.disk_usage(folder).free - int(rng.uniform(0, max(1, grown)))
    with ballast.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, max(1, room))
    code = run(words, folder)
    ballast.unlink()
    if code == 0:
        return None
    said = OUTPUT.read_bytes()[seen:].decode()
    lines = [line for line in said.splitlines() if line.startswith(f"{words[0]}.py: ")]
    return "" if code == 1 and len(lines) == 1 and "Traceback" not in said else f"left with {code}: {said[-300:]}"


def still_there(groups: Iterable[int]) -> list[int]:
    """Of the groups of killed runs those whose worker processes don't end by themselves."""
    left, deadline = list(groups), time.monotonic() + ORPHAN_SECONDS
    while left and time.monotonic() < deadline:
        try:
            os.killpg(left[0], 0)
            time.sleep(0.1)
        except ProcessLookupError:
            left.pop(0)
    return left


# ---------------------------------------------------------------- what is there afterwards


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder by its path, without what differs between two undisturbed runs: times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        tensors, meta = load_checkpoint(path, "")
        meta.get("progress", {}).pop("seconds", None)
        return content_sum(json.dumps(meta), tensors)
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        timeless = [{k: v for k, v in record.items() if k not in ("seconds", "mtime")} for record in records]
        return {record.get("path", record.get("epoch")): record for record in timeless}
    return file_sha256(path)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The first file that differs; "" if none does."""
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            return f"{name} " + ("is left" if name not in expected else "is lost" if name not in found else "differs")
    return ""


# ---------------------------------------------------------------- the test


@dataclass(frozen=True)
class Whole:
    """A step that nothing disturbed."""

    seconds: float
    grown: int  # bytes by which its folder grew
    files: dict[str, Any]  # as ``contents`` has them


def undisturbed(wanted: Sequence[Step], folder: Path) -> dict[str, Whole]:
    """Run each step once, keeping the state before each step."""
    found = {}
    work = folder / "work"
    work.mkdir()
    for step in wanted:
        shutil.copytree(work, folder / "before" / step.name)
        started, before = time.monotonic(), sum(size for _, size, _ in listing(work))
        for words in step.commands:
            go_on(words, work)
        grown = sum(size for _, size, _ in listing(work)) - before
        found[step.name] = Whole(time.monotonic() - started, grown, contents(work))
    return found


def disturb(step: Step, folder: Path, whole: Whole, rng: np.random.Generator, full: bool) -> tuple[int, str]:
    """Kill one of a step's commands, or let the disk be ``full``, then go on.

    Returns the group of processes that was killed, and what was lost ("" if nothing was).
    """
    work = folder / "work"
    group, problem = 0, None
    while not group and problem is None:  # it may have been too quick
        victim = int(rng.integers(len(step.commands)))
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder / "before" / step.name, work)
        for words in step.commands[:victim]:
            run(words, work)
        if full:
            problem = starve(step.commands[victim], work, whole.grown, rng)
        else:
            group = kill(step.commands[victim], work, whole.seconds / len(step.commands), rng)
    if problem:
        return group, problem
    try:
        for words in step.commands[victim:]:
            go_on(words, work)
    except RuntimeError as error:
        return group, str(error)
    return group, difference(contents(work), whole.files)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--seed")
    parser.add_argument("--kills", type=positive_int, default=63, metavar="N", help="of all steps together")
    parser.add_argument("--steps", type=positive_int, default=7, metavar="N", help="the first N of the pipeline")
    parser.add_argument(
        "--disk", type=path_name, metavar="DIR", help="a small file system: let it be full, and kill nothing"
    )
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a forked process has none of its parent's threads

    killed, rng, lost = steps()[: args.steps], np.random.default_rng(args.seed), []
    for script in (words[0] for step in killed for words in step.commands):
        __import__(script)
    kills = {step.name: 0 for step in killed}
    started, groups = time.monotonic(), list[int]()
    with tempfile.TemporaryDirectory(prefix="kill_test_", dir=args.disk) as name:
        write_songs(Path(name) / "songs.zip")
        whole = undisturbed(killed, Path(name))
        try:
            for number in progress(range(args.kills), "kills"):
                step = killed[number % len(killed)]
                group, problem = disturb(step, Path(name), whole[step.name], rng, args.disk is not None)
                kills[step.name] += 1
                groups += [group] * bool(group)
                if problem:
                    lost.append(f"kill {number + 1}, {step.name}: {problem}")
        except KeyboardInterrupt:
            complain("stopped; the table is of the kills so far")
    lost += [
        f"worker processes of group {group} outlive their run by {ORPHAN_SECONDS} s" for group in still_there(groups)
    ]
    rows: list[tuple[object, ...]] = [(name, f"{whole[name].seconds:.1f}", kills[name]) for name in kills]
    rows.append(("all", f"{time.monotonic() - started:.0f}", sum(kills.values())))
    OUTPUT.unlink()
    print(format_table(("step", "seconds undisturbed", "full disks" if args.disk else "kills"), rows))
    print(f"seed {args.seed}: " + ("nothing lost" if not lost else "; ".join(lost)))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
