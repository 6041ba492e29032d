"""Compare training schedules on the same songs, seeds and starting weights: honest accuracy against work done.

Every schedule of rivals.py trains the same network, one run a seed. At its end, and only then, the frozen averaged
weights classify the test songs, label-free. They are those of the end of the schedule, so that none gains by looking at
the validation songs more often than another; with --last 0 those of the check with the least validation loss. The
budget of plain-short and random-drop is what hyper-dynamic spent with the same seed. Work is counted in windows and in
frames: a short window has half of them.

At the default scale a seed of the six schedules is 2,400 s of one core: 20 to 25 minutes on two. Windows of the long
schedules don't overlap, so that an epoch hears a frame about once (a tenth of them never, a tenth twice, as a song's
last window is flush with its end); with the published half overlap (--overlap 0.5) they take twice as long.

The split is that of the prepared data: prepare_gtzan_data.py --split artist. The composite is what the published method
reports as accuracy: for `published` each class's validation accuracy as it was when the class graduated, or its best if
it never did; for the others each class's best. No classifier has it.

Reads   data/metadata.json, data/processed/
Writes  benchmarks/results/training_cost.csv        a line a run, written when it ends
        benchmarks/results/training_cost.png        test accuracy against windows trained on
        benchmarks/results/graduation.png           when each class was graduated

Examples
    python benchmarks/training_cost.py --seeds 3
    python benchmarks/training_cost.py --seeds 3 --resume                    # after a stop
    python benchmarks/training_cost.py --seeds 3 --resume --recipe epochs=140
    python benchmarks/training_cost.py --network train_ecas_cnn --epochs 30  # a tenth of every schedule
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import Row, check_rows, fingerprint, read_recipe, read_rows, recipe_text, write_rows
from rivals import AT_EQUAL_BUDGET, SCHEDULES, SHORT, schedule_of, settings_of

from catalogue import Catalogue, read_catalogue
from common import UserError, argument_parser, command, format_table, fraction, path_name, positive_int, versions_line
from extract_model_features import MEMBERS
from figures import picture
from files import write_text
from rules import add_option

if TYPE_CHECKING:
    from rules import Settings
    from tables import Table

KEYS = ("network", "width", "epochs", "last", "overlap", "split", "recipe", "schedule", "seed")
FIELDS = (
    *KEYS,
    "settings",  # of the run, their fingerprint
    "windows",
    "frames",
    "seconds",  # of the loop, checks included
    "cpu_seconds",
    "validation",  # accuracy, a part of 1, of the frozen weights
    "test_songs",
    "test_right",
    "composite",
    "windows_by_epoch",  # trained on in each epoch: "812 790 ..."
    "validation_by_epoch",  # accuracy at each check: "3:0.4123 6:0.4433 ..."
    "graduated",  # epochs after which each class was graduated, from-to: "blues:6-12 18-24; jazz:9-24"
)


# ---------------------------------------------------------------- one run


def settings_by(network: str, width: float, epochs: int, last: int, schedule: str, recipe: str) -> Settings:
    """The settings of a run. Raises UserError for a recipe that names no setting."""
    script = importlib.import_module(network).SETTINGS
    shared = dataclasses.replace(script, width=width, last=last)
    return settings_of(schedule, shared, epochs, read_recipe(recipe))


def fingerprint_of(row: Row) -> str:
    """The fingerprint of the settings that a row's recipe means today."""
    numbers = float(row["width"]), int(row["epochs"]), int(row["last"])
    return fingerprint(settings_by(row["network"], *numbers, row["schedule"], row["recipe"]))


def run(job: tuple[Any, ...], catalogue: Catalogue, counts: list[int]) -> Row:
    """One training, named by its KEYS, and its test.

    ``counts`` are the windows of each epoch of hyper-dynamic's run of the same seed.
    """
    import torch

    from distributed import Team
    from extract_features import load_features
    from hyper_dynamic import Trainer
    from predict import network_outputs

    torch.set_num_threads(1)
    network, width, epochs, last, overlap, _split, recipe, schedule, seed = job
    settings = settings_by(network, width, epochs, last, schedule, recipe)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer = Trainer(
            settings,
            importlib.import_module(network).NETWORK,
            catalogue,
            Path(folder),
            seed,
            Team(torch.device("cpu")),
            schedule=schedule_of(schedule, settings, overlap, counts),
        )
        meta = trainer.run(resume=False)
        records = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    spent = time.process_time() - started
    checks = [record for record in records if "classes" in record]
    songs = np.bincount(trainer.val_labels, minlength=len(catalogue.genres))
    composite = meta["label_conditioned_composite"]
    if schedule == "published":
        composite = float(np.dot(songs, [reported(checks, genre) for genre in catalogue.genres]) / songs.sum())
    tests = catalogue.splits["test"]
    features = load_features(catalogue, settings.features, tests)
    outputs = network_outputs(trainer.average, features, settings.window, settings.overlap)
    said = np.array([windows.mean(axis=0).argmax() for windows, _ in outputs])
    row = {
        **dict(zip(KEYS, job, strict=True)),
        "settings": fingerprint(settings),
        "windows": trainer.state.windows,
        "frames": trainer.state.frames,
        "seconds": round(trainer.state.seconds),
        "cpu_seconds": round(spent),
        "validation": round(meta["validation_accuracy"], 4),
        "test_songs": len(tests),
        "test_right": int((said == catalogue.labels(tests)).sum()),
        "composite": round(composite, 4),
        "windows_by_epoch": " ".join(map(str, np.diff([0, *(record["windows"] for record in records)]))),
        "validation_by_epoch": " ".join(f"{r['epoch'] + 1}:{r['val_accuracy']:.4f}" for r in checks),
        "graduated": "; ".join(f"{genre}:{spans(checks, genre)}" for genre in catalogue.genres),
    }
    return {name: str(value) for name, value in row.items()}


def reported(checks: Sequence[dict[str, Any]], genre: str) -> float:
    """A class's accuracy as the published method reports it: at its graduation, or the best if it never graduated."""
    states = [check["classes"][genre] for check in checks]
    frozen = [state["accuracy"] or 0.0 for state in states if state["graduated"]]
    return frozen[0] if frozen else max(state["accuracy"] or 0.0 for state in states)


def spans(checks: Sequence[dict[str, Any]], genre: str) -> str:
    """The epochs between which a class was graduated: "6-12 18-24"; "" for never."""
    found, since, end = [], None, checks[-1]["epoch"] + 1
    for check in checks:
        epoch, graduated = check["epoch"] + 1, check["classes"][genre]["graduated"]
        if graduated and since is None:
            since = epoch
        elif not graduated and since is not None:
            found.append(f"{since}-{epoch}")
            since = None
    return " ".join([*found, *([f"{since}-{end}"] if since is not None else [])])


# ---------------------------------------------------------------- all runs


def run_all(jobs: int, wanted: Sequence[tuple[Any, ...]], rows: list[Row], path: Path, catalogue: Catalogue) -> None:
    """The wanted runs that ``rows`` lack, ``jobs`` at a time; what waits for hyper-dynamic's budget starts after it."""
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from multiprocessing import get_context

    def key(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in KEYS)

    def budget_of(job: tuple[Any, ...]) -> tuple[str, ...]:
        return (*map(str, job[:-2]), "hyper-dynamic", str(job[-1]))

    counts = {key(row): [int(n) for n in row["windows_by_epoch"].split()] for row in rows}
    todo = [job for job in wanted if tuple(map(str, job)) not in counts]
    coming = {*counts, *(tuple(map(str, job)) for job in todo)}
    for job in todo:
        if job[-2] in AT_EQUAL_BUDGET and budget_of(job) not in coming:
            raise UserError(f"{job[-2]} spends what hyper-dynamic spent: name hyper-dynamic in --schedules too")
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        running: set[Future[Row]] = set()
        try:
            while todo or running:
                for job in list(todo):
                    if job[-2] not in AT_EQUAL_BUDGET or budget_of(job) in counts:
                        running.add(pool.submit(run, job, catalogue, counts.get(budget_of(job), [])))
                        todo.remove(job)
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    row = future.result()
                    rows.append(row)
                    write_rows(path, FIELDS, rows)
                    counts[key(row)] = [int(n) for n in row["windows_by_epoch"].split()]
                    validation, test = 100 * float(row["validation"]), 100 * accuracy(row)
                    print(
                        f"{row['schedule']:14s} seed {row['seed']}  {row['windows']:>8s} windows  {row['seconds']:>5s}"
                        f" s  validation {validation:.1f} %  test {test:.1f} %",
                        flush=True,
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- what they show


def accuracy(row: Row) -> float:
    return int(row["test_right"]) / int(row["test_songs"])


def by_schedule(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(schedule, recipe) -> seed -> run, in the order of SCHEDULES, cheaper recipes first."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found.setdefault((row["schedule"], row["recipe"]), {})[row["seed"]] = row
    cost = {key: np.mean([int(row["windows"]) for row in by_seed.values()]) for key, by_seed in found.items()}
    return {key: found[key] for key in sorted(found, key=lambda key: (list(SCHEDULES).index(key[0]), cost[key]))}


def mean_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def difference(ours: dict[str, Row], others: dict[str, Row]) -> str:
    """Test accuracy of ``ours`` less that of ``others``, in points, on the seeds that both have."""
    gains = [100 * (accuracy(ours[seed]) - accuracy(others[seed])) for seed in sorted(set(ours) & set(others))]
    return mean_spread(gains) if gains and ours is not others else "-"


def summary(rows: Sequence[Row], title: str) -> Table:
    """A row a schedule and recipe, against the plain-300 with the most seeds, of these the best on validation songs."""
    runs = by_schedule(rows)
    plains = [by_seed for (name, _), by_seed in runs.items() if name == "plain-300"]
    plain = max(plains, key=lambda run: (len(run), sum(float(row["validation"]) for row in run.values())), default={})
    most = float(np.mean([float(row["windows"]) for row in plain.values()])) if plain else 0.0
    table = []
    for (name, recipe), by_seed in runs.items():
        every = list(by_seed.values())
        windows = float(np.mean([float(row["windows"]) for row in every]))
        table.append(
            [
                name,
                recipe or "the script's",
                str(len(every)),
                f"{windows:.0f}",
                f"{most / windows:.1f}" if plain and windows else "-",
                f"{np.mean([float(row['cpu_seconds']) for row in every]):.0f}",
                mean_spread([100 * float(row["validation"]) for row in every]),
                mean_spread([100 * accuracy(row) for row in every]),
                difference(by_seed, plain),
                difference(runs.get(("hyper-dynamic", recipe), {}), by_seed) if name in AT_EQUAL_BUDGET else "-",
                mean_spread([100 * float(row["composite"]) for row in every]) if name == "published" else "-",
            ]
        )
    header = [
        title,
        "recipe",
        "seeds",
        "windows",
        "times fewer",
        "CPU s",
        "validation, %",
        "test, %",
        "to plain-300",
        "hyper-dynamic ahead",
        "composite, %",
    ]
    return header, table


def draw_cost(rows: Sequence[Row], title: str, path: Path) -> None:
    """Honest test accuracy against windows trained on: a dot a run, the mean and its spread; the composite hollow.

    What spends hyper-dynamic's budget is drawn beside it, a few per cent to the right.
    """
    from matplotlib import lines, ticker

    runs = by_schedule(rows)
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in runs))}
    markers = dict(zip(dict.fromkeys(recipe for _, recipe in runs), itertools.cycle("osD^v<>P"), strict=False))
    with picture(path, figsize=(9, 6)) as (figure, axes):
        for (name, recipe), by_seed in runs.items():
            colour, marker = colours[name], markers[recipe]
            aside = 1 + 0.03 * (1 + AT_EQUAL_BUDGET.index(name)) if name in AT_EQUAL_BUDGET else 1  # lest they cover
            windows = aside * np.array([float(row["windows"]) for row in by_seed.values()])
            tests = np.array([100 * accuracy(row) for row in by_seed.values()])
            spread = tests.std(ddof=1) if len(tests) > 1 else 0.0
            axes.errorbar(windows.mean(), tests.mean(), spread, color=colour, marker=marker, capsize=4)
            axes.scatter(windows, tests, 12, color=colour, alpha=0.5)
            if name == "published":
                claimed = np.mean([100 * float(row["composite"]) for row in by_seed.values()])
                axes.plot(windows.mean(), claimed, marker, color=colour, fillstyle="none")
                axes.annotate("  what it reports", (windows.mean(), claimed), va="center")
        keys = [lines.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        keys += [
            lines.Line2D([], [], color="0.4", marker=marker, linestyle="none", label=recipe or "the script's recipe")
            for recipe, marker in markers.items()
        ]
        axes.set(xscale="log", xlabel="windows trained on", ylabel="test accuracy, %", title=title)
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ticker.EngFormatter())
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
        figure.legend(handles=keys, loc="outside lower center", fontsize="small", ncols=2)


def draw_graduation(rows: Sequence[Row], title: str, path: Path) -> None:
    """A band a class, a line a seed within it: when the class was graduated. The ends of lines are demotions."""
    shown = {
        f"{name}, " + (recipe or "the script's recipe"): runs
        for (name, recipe), runs in by_schedule(rows).items()
        if name in ("hyper-dynamic", "published")
    }
    columns = 3
    lines = max(1, -(-len(shown) // columns))
    size = {"figsize": (10, 1 + 4 * lines)}
    with picture(path, lines, columns, sharey=True, squeeze=False, **size) as (figure, all_axes):
        for axes in all_axes.flat[len(shown) :]:
            axes.remove()
        for axes, (name, by_seed) in zip(all_axes.flat, shown.items(), strict=False):
            genres: list[str] = []
            for place, row in enumerate(by_seed.values()):
                last = len(row["windows_by_epoch"].split())
                genres = [part.rpartition(":")[0] for part in row["graduated"].split("; ")]
                for level, part in enumerate(row["graduated"].split("; ")):
                    bars = [tuple(map(int, span.split("-"))) for span in part.rpartition(":")[2].split()]
                    height = 0.8 / len(by_seed)
                    bottom = level - 0.4 + place * height
                    axes.broken_barh([(start, end - start) for start, end in bars], (bottom, height), color=f"C{place}")
                axes.set(xlim=(0, last), xlabel="epoch")
            axes.set_title(textwrap.fill(name, 34), fontsize="medium")
            axes.set_yticks(range(len(genres)), genres)
            axes.set_ylim(len(genres) - 0.5, -0.5)
            axes.hlines(np.arange(1, len(genres)) - 0.5, 0, axes.get_xlim()[1], color="0.8", linewidth=0.8)
        figure.suptitle(f"{title}: when a class was graduated; a colour a seed, from 0 on downwards")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    add = parser.add_argument
    add(
        "--network",
        default="train_dpa_cnn",
        choices=list(MEMBERS.values()),
        help="training script whose network and recipe are used",
    )
    add_option(parser, "width", 0.25)
    add("--epochs", type=positive_int, default=300, metavar="N", help="of the long schedules; the short ones follow")
    add(
        "--last", type=int, choices=(0, 1), default=1, help="0: the weights of the check with the least validation loss"
    )
    add("--overlap", type=fraction, default=0.0, metavar="N", help="of windows in the long schedules; published: 0.5")
    add("--recipe", nargs="*", default=[], metavar="NAME=N", help="settings other than the script's")
    add("--seeds", type=positive_int, default=1, metavar="N", help="runs a schedule, with seeds 0 to N-1")
    add("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES, metavar="NAME", help="which of rivals.py")
    add("--jobs", type=positive_int, default=2, metavar="N", help="trainings at once, one thread each")
    add("--resume", action="store_true", help="keep the runs that are in the CSV")
    add(
        "--results",
        type=path_name,
        default=Path(__file__).parent / "results",
        metavar="DIR",
        help="folder of the results",
    )
    add("--update", type=path_name, metavar="FILE", help="document to put the table in, between its marks")
    args = parser.parse_args(argv)
    path = args.results / "training_cost.csv"
    if path.exists() and not args.resume:
        raise UserError(f"{path} is there: go on with --resume, or move it away")

    from tables import markdown, with_tables

    if args.update:
        with_tables(args.update, "", "training_cost.py")  # a mistake here is told before hours of work
    catalogue, rows = read_catalogue(args.data), read_rows(path, FIELDS)
    split = f"{catalogue.split['name']} {catalogue.split['sha256']['test'][:8]}"
    alike = (args.network, args.width, args.epochs, args.last, args.overlap, split)
    changes = read_recipe(" ".join(args.recipe))
    if {"width", "last"} & set(changes):
        parser.error("--recipe: width and last are options of their own")
    settings = functools.partial(settings_by, args.network, args.width, args.epochs, args.last)
    check_rows(path, rows, fingerprint_of)
    wanted = []
    for name in SCHEDULES:
        if name in args.schedules:  # what shares hyper-dynamic's budget goes by its recipe
            recipe = recipe_text(changes, functools.partial(settings, SHORT[0] if name in SHORT else name))
            wanted += [(*alike, recipe, name, seed) for seed in range(args.seeds)]
    run_all(args.jobs, wanted, rows, path, catalogue)

    rows = [row for row in rows if tuple(row[name] for name in KEYS[:6]) == tuple(map(str, alike))]
    network = f"{args.network.removeprefix('train_')}, width {args.width:g}"
    table = summary(rows, f"{network}, {args.epochs} epochs")
    note = f"Split {split}; spread over seeds; {versions_line()}"
    if args.update:
        write_text(args.update, with_tables(args.update, markdown(note, [table]), "training_cost.py"))
    draw_cost(rows, network, args.results / "training_cost.png")
    draw_graduation(rows, network, args.results / "graduation.png")
    print(f"{format_table(*table)}\n\n{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
