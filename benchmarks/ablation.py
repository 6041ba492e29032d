"""Try changes to the training recipe, one at a time, on validation songs.

The training and validation songs of the prepared split are shared out anew, by artist, once a seed: four fifths
train, one fifth validates; its test songs are never read. (A joint credit is an artist of its own here.) A change is
compared with the recipe on the same seeds; one that is in the recipe already is left out. The log-loss is that at the
best temperature, so that smoother targets alone are no loss. Standard errors allow for splits that share songs. With so
few seeds a difference needs many of them: 12.7 with two seeds, 4.3 with three, 2.6 with six (95 %). A run is scored on
the songs that its rules watched.

Reads   data/metadata.json, data/processed/
Writes  benchmarks/results/ablation.csv    a line a run; what is there already is not run again

Examples
    python benchmarks/ablation.py --network train_bigru_cnn --seeds 3 --epochs 20
    python benchmarks/ablation.py --network train_dpa_cnn --recipe width=0.25 --changes none no_mixup
    python benchmarks/ablation.py --changes none no_graduation no_demotion no_adaptive_overlap no_dynamic_weights
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes import Row, check_rows, fingerprint, read_recipe, read_rows, recipe_text, write_rows
from rivals import ALIKE

from catalogue import Catalogue, artist_key, read_catalogue, read_repeats
from common import argument_parser, command, format_table, path_name, positive_int, versions_line
from extract_model_features import MEMBERS
from files import write_text

if TYPE_CHECKING:
    from augment import Augmentation
    from rules import Settings
    from tables import Table

# Fields of Settings or Augmentation that differ from the recipe; "none" is the recipe.
CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    # the rules, each off in turn, and the one that the recipe has off
    "no_rules": ALIKE,
    "no_graduation": {"graduate_at": 2.0},
    "no_demotion": {"demote_margin": 1.0},
    "no_adaptive_overlap": {"struggle_below": 0.0},
    "no_dynamic_weights": {"weight_strength": 0.0},
    "no_consolidation": {"consolidation": 0.0},
    "no_averaging": {"average": 0.0},
    "rhythm": {"rhythm": 1},
    "short_windows": {"short_windows": 0.5},
    "graduate_at_0.75": {"graduate_at": 0.75},
    "rehearsal_0.5": {"rehearsal_rate": 0.5},
    "rehearsal_0.1": {"rehearsal_rate": 0.1},
    "weight_strength_2": {"weight_strength": 2.0},
    # other settings
    "single_precision": {"fast": 0},
    "least_loss": {"last": 0},
    "final_rate_0": {"final_rate": 0.0},
    "final_rate_1": {"final_rate": 1.0},
    "weight_decay_0.02": {"weight_decay": 0.02},
    "weight_decay_0.2": {"weight_decay": 0.2},
    "average_0.995": {"average": 0.995},
    "average_0.998": {"average": 0.998},
    "average_0.999": {"average": 0.999},
    "lr_1e-3": {"learning_rate": 1e-3},
    "lr_4e-3": {"learning_rate": 4e-3},
    "no_mixup": {"mixup": 0.0},
    "mixup_1": {"mixup": 1.0},
    "no_label_smoothing": {"label_smoothing": 0.0},
    "window_130": {"window": 130},
    "augmentation_x1.5": {"tempo": 0.3, "pitch_bands": 4.0, "equaliser": 0.25, "contrast": 0.3},
    "no_tempo": {"tempo": 0.0},
    "no_pitch": {"pitch_bands": 0.0},
    "equaliser_x2": {"equaliser": 0.3},
    "no_equaliser": {"equaliser": 0.0},
    "no_noise": {"noise_chance": 0.0},
    "no_band_limit": {"band_limit_chance": 0.0, "low_cut_chance": 0.0},
    "no_masks": {"mask_chance": 0.0},
    "no_contrast": {"contrast": 0.0},
}
VALIDATES = 0.2  # share of the songs
FIELDS = (
    "network",
    "recipe",
    "change",
    "epochs",
    "seed",
    "settings",
    "songs",
    "right",
    "log_loss",
    "windows",
    "seconds",
)


def new_split(catalogue: Catalogue, seed: int) -> Catalogue:
    """The training and validation songs shared out again, 4 to 1, artists and repeats together; no test songs."""
    from splits import share_out, track_groups

    tracks = sorted(catalogue.splits["train"] + catalogue.splits["val"])
    artists = [artist_key(catalogue.songs[track].artist) for track in tracks]
    groups = track_groups(tracks, artists, read_repeats(catalogue))
    part = share_out(catalogue.labels(tracks), groups, (1 - VALIDATES, VALIDATES), seed)
    splits = {name: [t for t, p in zip(tracks, part, strict=True) if p == i] for i, name in enumerate(("train", "val"))}
    return dataclasses.replace(catalogue, splits={**splits, "test": []})


def changed(network: str, recipe: str, change: str, epochs: int) -> tuple[Settings, Augmentation]:
    """The settings of a run. Raises UserError for a recipe that names no setting."""
    from augment import Augmentation

    script = importlib.import_module(network)
    names = {field.name for field in dataclasses.fields(Augmentation)}
    values = read_recipe(recipe) | {"epochs": epochs}
    values |= {name: value for name, value in CHANGES[change].items() if name not in names}
    sounds = {name: value for name, value in CHANGES[change].items() if name in names}
    return dataclasses.replace(script.SETTINGS, **values), Augmentation(**sounds)


def fingerprint_of(row: Row) -> str:
    """The fingerprint of the settings that a row's recipe and change mean today."""
    return fingerprint(*changed(row["network"], row["recipe"], row["change"], int(row["epochs"])))


def run(network: str, recipe: str, change: str, epochs: int, seed: int, catalogue: Catalogue) -> dict[str, Any]:
    """One training on one thread; its figures by FIELDS."""
    import torch

    from distributed import Team
    from figures import fit_temperature
    from hyper_dynamic import Trainer
    from predict import log_softmax

    torch.set_num_threads(1)
    settings, augmentation = changed(network, recipe, change, epochs)
    build = importlib.import_module(network).NETWORK
    with tempfile.TemporaryDirectory() as folder:
        split = new_split(catalogue, seed)
        trainer = Trainer(settings, build, split, Path(folder), seed, Team(torch.device("cpu")), augmentation)
        trainer.run(resume=False)
    outputs, labels = trainer.validate(), trainer.val_labels
    calm = log_softmax(outputs, fit_temperature(outputs, labels, doubt=0))
    return {
        "network": network,
        "recipe": recipe,
        "change": change,
        "epochs": epochs,
        "seed": seed,
        "settings": fingerprint(settings, augmentation),
        "songs": len(labels),
        "right": int((outputs.argmax(1) == labels).sum()),
        "log_loss": round(-float(calm[np.arange(len(labels)), labels].mean()), 4),
        "windows": trainer.state.windows,
        "seconds": round(trainer.state.seconds),
    }


def summary(rows: list[dict[str, str]], network: str, recipe: str, epochs: str) -> Table:
    """A row a change: mean accuracy and log-loss over seeds, and the difference from the recipe on the same seeds.

    Seeds share songs, so the error of a difference is larger than if they didn't, by the correction for resampled
    splits of Nadeau & Bengio (Machine Learning 52, 2003).
    """
    figures: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if (row["network"], row["recipe"], row["epochs"]) == (network, recipe, epochs):
            figures.setdefault(row["change"], {})[row["seed"]] = row
    table = []
    for change, by_seed in figures.items():
        seeds = sorted(set(by_seed) & set(figures.get("none", {})))
        cells = [change, str(len(by_seed))]
        if not seeds:
            table.append([*cells, *["-"] * 6])
            continue
        factor = np.sqrt(1 / len(seeds) + VALIDATES / (1 - VALIDATES))
        for name, scale in (("accuracy", 100.0), ("log_loss", 1.0)):
            ours = np.array([_figure(by_seed[seed], name) for seed in seeds]) * scale
            base = np.array([_figure(figures["none"][seed], name) for seed in seeds]) * scale
            error = (ours - base).std(ddof=1) * factor if len(seeds) > 1 else float("nan")
            digits = 1 if scale > 1 else 3
            change_by = f"{(ours - base).mean():+.{digits}f} +- {error:.{digits}f}"
            cells += [f"{ours.mean():.{digits}f}", "" if change == "none" else change_by]
        windows, plain = (sum(float(rows[seed]["windows"]) for seed in seeds) for rows in (by_seed, figures["none"]))
        cells += [f"{windows / len(seeds):.0f}", "" if change == "none" else f"{100 * (windows / plain - 1):+.0f} %"]
        table.append(cells)
    title = ", ".join([network, f"{epochs} epochs", *recipe.split()])
    return [title, "seeds", "accuracy, %", "change", "log-loss", "change", "windows", "change"], table


def _figure(row: dict[str, str], name: str) -> float:
    return float(row["right"]) / float(row["songs"]) if name == "accuracy" else float(row[name])


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser(__doc__, "--data")
    add = parser.add_argument
    scripts = list(MEMBERS.values())
    add("--network", default=scripts[0], choices=scripts, help="training script whose recipe is changed")
    add("--recipe", nargs="*", default=[], metavar="NAME=N", help="settings other than the script's")
    add("--changes", nargs="*", default=list(CHANGES), choices=list(CHANGES), metavar="NAME")
    add("--seeds", type=positive_int, default=3, metavar="N", help="splits and starting weights a change")
    add("--epochs", type=positive_int, default=20, metavar="N", help="length of every run")
    add("--jobs", type=positive_int, default=2, metavar="N", help="trainings at once, one thread each")
    add("--results", type=path_name, default=Path(__file__).parent / "results", metavar="DIR")
    add("--update", type=path_name, metavar="FILE", help="document to put the tables in, between its marks")
    args = parser.parse_args(argv)

    from tables import markdown, with_tables

    if args.update:
        with_tables(args.update, "", "ablation.py")  # a mistake here is told before hours of work
    catalogue = read_catalogue(args.data)
    path = args.results / "ablation.csv"
    rows = read_rows(path, FIELDS)
    check_rows(path, rows, fingerprint_of)
    settings = read_recipe(" ".join(args.recipe))
    if "epochs" in settings:
        parser.error("--recipe: --epochs is an option of its own")
    recipe = recipe_text(settings, lambda recipe: changed(args.network, recipe, "none", args.epochs))
    done = {tuple(row[name] for name in FIELDS[:5]) for row in rows}
    alike = args.network, recipe
    base = changed(*alike, "none", args.epochs)
    changes = [name for name in args.changes if name == "none" or changed(*alike, name, args.epochs) != base]
    wanted = [(*alike, change, args.epochs, seed) for change in changes for seed in range(args.seeds)]
    todo = [(*job, catalogue) for job in wanted if tuple(map(str, job)) not in done]

    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run, *job) for job in todo]):
            rows.append({name: str(value) for name, value in future.result().items()})
            write_rows(path, FIELDS, rows)
            print(",".join(rows[-1].values()), flush=True)
    if args.update:
        groups = dict.fromkeys((row["network"], row["recipe"], row["epochs"]) for row in rows)
        text = markdown(
            f"Change: on the same seeds, with its standard error. {versions_line()}",
            [summary(rows, *group) for group in groups],
        )
        write_text(args.update, with_tables(args.update, text, "ablation.py"))
    print(format_table(*summary(rows, args.network, recipe, str(args.epochs))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
